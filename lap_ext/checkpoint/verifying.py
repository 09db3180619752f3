# SPDX-License-Identifier: MIT
"""Compares a pruned checkpoint with its original bit by bit, and counts its masks.

    kept      the bits of the original's weight
    pruned    +0.0, all bits zero
    others    tensors without a mask: the bits of the original
    counts    kept weights of each mask: as in the pruning's record (record.py); with a structure,
              at most as many as the sparsity keeps, since units are kept as a whole; not with
              units across layers, of which it counts the units
    files     all other files of the original: the same bytes

Without a mask file, every weight must have the original's bits or be +0.0, and some must be zero
that are not in the original. Files are read in chunks. A tensor's mask is found by its name; only
where that is not enough is the model of config.json built, which takes seconds. How tensors are
spread over files, and thus the index, may differ. A directory that has nothing but weights, masks
and record is the output of a factory's model: other files are not demanded of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from lap_ext import allocation
from lap_ext._text import (
    columns,
    html_table,
    in_html,
    layer_name,
    parameter_in,
    visible,
)
from lap_ext.allocation import Sparsity, notation
from lap_ext.checkpoint import hf, inside, record
from lap_ext.checkpoint.differences import Differences
from lap_ext.checkpoint.files import Checkpoint, Entry, open_path
from lap_ext.checkpoint.names import untied
from lap_ext.checkpoint.reading import CHUNK, Buffer, Source, bits
from lap_ext.errors import LapValueError, calling
from lap_ext.masks import BitMasks
from lap_ext.options import SCOPES, MinKeep, Scope, one_of
from lap_ext.progress import Progress, Step
from lap_ext.structures import KINDS

_NUMBERS = (1, 2, 3)  # columns of numbers
_OTHER_BYTES = "its bytes are not those of the original"
_DAMAGED = "it is damaged"
_ALL = "all layers"


Wanted: TypeAlias = tuple[Sparsity, Scope, MinKeep]  # what counts must match


@dataclass(frozen=True)
class Finding:
    """A difference between a pruned checkpoint and what it should be.

    Attributes:
        tensor: where the difference is: a tensor, a layer, a file, or "all layers".
        problem: the difference, in words.
        count: how many weights differ, if the difference is about weights.
    """

    tensor: str
    problem: str
    count: int = 1


@dataclass(frozen=True)
class LayerCount:
    """The number of weights of a layer that are kept."""

    name: str
    kept: int
    total: int


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison; print it for a table.

    Attributes:
        findings: the differences; empty if there are none.
        layers: how many weights each layer keeps.
        tensors: how many tensors were compared.
        masks: whether there was a mask file; without one, zeros counted as pruned weights.
        files: how many other files of the original were demanded.
        unpruned: whether no weight is zero that is not zero in the original; without masks, that is
            a finding.
        structure: what was removed together, as the masks say; None for single weights.
    """

    findings: Sequence[Finding]
    layers: Sequence[LayerCount]
    tensors: int
    masks: bool
    files: int = 0
    unpruned: bool = False
    structure: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the comparison found no difference."""
        return not self.findings

    @property
    def kept(self) -> int:
        """The number of weights kept in all layers."""
        return sum(row.kept for row in self.layers)

    @property
    def total(self) -> int:
        """The number of weights in all layers."""
        return sum(row.total for row in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights in all layers that was removed."""
        return _sparsity(self.kept, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a dict for JSON."""
        return {
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "tensors": self.tensors,
            "masks": self.masks,
            "structure": self.structure,
            "files": self.files,
            "unpruned": self.unpruned,
            "kept": self.kept,
            "total": self.total,
            "sparsity": self.sparsity,
            "layers": [asdict(row) for row in self.layers],
        }

    def summary(self) -> str:
        """Says in one line what was found."""
        if self.ok:
            so_what = "; nothing is pruned" if self.unpruned else ""
            return f"ok: {self.tensors} tensors compared, sparsity {self.sparsity:.2%}{so_what}"
        first, more = self.findings[0], len(self.findings) - 1
        others = f"; {more} more findings" if more else ""
        return visible(f"{first.tensor}: {first.problem}{others}")

    def __str__(self) -> str:
        return "\n".join([columns(self._rows(), right=_NUMBERS), "", *self._notes()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{in_html(note)}</p>" for note in self._notes())
        return html_table(self._rows(), right=_NUMBERS) + notes

    def _rows(self) -> list[Sequence[str]]:
        """Makes the table: a head, a row a layer, the sums."""
        rows: list[Sequence[str]] = [("layer", "kept", "total", "sparsity")]
        for row in [*self.layers, LayerCount("all", self.kept, self.total)]:
            share = _sparsity(row.kept, row.total)
            rows.append((row.name, f"{row.kept:,}", f"{row.total:,}", f"{share:.2%}"))
        return rows

    def _notes(self) -> list[str]:
        """Lists the findings, and says how many there are."""
        notes = [visible(f"{finding.tensor}: {finding.problem}") for finding in self.findings]
        how = "" if self.masks else " There is no mask file: zeros were taken for pruned."
        if self.structure is not None:
            how = f" The masks are of structure {self.structure}."
        if self.findings:
            return [*notes, f"{len(self.findings)} findings in {self.tensors} tensors.{how}"]
        same = f" {self.files} other files are the same." if self.files else ""
        if self.unpruned:
            notes = ["Nothing is pruned: no weight is zero that is not zero in the original."]
        return [
            *notes,
            f"{self.tensors} tensors compared: every kept weight has its original's bits, "
            f"every pruned one is zero.{same}{how}",
        ]


def _sparsity(kept: int, total: int) -> float:
    return 1 - kept / total if total else 0.0


@calling("checkpoint.verify")
def verify(
    pruned: str | os.PathLike[str],
    original: str | os.PathLike[str],
    *,
    sparsity: Sparsity | None = None,
    scope: Scope = "layer",
    on_progress: Callable[[Progress], Any] | None = None,
) -> Verdict:
    """Compares a pruned checkpoint with its original; reads both in chunks and changes neither.

        kept weight     its original's bits
        pruned weight   +0.0
        other files     the bytes of the original

    Other files are compared where both are directories and the pruned one has any: a config or a
    tokenizer that was changed or is gone is a finding. What the pruned directory has besides is
    not.

    Args:
        pruned: a checkpoint directory or a safetensors file, with the masks beside it in
            lap_ext_masks.safetensors. Without masks, weights that are zero count as pruned.
        original: a checkpoint directory or a safetensors file.
        sparsity: the sparsity that the counts must meet, as in `lap_ext.prune`; not with units
            across layers. With None, it is the one that the pruning recorded in lap_ext.json, if
            any.
        scope: "layer" or "global": the scope in which the counts must meet the sparsity.
        on_progress: called with a `Progress` after each chunk.

    Returns:
        The verdict: `.ok`, `.findings`; print it for a table.

    Raises:
        ValueError: a file is missing, damaged or of another kind, or the sparsity does not fit the
            layers.
        TypeError: sparsity is not a number, a dict or an allocation.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as root:
        ...     files = Path(root) / "pruned.safetensors", Path(root) / "dense.safetensors"
        ...     save_file({"fc.weight": torch.tensor([[0., 2.], [0., 5.]])}, files[0])
        ...     save_file({"fc.weight": torch.tensor([[1., 2.], [3., 4.]])}, files[1])
        ...     verdict = verify(*files, sparsity=0.5)
        >>> verdict.ok, verdict.kept, verdict.findings[0].problem
        (False, 2, '1 elements differ from the original')
    """
    one_of("scope", scope, SCOPES)
    if sparsity is not None:
        allocation.of(sparsity)  # a mistake here costs nothing yet
    wanted = None if sparsity is None else (sparsity, scope, None)
    with ExitStack() as stack:
        after, before = open_path(Path(pruned)), open_path(Path(original))
        masks = None
        if after.masks is not None:
            masks = stack.enter_context(BitMasks(after.masks))
        comparison = _Comparison(after, before, masks)
        if wanted is not None and comparison.is_coupled:
            raise LapValueError(
                f"no {{argument}} for masks of structure {comparison.structure!r} (it would be a "
                "fraction of units, of which nobody knows here what they are)",
                notation.text_of(wanted[0]),
                argument="sparsity",
            )
        if Path(pruned).is_dir() and Path(original).is_dir():
            comparison.demand_others()
        return comparison.run(wanted, on_progress)


class _Comparison:
    """A pruned checkpoint, its original, and the differences so far."""

    def __init__(self, after: Checkpoint, before: Checkpoint, masks: BitMasks | None) -> None:
        self.after, self.before, self.masks = after, before, masks
        self.findings: list[Finding] = []
        self.layers: list[LayerCount] = []
        self.structure = None if masks is None else masks.structure
        self.units: Mapping[str, tuple[int, int]] = {}  # as recorded
        self.vectors: dict[str, tuple[int, int]] = {}  # counts of biases, norms and the like
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the layers
        self.zeros: dict[tuple[str, int], int] = {}  # layer, first element -> zeros before
        self.others: list[Path] = []  # files of the original that the pruned one must have
        self._sources = Source(after), Source(before)
        self._buffers = Buffer(), Buffer()
        self._sums = Differences()
        self._may_ask = (before.path / "config.json").is_file()
        self._locations = {} if masks is None else self._layers_of(masks)

    def run(
        self,
        wanted: Wanted | None,
        on_progress: Callable[[Progress], Any] | None,
    ) -> Verdict:
        """Compares everything; wanted: a sparsity, its scope and floors; None: as recorded."""
        both = list(self._both())
        files = list(self._both_files())
        sizes = [old.size for _, old in both] + [old.stat().st_size for _, _, old in files]
        step = Step(on_progress, "verify", sum(sizes))
        for new, old in both:
            self._compare(new, old, step)
        for name, mine, theirs in files:
            self._compare_files(name, mine, theirs, step)
        if self.masks is not None:
            self._count(self.masks)
        self._check_pair()
        self._check_record(wanted)
        masked, others = self.masks is not None, len(self.others)
        unpruned = not self._sums.gone
        facts = self.findings, self.layers, len(both), masked, others, unpruned
        return Verdict(*facts, self.structure)

    def demand_others(self) -> None:
        """Demands the other files of the original, unless the pruned one has weights alone."""
        if any(_others(self.after)):
            self.others = list(_others(self.before))

    def _find(self, tensor: str, problem: str, count: int = 1) -> None:
        self.findings.append(Finding(tensor, problem, count))

    def _both(self) -> Iterator[tuple[Entry, Entry]]:
        """Gives the tensors that both have, of the same shape and dtype."""
        new, old = self.after.entries, self.before.entries
        for name in sorted(old.keys() ^ new.keys()):
            missing = "the pruned checkpoint lacks it"
            self._find(name, missing if name in old else "the original does not have it")
        for name, entry in old.items():
            if name not in new:
                continue
            mine = new[name]
            if (mine.dtype, mine.shape) != (entry.dtype, entry.shape):
                theirs = f"{entry.dtype} {list(entry.shape)}"
                self._find(name, f"{mine.dtype} {list(mine.shape)}, in the original {theirs}")
            else:
                yield mine, entry

    def _both_files(self) -> Iterator[tuple[str, Path, Path]]:
        """Gives the name and the real paths of the other files that both have, of the same size."""
        mine = set(_others(self.after))
        for inner in self.others:
            if inner not in mine:
                self._find(str(inner), "the pruned checkpoint lacks it")
                continue
            new, old = (inside.real(x.path, inner) for x in (self.after, self.before))
            if new.stat().st_size != old.stat().st_size:
                self._find(str(inner), _OTHER_BYTES)
            else:
                yield str(inner), new, old

    def _compare_files(self, name: str, mine: Path, theirs: Path, step: Step) -> None:
        """Compares the bytes of two files of the same size."""
        same = True
        with inside.opened(mine) as new, inside.opened(theirs) as old:
            while data := old.read(CHUNK):
                same = new.read(CHUNK) == data and same
                step.read(name, len(data))
        if not same:
            self._find(name, _OTHER_BYTES)

    def _layers_of(self, masks: BitMasks) -> dict[str, tuple[str, int]]:
        """Maps tensors to their layer and the index of the first of its weights that they hold."""
        entries, other = self.before.entries, []
        locations: dict[str, tuple[str, int]] = {}
        for layer in masks.shapes:
            parameter = parameter_in(layer, entries)
            if parameter in entries and entries[parameter].shape == masks.shapes[layer]:
                locations[parameter] = (layer, 0)
            else:
                other.append(layer)
        if other and self._may_ask:  # transformers has renamed it, or joined it from slices
            locations = self._by_model(masks) | locations
            located = {layer for layer, _ in locations.values()}
            other = [layer for layer in other if layer not in located]
        for layer in other:
            self._find(layer, "a mask for a tensor that the original does not have")
        return locations

    def _by_model(self, masks: BitMasks) -> dict[str, tuple[str, int]]:
        """Maps tensors to layers by the model of config.json, which knows other names, tied copies.

        It is asked once.
        """
        self._may_ask = False
        model = hf.build(self.before)
        names, known = untied(self.before, model), dict(model.named_parameters())
        locations = {}
        for layer in masks.shapes:
            parameter = parameter_in(layer, known)
            if parameter in known:
                slices = [x for copy in names.copies(parameter) for x in copy]
                locations.update({x.entry.name: (layer, x.begin) for x in slices})
        return locations

    def _is_copy(self, name: str) -> bool:
        """Tells whether a tensor without a mask of its own is a tied copy of one that has one."""
        if self.masks is not None and self._may_ask:
            with suppress(ValueError, ModuleNotFoundError):  # no model: then nothing is tied
                self._locations = self._by_model(self.masks) | self._locations
        return name in self._locations

    def _compare(self, new: Entry, old: Entry, step: Step) -> None:
        """Compares one tensor."""
        counts = self._counted(new, old, step)
        if counts.changed and old.name not in self._locations and self._is_copy(old.name):
            counts = self._counted(new, old, None)
        if counts.changed:
            what = "kept weights" if old.name in self._locations else "elements"
            also = f" ({counts.lost} of them zero)" if counts.lost else ""
            problem = f"{counts.changed} {what} differ from the original{also}"
            self._find(new.name, problem, counts.changed)
        if counts.alive:
            self._find(new.name, f"{counts.alive} pruned weights are not zero", counts.alive)
        if self.masks is None and counts.zeros and len(new.shape) > 1:
            self._keeps(layer_name(new.name), new.shape, new.numel - counts.zeros)
        self._sums.add(counts)

    def _counted(self, new: Entry, old: Entry, step: Step | None) -> Differences:
        """Counts how the weights of a tensor differ, in chunks."""
        location, counts = self._locations.get(old.name), Differences()
        pairs = zip(
            bits(self._sources[0], new, self._buffers[0]),
            bits(self._sources[1], old, self._buffers[1]),
            strict=True,
        )
        for (first, mine), (_, theirs) in pairs:
            kept = None
            if self.masks is not None and location is not None:
                layer, begin = location
                kept = self.masks.chunk(layer, begin + first, mine.numel())
                self._note_zeros(layer, begin + first, theirs)
            elif self.masks is None:
                kept = mine != 0
                self._note_zeros(layer_name(new.name), first, theirs)
            counts.count(mine, theirs, kept, is_matrix=len(old.shape) > 1)
            if step is not None:
                step.read(new.name, mine.nbytes)
        return counts

    def _note_zeros(self, layer: str, first: int, theirs: Tensor) -> None:
        """Counts the zeros of the original, of either sign: no pruning keeps them."""
        self.zeros[layer, first] = theirs.numel() - int((theirs << 1).count_nonzero())

    @property
    def is_coupled(self) -> bool:
        """Whether units across layers were removed."""
        return self.structure in KINDS

    def _count(self, masks: BitMasks) -> None:
        """Counts how many weights each mask keeps."""
        vectors: Mapping[str, object] = {}
        with suppress(ValueError):  # a damaged record is found later
            recorded = record.read(self.after.path) if self.is_coupled else None
            vectors = {} if recorded is None else recorded.vectors
        for name, shape in masks.shapes.items():
            total = math.prod(shape)
            firsts = range(0, total, CHUNK)
            chunks = (masks.chunk(name, first, min(CHUNK, total - first)) for first in firsts)
            kept = sum(int(chunk.count_nonzero()) for chunk in chunks)
            if name in vectors or (self.is_coupled and len(shape) < 2):
                self.vectors[name] = kept, total
            else:
                self._keeps(name, shape, kept)

    def _check_pair(self) -> None:
        """Finds two that are in the wrong order, and a checkpoint of which nothing is pruned."""
        sums = self._sums
        if 0 < sums.revived == sums.changed + sums.alive and not sums.gone:
            wrong_way = (
                "every difference is a weight that is zero in the original: are the two in the "
                "wrong order? The pruned one comes first"
            )
            self.findings.insert(0, Finding(_ALL, wrong_way, sums.revived))
        elif self.masks is None and not sums.gone and not self.findings:
            self._find(_ALL, "nothing is pruned: the two have the same weights")

    def _keeps(self, name: str, shape: tuple[int, ...], kept: int) -> None:
        self.shapes[name] = shape
        self.layers.append(LayerCount(name, kept, math.prod(shape)))

    def _check_record(self, wanted: Wanted | None) -> None:
        """Checks the counts against those that are recorded, and those of the sparsity."""
        given = wanted is not None
        try:
            recorded = record.read(self.after.path)
            if recorded is not None:
                floors = recorded.min_keep()
                wanted = (*wanted[:2], floors) if wanted is not None else recorded.wanted()
        except ValueError:
            self._find(record.RECORD, _DAMAGED)
            return
        if recorded is not None:
            actual = {row.name: (row.kept, row.total) for row in self.layers}
            actual |= self.vectors
            self.units, counts = recorded.units, {**recorded.counts, **recorded.vectors}
            for name in sorted(counts.keys() | actual.keys()):
                if counts.get(name) != actual.get(name):
                    pair = f"{actual.get(name)} in the masks, {counts.get(name)} recorded"
                    self._find(name, f"(kept, total) is {pair}")
        if wanted is None:
            return
        try:
            self._check_sparsity(*wanted)
        except ValueError:
            if given:
                raise
            self._find(record.RECORD, _DAMAGED)  # its sparsity is not one of these layers

    def _check_sparsity(self, sparsity: Sparsity, scope: Scope, min_keep: MinKeep) -> None:
        """Checks the counts against those of a sparsity, of each layer or of all."""
        allocated = allocation.of(sparsity)
        if self.structure is not None:
            self._check_at_most(sparsity, scope, min_keep)
            return
        expected = f"a sparsity of {notation.text_of(sparsity)} keeps"
        if scope == "global":
            kept = sum(row.kept for row in self.layers)
            keep = min(allocation.total(allocated, self.shapes), sum(map(self._live, self.layers)))
            if keep != kept:
                self._find(_ALL, f"{kept} weights are kept, {expected} {keep}")
            return
        keeps = allocation.budget(allocated, self.shapes, min_keep).keeps
        for row in self.layers:
            keep = min(keeps.get(row.name, row.kept), self._live(row))
            if keep != row.kept:
                self._find(row.name, f"{row.kept} weights are kept, {expected} {keep}")

    def _check_at_most(self, sparsity: Sparsity, scope: Scope, min_keep: MinKeep) -> None:
        """Checks that no layer keeps more than fits; a single unit may be larger than that."""
        if scope == "global" or min_keep is not None:
            return  # floors are whole units, whose sizes nobody knows
        keeps = allocation.budget(allocation.of(sparsity), self.shapes, None).keeps
        for row in self.layers:
            keep, units = keeps.get(row.name, row.kept), self.units.get(row.name)
            single = ":" not in str(self.structure) if units is None else units[0] == 1
            if row.kept > keep and not single:
                text = f"a sparsity of {notation.text_of(sparsity)} keeps at most {keep}"
                self._find(row.name, f"{row.kept} weights are kept, {text}")

    def _live(self, row: LayerCount) -> int:
        """Counts the weights of a layer that are not zero in the original: no other is kept."""
        return row.total - sum(n for (name, _), n in self.zeros.items() if name == row.name)


def _others(checkpoint: Checkpoint) -> Iterator[Path]:
    """Lists the files that hold neither weights nor what lap_ext has written, relative."""
    return (x for x in checkpoint.others() if str(x) not in (record.RECORD, checkpoint.index))
