# SPDX-License-Identifier: MIT
"""The result of a pruning, layer by layer: masks, counts, a table and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import Module

from lap_ext._text import columns, html_table, in_html, some
from lap_ext.errors import calling, warn
from lap_ext.masks import Masks
from lap_ext.options import Inputs, OnUnsupported
from lap_ext.pruning.dense import sentence
from lap_ext.pruning.families import FamilyResult, fixed_notes
from lap_ext.pruning.structured import units_kept
from lap_ext.structures import Structure
from lap_ext.topology import Layer, PrunedBy, Topology
from lap_ext.topology.coupling import Fixed

Original: TypeAlias = Module | Topology | str | os.PathLike[str]  # what a report is about
_COUNTS = (3, 4, 5, 6)  # columns of numbers
_LISTED = 5  # of many layers, a line lists the first ones


@dataclass(frozen=True)
class LayerResult:
    """One layer: its name, kind, shape, and how many of its weights are kept.

    Attributes:
        name, kind, shape: as in `lap_ext.trace`.
        kept: the number of weights that are kept.
        total: the number of weights.
        nonzero: the number of kept weights that are not zero; a mask may keep zeros.
        pruned_by: how the others are zero: "zeros", they are zero in the parameter; "mask", a mask
            multiplies the weight that the module computes (a parametrization, weight or spectral
            norm).
        units: how many units of the structure are kept, and how many there are; None for single
            weights and patterns.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    kept: int
    total: int
    nonzero: int
    pruned_by: PrunedBy = "zeros"
    units: tuple[int, int] | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of the layer's weights that was removed."""
        return 1.0 - self.kept / self.total if self.total else 0.0


