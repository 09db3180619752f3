# SPDX-License-Identifier: MIT
"""verify: a pruned checkpoint against its original, bit by bit, and the counts of its masks.

    kept      the bits of the original's weight
    pruned    +0.0, all bits zero
    others    tensors without a mask: the bits of the original
    counts    of the masks, as the pruning's own record has them (record.py)

Without a mask file every weight must be the original's or +0.0. Files are read in chunks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lap_ext import allocation
from lap_ext._text import columns, layer_name, parameter_in
from lap_ext.allocation import Sparsity, notation
from lap_ext.checkpoint import hf, record
from lap_ext.checkpoint.files import Entry, Folder, naming, open_path
from lap_ext.checkpoint.names import Names
from lap_ext.checkpoint.reading import CHUNK, Buffer, Source, bits
from lap_ext.masks import BitMasks
from lap_ext.ops import check
from lap_ext.progress import Progress, Step
from lap_ext.pruning.plan import SCOPES

_FUNCTION = "checkpoint.verify"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        tensor: where: a tensor, a layer, a file, or "all layers".
        problem: what is wrong, in words.
        count: how many weights, where it is about weights.
    """

    tensor: str
    problem: str
    count: int = 1


@dataclass(frozen=True)
class LayerCount:
    """How many weights of a layer are kept."""

    name: str
    kept: int
    total: int