@dataclass(frozen=True)
class PruneResult:
    """The result of a pruning: its masks, and the counts of each layer; print it for a table.

    Attributes:
        masks: the `Masks`, layer name -> mask.
        layers: one row per layer, in the order of the network.
        criterion: the name of the criterion.
        left_dense: layers that were left dense by default -> the reason ("embedding", "tied to an
            embedding", "output head", "all zero" or why the structure does not fit).
        parameters: the number of all parameters of the model.
        unreached: names of weights that the example inputs do not reach: they stay dense.
        families: for a structure across layers, how many units of each family are kept.
        fixed: for a structure across layers, the channels that cannot be removed, and why.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> result = lap_ext.prune(net, torch.ones(1, 4), 0.75)
        >>> result.kept, result.total, result.sparsity, result.masks
        (2, 8, 0.75, Masks(1 layer, 2 of 8 weights kept, sparsity 0.75))
    """

    masks: Masks
    layers: Sequence[LayerResult]
    criterion: str
    left_dense: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    parameters: int = field(kw_only=True)
    unreached: Sequence[str] = field(default=(), kw_only=True)
    families: Sequence[FamilyResult] = field(default=(), kw_only=True)
    fixed: Sequence[Fixed] = field(default=(), kw_only=True)

    @property
    def structure(self) -> str | None:
        """What was removed together, as in `Masks.structure`; None for single weights."""
        return self.masks.structure

    @property
    def units(self) -> dict[str, tuple[int, int]]:
        """Layer name -> how many units of the structure are kept, and how many there are."""
        return {row.name: row.units for row in self.layers if row.units is not None}

    @property
    def kept(self) -> int:
        """The number of weights kept in all pruned layers."""
        return sum(row.kept for row in self.layers)

    @property
    def total(self) -> int:
        """The number of weights in all pruned layers."""
        return sum(row.total for row in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights in all pruned layers that was removed."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    @property
    def nonzero(self) -> int:
        """The number of weights kept in all pruned layers that are not zero."""
        return sum(row.nonzero for row in self.layers)

    @property
    def empty_layers(self) -> list[str]:
        """The names of pruned layers that have weights and keep none: nothing passes them."""
        return [row.name for row in self.layers if row.total and not row.kept]

    def notes(self) -> list[str]:
        r"""Says in a sentence each what the table does not show: empty layers, layers left dense.

        Example:
            >>> import torch, lap_ext
            >>> net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
            >>> result = lap_ext.prune(net, torch.ones(1, dtype=torch.int64), 0.75)
            >>> print("\n".join(result.notes()))
            Left dense: '0' (embedding). Name them with layers to prune them.
            Of all 46 parameters of the model, 13.04% were removed.
        """
        notes = []
        if self.empty_layers:
            names = some(map(repr, self.empty_layers), _LISTED)
            notes.append(f"EMPTY: {len(self.empty_layers)} layers keep no weight: {names}.")
        if self.nonzero != self.kept:
            notes.append(f"Of the weights kept, {self.nonzero:,} are not zero.")
        if masked := [repr(row.name) for row in self.layers if row.pruned_by == "mask"]:
            notes.append(f"Computed weights, multiplied by a mask: {some(masked, _LISTED)}.")
        if self.left_dense:
            notes.append(sentence(self.left_dense))
        notes += fixed_notes(self.fixed)
        if self.unreached:
            names = some(map(repr, self.unreached), _LISTED)
            notes.append(f"Not reached by the example inputs, so dense: {names}.")
        if self.left_dense or self.unreached:
            removed = (self.total - self.kept) / max(1, self.parameters)
            notes.append(
                f"Of all {self.parameters:,} parameters of the model, {removed:.2%} were removed."
            )
        return notes

    def warn_if_empty(self, known: Sequence[str] = ()) -> None:
        """Warns of layers that keep no weight, unless all of them are known already.

        Those of an expert that goes are meant to.
        """
        if self.structure == "expert" or set(self.empty_layers) <= set(known):
            return
        names, count = some(map(repr, self.empty_layers), _LISTED), len(self.empty_layers)
        warn(
            f"{count} of {len(self.layers)} layers keep no weight: {names}. The model may not work "
            "any more. Give {min_keep=}, a lower sparsity or {normalize='lamp'}."
        )

    @calling("PruneResult.apply")
    def apply(self, model: Module) -> None:
        """Sets the pruned weights to zero in the model that was scored, or in a copy of it.

        Raises:
            ValueError: the model lacks a layer, or a layer has another shape; nothing is
                changed.

        Example:
            >>> import torch, lap_ext
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
            >>> result = lap_ext.prune(net, torch.ones(1, 4), 0.75, apply=False)
            >>> before = lap_ext.sparsity(net)
            >>> result.apply(net)
            >>> before, lap_ext.sparsity(net)
            (0.0, 0.75)
        """
        self.masks.apply(model)

    def __str__(self) -> str:
        tables = [columns(self._rows(), right=_COUNTS)]
        if self.families:
            tables.append(columns(self._family_rows(), right=(1, 2, 3)))
        return "\n".join([*tables, *self.notes()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{in_html(note)}</p>" for note in self.notes())
        tables = html_table(self._rows(), right=_COUNTS)
        if self.families:
            tables += html_table(self._family_rows(), right=(1, 2, 3))
        return tables + notes

    def _family_rows(self) -> list[Sequence[str]]:
        """Builds the table of families: a header, one row each."""
        rows: list[Sequence[str]] = [(f"{self.structure}s of", "kept", "of", "removed")]
        for x in self.families:
            rows.append((x.name, f"{x.kept:,}", f"{x.total:,}", f"{x.sparsity:.2%}"))
        return rows

    def _rows(self) -> list[Sequence[str]]:
        """Builds the table: a header, one row per layer, the totals."""
        units = self.units
        head = ("layer", "kind", "shape", "kept", "total", "sparsity")
        rows: list[Sequence[str]] = [(*head, "units") if units else head]
        for row in self.layers:
            shape = "x".join(map(str, row.shape))
            counts = [f"{row.kept:,}", f"{row.total:,}", f"{row.sparsity:.2%}"]
            counts += [_of(*units[row.name]) if row.name in units else ""] if units else []
            rows.append((row.name, row.kind, shape, *counts))
        every = [f"{self.kept:,}", f"{self.total:,}", f"{self.sparsity:.2%}"]
        every += [_of(*map(sum, zip(*units.values(), strict=True)))] if units else []
        rows.append(("all", "", "", *every))
        return rows

    def __repr__(self) -> str:
        return (
            f"PruneResult({len(self.layers)} layers, {self.kept} of {self.total} weights kept, "
            f"criterion {self.criterion!r})"
        )

    def to_json(self) -> str:
        """Returns the table as JSON: the fields of the result, and a list of layers."""
        rows = [asdict(row) | {"sparsity": row.sparsity} for row in self.layers]
        names = {"criterion": self.criterion, "structure": self.structure}
        counts = {"sparsity": self.sparsity, "kept": self.kept, "nonzero": self.nonzero}
        counts["total"] = self.total
        outside = {
            "parameters": self.parameters,
            "empty_layers": self.empty_layers,
            "left_dense": dict(self.left_dense),
            "unreached": list(self.unreached),
        }
        across = {
            "families": [asdict(x) for x in self.families],
            "fixed": [x._asdict() for x in self.fixed],
        }
        return json.dumps(names | counts | outside | across | {"layers": rows}, indent=2)

    @calling("PruneResult.report")
    def report(
        self,
        path: str | os.PathLike[str],
        original: Original,
        example_inputs: Inputs | None = None,
        *,
        on_unsupported: OnUnsupported = "raise",
    ) -> None:
        """Writes an HTML page about the pruning: layers, distributions, dead channels, topology.

        Args:
            path: the page; a file of this name is replaced.
            original: the model with its weights before the pruning (a copy, if they were set to
                zero in it), or its topology.
            example_inputs: as in `lap_ext.prune`, unless original is a topology.
            on_unsupported: as in `lap_ext.prune`.

        Raises:
            ValueError: original is another model, or its pruned weights are zero already.
            TypeError, TopologyError: as `lap_ext.prune`.

        Example:
            >>> import tempfile, pathlib, torch, lap_ext
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
            >>> result = lap_ext.prune(net, torch.ones(1, 4), 0.75, apply=False)
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     page = pathlib.Path(directory) / "page.html"
            ...     result.report(page, net, torch.ones(1, 4))
            ...     page.read_text()[:15]
            '<!doctype html>'
        """
        from lap_ext.pruning.reporting import write_report

        write_report(path, self, original, example_inputs, on_unsupported)

    def plot(self) -> Any:
        """Draws each layer's sparsity and weights in a matplotlib figure, which a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from lap_ext.report import plots

        return plots.layers(self.layers)


def _of(kept: int, total: int) -> str:
    return f"{kept:,} of {total:,}"


def row_of(
    layer: Layer,
    mask: Tensor,
    nonzero: int,
    structure: Structure | None = None,
    units: tuple[int, int] | None = None,
) -> LayerResult:
    """Makes the row of a layer from its mask and the number of kept weights that are not zero.

    units: how many are kept, and all; None: they are counted.
    """
    kept = int(mask.count_nonzero())
    counts = kept, mask.numel(), nonzero
    units = units or units_kept(structure, layer, mask)
    return LayerResult(layer.name, layer.kind, layer.shape, *counts, layer.pruned_by, units)