@dataclass(frozen=True)
class Verdict:
    """What a comparison found; print it for a table.

    Attributes:
        findings: what is not as it should be; empty: all is well.
        layers: how many weights each layer keeps.
        tensors: how many were compared.
        masks: whether a mask file was there; without one, zeros were taken for pruned.
    """

    findings: Sequence[Finding]
    layers: Sequence[LayerCount]
    tensors: int
    masks: bool

    @property
    def ok(self) -> bool:
        """Whether there is no finding."""
        return not self.findings

    @property
    def kept(self) -> int:
        """Weights kept, of all layers."""
        return sum(row.kept for row in self.layers)

    @property
    def total(self) -> int:
        """Weights of all layers."""
        return sum(row.total for row in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights of these layers that was removed."""
        return _sparsity(self.kept, self.total)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "tensors": self.tensors,
            "masks": self.masks,
            "kept": self.kept,
            "total": self.total,
            "sparsity": self.sparsity,
            "layers": [asdict(row) for row in self.layers],
        }

    def __str__(self) -> str:
        rows = [("layer", "kept", "total", "sparsity")]
        for row in [*self.layers, LayerCount("all", self.kept, self.total)]:
            share = _sparsity(row.kept, row.total)
            rows.append((row.name, f"{row.kept:,}", f"{row.total:,}", f"{share:.2%}"))
        lines = [columns(rows, right=(1, 2, 3)), ""]
        lines += [f"{finding.tensor}: {finding.problem}" for finding in self.findings]
        how = "" if self.masks else " There is no mask file: zeros were taken for pruned."
        if self.findings:
            lines.append(f"{len(self.findings)} findings in {self.tensors} tensors.{how}")
        else:
            lines.append(
                f"{self.tensors} tensors compared: every kept weight has its original's bits, "
                f"every pruned one is zero.{how}"
            )
        return "\n".join(lines)


def _sparsity(kept: int, total: int) -> float:
    return 1 - kept / total if total else 0.0


def verify(
    pruned: str | os.PathLike[str],
    original: str | os.PathLike[str],
    *,
    sparsity: Sparsity | None = None,
    scope: str = "layer",
    on_progress: Callable[[Progress], Any] | None = None,
) -> Verdict:
    """Compares a pruned checkpoint with its original; both are only read, in chunks.

        kept weight     its original's bits
        pruned weight   +0.0

    Args:
        pruned: a checkpoint directory or a safetensors file, with the masks beside it in
            lap_ext_masks.safetensors. Without masks, zeros are taken for pruned weights.
        original: a checkpoint directory or a safetensors file.
        sparsity: as in `lap_ext.prune`, that the counts must meet. None: as the pruning has
            recorded it in lap_ext.json, if it has.
        scope: "layer" or "global", of the sparsity.
        on_progress: called with a `Progress` after each chunk.

    Returns:
        The verdict: `.ok`, `.findings`; print it for a table.

    Raises:
        ValueError: a file is missing, damaged or of something else; a sparsity that does not fit
            the layers.
        TypeError: sparsity is no sparsity.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as place:
        ...     files = Path(place) / "pruned.safetensors", Path(place) / "dense.safetensors"
        ...     save_file({"fc.weight": torch.tensor([[0., 2.], [0., 5.]])}, files[0])
        ...     save_file({"fc.weight": torch.tensor([[1., 2.], [3., 4.]])}, files[1])
        ...     verdict = verify(*files, sparsity=0.5)
        >>> verdict.ok, verdict.kept, verdict.findings[0].problem
        (False, 2, '1 elements differ from the original')
    """
    check.one_of(_FUNCTION, "scope", scope, SCOPES)
    if sparsity is not None:
        allocation.of(sparsity, _FUNCTION)  # a mistake here costs nothing yet
    wanted = None if sparsity is None else (sparsity, scope)
    with naming(_FUNCTION), ExitStack() as stack:
        after, before = open_path(Path(pruned)), open_path(Path(original))
        masks = None
        if after.masks is not None:
            masks = stack.enter_context(BitMasks(after.masks, _FUNCTION))
        return _Comparison(after, before, masks).run(wanted, on_progress)


class _Comparison:
    """A pruned checkpoint, its original, and what is found between them."""

    def __init__(self, after: Folder, before: Folder, masks: BitMasks | None) -> None:
        self.after, self.before, self.masks = after, before, masks
        self.findings: list[Finding] = []
        self.layers: list[LayerCount] = []
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the layers
        self._sources = Source(after.path), Source(before.path)
        self._buffers = Buffer(), Buffer()
        self._places = {} if masks is None else self._layers_of(masks)

    def run(
        self,
        wanted: tuple[Sparsity, str] | None,
        on_progress: Callable[[Progress], Any] | None,
    ) -> Verdict:
        """Compares everything; wanted: a sparsity and its scope, None: as it is recorded."""
        both = list(self._both())
        step = Step(on_progress, "verify", sum(old.size for _, old in both))
        for new, old in both:
            self._compare(new, old, step)
        if self.masks is not None:
            self._count(self.masks)
        self._check_record(wanted)
        return Verdict(self.findings, self.layers, len(both), self.masks is not None)

    def _find(self, tensor: str, problem: str, count: int = 1) -> None:
        self.findings.append(Finding(tensor, problem, count))

    def _both(self) -> Iterator[tuple[Entry, Entry]]:
        """Tensors that both have, of the same shape and dtype."""
        new, old = self.after.entries, self.before.entries
        for name in sorted(old.keys() ^ new.keys()):
            self._find(
                name,
                "the pruned checkpoint lacks it"
                if name in old
                else "the original does not have it",
            )
        for name, entry in old.items():
            if name not in new:
                continue
            mine = new[name]
            if (mine.dtype, mine.shape) != (entry.dtype, entry.shape):
                theirs = f"{entry.dtype} {list(entry.shape)}"
                self._find(name, f"{mine.dtype} {list(mine.shape)}, in the original {theirs}")
            else:
                yield mine, entry

    def _layers_of(self, masks: BitMasks) -> Mapping[str, tuple[str, int]]:
        """Tensor name -> its layer, and the first of the layer's weights that it holds."""
        entries, found, other = self.before.entries, {}, []
        for layer in masks.shapes:
            parameter = parameter_in(layer, entries)
            if parameter in entries and entries[parameter].shape == masks.shapes[layer]:
                found[parameter] = (layer, 0)
            else:
                other.append(layer)
        if (self.before.path / "config.json").is_file():  # the model knows other names, tied copies
            try:
                found.update(_by_model(self.before, masks))
                other = [layer for layer in other if layer not in {x for x, _ in found.values()}]
            except (ValueError, ModuleNotFoundError):
                if other:
                    raise
        for layer in other:
            self._find(layer, "a mask for a tensor that the original does not have")
        return found

    def _compare(self, new: Entry, old: Entry, step: Step) -> None:
        """Compares one tensor."""
        place = self._places.get(old.name)
        changed = lost = alive = zeroed = 0
        pairs = zip(
            bits(self._sources[0], new, self._buffers[0]),
            bits(self._sources[1], old, self._buffers[1]),
            strict=True,
        )
        for (first, mine), (_, theirs) in pairs:
            same = mine == theirs
            if self.masks is not None and place is not None:
                layer, begin = place
                kept = self.masks.part(layer, begin + first, mine.numel())
                wrong = ~same & kept
                changed += int(wrong.count_nonzero())
                lost += int((wrong & (mine == 0)).count_nonzero())
                alive += int(((mine != 0) & ~kept).count_nonzero())
            elif self.masks is not None:
                changed += int((~same).count_nonzero())
            else:
                zero = mine == 0
                zeroed += int(zero.count_nonzero())
                changed += int((~same & ~zero).count_nonzero())
            step.read(new.name, mine.nbytes)
        if changed:
            what = "kept weights" if place else "elements"
            also = f" ({lost} of them zero)" if lost else ""
            self._find(new.name, f"{changed} {what} differ from the original{also}", changed)
        if alive:
            self._find(new.name, f"{alive} pruned weights are not zero", alive)
        if self.masks is None and zeroed and len(new.shape) > 1:
            self._keeps(layer_name(new.name), new.shape, new.numel - zeroed)

    def _count(self, masks: BitMasks) -> None:
        """Counts how many weights each mask keeps."""
        for name, shape in masks.shapes.items():
            total = math.prod(shape)
            parts = (masks.part(name, at, min(CHUNK, total - at)) for at in range(0, total, CHUNK))
            self._keeps(name, shape, sum(int(part.count_nonzero()) for part in parts))

    def _keeps(self, name: str, shape: tuple[int, ...], kept: int) -> None:
        self.shapes[name] = shape
        self.layers.append(LayerCount(name, kept, math.prod(shape)))

    def _check_record(self, wanted: tuple[Sparsity, str] | None) -> None:
        """Checks the counts that are recorded, and those that the sparsity asks for."""
        try:
            recorded = record.read(self.after.path)
            if recorded is not None and wanted is None:
                wanted = recorded.wanted()
        except ValueError:
            self._find(record.RECORD, "it is damaged")
            return
        if recorded is not None:
            found = {row.name: (row.kept, row.total) for row in self.layers}
            counts = recorded.counts
            for name in sorted(counts.keys() | found.keys()):
                if counts.get(name) != found.get(name):
                    pair = f"{found.get(name)} in the masks, {counts.get(name)} recorded"
                    self._find(name, f"(kept, total) is {pair}")
        if wanted is not None:
            self._check_sparsity(*wanted)

    def _check_sparsity(self, sparsity: Sparsity, scope: str) -> None:
        """Checks the counts that a sparsity asks for, of each layer or of all."""
        given = allocation.of(sparsity, _FUNCTION)
        asked = f"a sparsity of {notation.text_of(sparsity)} keeps"
        if scope == "global":
            kept, keep = sum(row.kept for row in self.layers), allocation.total(given, self.shapes)
            if keep != kept:
                self._find("all layers", f"{kept} weights are kept, {asked} {keep}")
            return
        keeps = given.keeps(self.shapes)
        for row in self.layers:
            keep = keeps.get(row.name, row.kept)
            if keep != row.kept:
                self._find(row.name, f"{row.kept} weights are kept, {asked} {keep}")


def _by_model(folder: Folder, masks: BitMasks) -> dict[str, tuple[str, int]]:
    """Tensor name -> layer and first weight, by the model of config.json.

    It knows names that transformers changes, and tied copies.
    """
    model = hf.build(folder.path)
    names, known = Names(folder, model), dict(model.named_parameters())
    found = {}
    for layer in masks.shapes:
        parameter = parameter_in(layer, known)
        if parameter in known:
            pieces = [piece for copy in names.copies(parameter) for piece in copy]
            found.update({piece.entry.name: (layer, piece.begin) for piece in pieces})
    return found
