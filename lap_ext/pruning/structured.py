# SPDX-License-Identifier: MIT
"""Selects by structures, over any place: patterns in each chunk, and units by their worth.

A pattern is found where its weights are. The worth of units comes from one pass over the scores of
a layer; a layer that is one chunk is ranked and masked at once, others are masked when they are
read again. Where the place has masks, or weights are stored as zero, these count 0 and are not
kept; a unit without others is removed already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lap_ext.criteria import exact
from lap_ext.criteria.context import in_chunk
from lap_ext.errors import LapValueError, in_layer
from lap_ext.ops import partition, units
from lap_ext.ops.partition import GridUnits, Scored, Units
from lap_ext.ops.structured import pattern_mask
from lap_ext.ops.units import Ranked
from lap_ext.places import Chunk
from lap_ext.progress import Step
from lap_ext.pruning import normalization
from lap_ext.pruning.matrices import matrix_of
from lap_ext.pruning.noted import of_text, text_of
from lap_ext.pruning.scoring import BESIDE, Scorer, Scoring, stores_scores
from lap_ext.structures import NM, Groups, Partition, Structure
from lap_ext.topology import Layer

# so many units take the memory that a key may take; where units differ in size, they are sorted
_UNITS, _SORTED = 3, 1
_PER_UNIT = 24  # bytes of the sums, counts and worth of a unit


@dataclass(frozen=True)
class Pattern:
    """Each chunk is masked by a pattern."""

    pattern: NM


@dataclass(frozen=True)
class BestUnits:
    """The full layer is ranked and masked at once: its best units with at most keep weights.

    least: how many weights are kept at least, in whole units.
    """

    keep: int
    least: int


@dataclass(frozen=True)
class KeptUnits:
    """The units that are kept, bool [n]."""

    kept: Tensor


Structured: TypeAlias = Pattern | BestUnits | KeptUnits


def of_pattern(scoring: Scoring, layer: Layer, pattern: NM) -> Pattern:
    """Selects by a pattern.

    Raises:
        LapValueError: the layer must be one chunk, and does not fit.
    """
    selection, place = Pattern(pattern), scoring.place
    if is_full(scoring, layer, selection) and not place.fits(layer, beside(scoring, layer)):
        criterion = scoring.criterion(layer)
        needed = f"which criterion {criterion.name!r} needs"
        if not criterion.needs_full:
            needed = f"whose files part rows that {scoring.plan.options.structure} sees at once"
        raise LapValueError(
            f"room for a full layer, {needed}, in {{argument}}",
            f"a layer of {place.bytes(layer):,} bytes beside its scores",
            "Raise it.",
            layer=layer.name,
            argument="memory",
        )
    return selection


def of_layer(scoring: Scoring, layer: Layer, keep: int, least: int) -> Structured:
    """Selects the best units of a layer with at most keep weights, and at least so many."""
    if 0 in layer.shape:
        return KeptUnits(_noted(scoring, layer, _none(scoring, layer)))
    exactly = scoring.plan.options.aggregate == "exact"  # before a neighbor gets its mask
    if not exactly and scoring.place.fits(layer, beside(scoring, layer)):
        return BestUnits(keep, least)
    _require_room(scoring, [layer])
    ranked = _all_ranked(scoring, layer, least, scoring.step("rank", [layer]))
    return KeptUnits(_noted(scoring, layer, _best(scoring, ranked, keep)))


def of_all(
    scoring: Scoring, layers: Sequence[Layer], keep: int, least: Mapping[str, int], name: str
) -> dict[str, KeptUnits]:
    """Selects the best units of all layers with at most keep weights together.

    Args:
        scoring: gives the scores.
        layers: in the network's order.
        keep: how many weights to keep at most.
        least: layer name -> how many it keeps at least, in whole units.
        name: under which the place notes what is found.
    """

    def find() -> dict[str, str]:
        _require_room(scoring, layers)
        ranked, step = [], scoring.step("rank", layers)
        for layer in layers:
            own = _all_ranked(scoring, layer, least[layer.name], step)
            with in_layer(layer.name):
                how = scoring.plan.options.normalize
                worth = normalization.normalized(own.worth, how, own.live)
            ranked.append(Ranked(worth, own.sizes, own.live, own.least))
        options = scoring.plan.options
        floors = options.min_keep is not None
        every = units.best_of_all(ranked, keep, options.multiple_of, floors=floors)
        return {x.name: text_of(kept) for x, kept in zip(layers, every, strict=True)}

    empty, layers = [x for x in layers if 0 in x.shape], [x for x in layers if 0 not in x.shape]
    noted = scoring.place.noted(f"{name} units", find)
    result = {x.name: KeptUnits(_noted(scoring, x, _none(scoring, x))) for x in empty}
    for layer in layers:
        kept = of_text(noted[layer.name], units_of(scoring, layer).count)
        result[layer.name] = KeptUnits(_noted(scoring, layer, kept))
    return result


def mask(scoring: Scoring, layer: Layer, selection: Structured, chunk: Chunk) -> Tensor:
    """Masks a chunk of a layer, in its shape."""
    if not chunk.weight.numel():
        return torch.ones_like(chunk.weight, dtype=torch.bool)
    live = scoring.place.live(chunk)
    with in_chunk(chunk):
        if isinstance(selection, Pattern):
            return _pattern(scoring, layer, selection.pattern, chunk, live)
        part = units_of(scoring, layer, chunk.weight.device)
        if isinstance(selection, BestUnits):
            ranked = _ranked(scoring, layer, part, selection.least, [chunk])
            kept = _noted(scoring, layer, _best(scoring, ranked, selection.keep))
        else:
            kept = selection.kept
        shape = matrix_of(layer).shape[1:]
        length = max(torch.Size(shape).numel(), 1)
        rows = chunk.weight.numel() // length, *shape
        full = part.mask(kept.to(chunk.weight.device), rows, chunk.first // length)
        full = full.reshape(chunk.weight.shape)
        return full if live is None else full & live


def is_full(scoring: Scoring, layer: Layer, selection: Structured) -> bool:
    """Says whether a layer must be one chunk to be masked."""
    if isinstance(selection, KeptUnits):
        return False
    if isinstance(selection, BestUnits) or scoring.criterion(layer).needs_full:
        return True
    matrix = matrix_of(layer)
    rows = selection.pattern.rows_together(matrix) * max(matrix.cols * matrix.window, 1)
    return any(start % rows for start in scoring.place.starts(layer))


def beside(scoring: Scoring, layer: Layer) -> int:
    """Returns the bytes per weight beside a full layer that is masked at once."""
    structure, criterion = scoring.plan.options.structure, scoring.criterion(layer)
    exactly = scoring.plan.options.aggregate == "exact"
    if exactly or criterion.replaces or stores_scores(criterion, layer):
        return BESIDE
    matrix = matrix_of(layer)
    if isinstance(structure, Partition):
        count = structure.grid(matrix).count
        return 6 + -(-_PER_UNIT * count // max(matrix.numel, 1))  # 4: a mask in float32
    flat = isinstance(structure, NM) and structure.along(matrix) == "flat"
    whole = isinstance(structure, NM) and structure.transposable
    return BESIDE if isinstance(structure, Groups) or flat or whole else 2


def live_weights(scoring: Scoring, layer: Layer) -> int:
    """Counts the weights of the units of a layer that may be kept."""
    if 0 in layer.shape:
        return 0
    part = units_of(scoring, layer)
    alive = _Alive(part, layer)
    for chunk in scoring.place.chunks(layer):
        alive.add(chunk, scoring.place.live(chunk))
    live = alive.units()
    if live is None:
        return matrix_of(layer).numel
    return _weights_of(part, live)


def filled_pattern(layer: Layer, pattern: NM, kept: Tensor, may: Tensor) -> Tensor:
    """Keeps zero weights too: the first that may be kept, where a group has room for them."""
    matrix, shape = matrix_of(layer), kept.shape
    scores = Scored.of_scores(kept.reshape(matrix.shape).float())
    if pattern.transposable:  # what is kept counts more than all zeros together
        full = pattern_mask(scores, matrix, pattern, None).reshape(shape)
        return full & may if bool((full & kept == kept).all()) else kept
    return pattern_mask(scores, matrix, pattern, may.reshape(matrix.shape)).reshape(shape)


def filled_units(
    scoring: Scoring,
    layers: Sequence[Layer],
    kept: Mapping[str, Tensor],
    may: Mapping[str, Tensor],
    keep: int,
    least: Mapping[str, int],
) -> dict[str, Tensor]:
    """Keeps units of zero weights too, the first that may be kept, where all others fit.

    Args:
        scoring: cuts layers into units.
        layers: those that are ranked together.
        kept: layer name -> mask, of weights that are not zero.
        may: layer name -> mask of the weights that may be kept, zero or not.
        keep: how many weights the layers keep at most.
        least: layer name -> how many it keeps at least, in whole units.
    """
    parts, ranked, live = [], [], 0
    for layer in layers:
        part = units_of(scoring, layer, kept[layer.name].device)
        able = _with_any(part, layer, may[layer.name])
        alive = _with_any(part, layer, may[layer.name] & (layer.weight.detach() != 0))
        live += _weights_of(part, alive)
        parts.append(part)
        ranked.append(Ranked(alive.double(), part.sizes, able, least[layer.name]))
    multiple_of = scoring.plan.options.multiple_of
    every = [units.best(x, 0, multiple_of) for x in ranked]
    if live <= keep:
        every = units.best_of_all(ranked, keep, multiple_of)
    result = {}
    for layer, part, filling in zip(layers, parts, every, strict=True):
        allowed = may[layer.name]
        chosen = _with_any(part, layer, kept[layer.name])
        if live <= keep or not bool(chosen.any()):
            chosen = filling
        full = part.mask(chosen.to(allowed.device), tuple(matrix_of(layer).shape))
        result[layer.name] = full.reshape(allowed.shape) & allowed
    return result


def _with_any(part: Units, layer: Layer, mask: Tensor) -> Tensor:
    """Marks the units that have a weight in a mask."""
    counts = part.zeros()
    if not mask.numel():
        return counts > 0
    shape = matrix_of(layer).shape
    part.add(counts, Scored.of_scores(mask.reshape(shape).float()), None, "mean")
    return counts > 0


def _weights_of(part: Units, marked: Tensor) -> int:
    """Counts the weights of the units that are marked."""
    if isinstance(part.sizes, Tensor):
        return int(part.sizes[marked.cpu()].sum())
    return part.sizes * int(marked.count_nonzero())


def units_kept(structure: Structure | None, layer: Layer, mask: Tensor) -> tuple[int, int] | None:
    """Counts the units of a layer that a mask keeps, and all; None where there are none."""
    if not isinstance(structure, (Partition, Groups)):
        return None
    part = _cut(structure, layer, mask.device)
    return int(_with_any(part, layer, mask).count_nonzero()), part.count


def units_of(scoring: Scoring, layer: Layer, device: torch.device | None = None) -> Units:
    """Cuts a layer into units."""
    structure = scoring.plan.options.structure
    assert isinstance(structure, (Partition, Groups))
    if device is None:
        device = layer.weight.device if scoring.place.held else torch.device("cpu")
    key = layer.name, str(device)
    if key not in scoring.parts:
        scoring.parts.clear()  # the chunks of a layer come one after the other
        scoring.parts[key] = _cut(structure, layer, device)
    return scoring.parts[key]


def _cut(structure: Partition | Groups, layer: Layer, device: torch.device) -> Units:
    with in_layer(layer.name):
        return partition.units_of(structure, matrix_of(layer), layer.shape, device, layer.name)


def _require_room(scoring: Scoring, layers: Sequence[Layer]) -> None:
    """Raises unless the worth of the units of layers may be held."""
    if scoring.place.held:
        return
    count, sizes = 0, set()
    for layer in layers:
        part = units_of(scoring, layer)
        count += part.count
        sizes.add(part.sizes if isinstance(part.sizes, int) else 0)
    one_size = len(sizes) == 1 and 0 not in sizes
    sorts = not (one_size and scoring.plan.options.multiple_of == 1)
    if count > (_SORTED if sorts else _UNITS) * scoring.place.capacity(count):
        raise LapValueError(
            "room for the worth of all units in {argument}",
            f"{count:,} units of {len(layers)} layers",
            "Raise it, or choose larger units.",
            argument="memory",
        )


def _pattern(
    scoring: Scoring, layer: Layer, pattern: NM, chunk: Chunk, live: Tensor | None
) -> Tensor:
    """Masks a chunk by a pattern."""
    matrix, aggregate = matrix_of(layer), scoring.plan.options.aggregate
    pairs: Iterable[tuple[Scored, Tensor | None]] = _scored(scoring, layer, chunk, live)
    if pattern.along(matrix) == "flat":
        pairs = _joined(list(pairs), pattern.of)
    masks = [pattern_mask(x, matrix, pattern, alive, aggregate).flatten() for x, alive in pairs]
    return (masks[0] if len(masks) == 1 else torch.cat(masks)).reshape(chunk.weight.shape)


def _joined(
    pairs: list[tuple[Scored, Tensor | None]], of: int
) -> list[tuple[Scored, Tensor | None]]:
    """Joins ranges of rows if one ends within weights that a pattern sees at once.

    A range ends where a group of a convolution does.
    """
    if not any(scored.x.numel() % of for scored, _ in pairs):
        return pairs
    scores = torch.cat([scored.scores() for scored, _ in pairs])
    alive = [x for _, x in pairs if x is not None]
    return [(Scored.of_scores(scores, pairs[0][0].first), torch.cat(alive) if alive else None)]


def _scored(
    scoring: Scoring, layer: Layer, chunk: Chunk, live: Tensor | None
) -> Iterator[tuple[Scored, Tensor | None]]:
    """Gives the rows of a chunk to be scored, each with which of its weights may be kept."""
    shape = matrix_of(layer).shape[1:]
    rows = None if live is None else live.reshape(-1, *shape)
    begin = _first_row(chunk, shape)
    for scored in _scorer(scoring, layer).rows(chunk, shape):
        top = scored.first - begin
        yield scored, None if rows is None else rows[top : top + scored.x.shape[0]]


def _first_row(chunk: Chunk, shape: tuple[int, ...]) -> int:
    return chunk.first // max(torch.Size(shape).numel(), 1)


def _scorer(scoring: Scoring, layer: Layer) -> Scorer:
    """Prepares to score a layer; its own ranking does not depend on a common factor."""
    raw = scoring.plan.options.scope == "global"
    stored = stores_scores(scoring.criterion(layer), layer)  # each use would be scaled by itself
    return scoring.scorer(layer, "plain" if raw or stored else "scaled")


def _all_ranked(scoring: Scoring, layer: Layer, least: int, step: Step) -> Ranked:
    """Reads a layer and ranks its units."""
    _require_whole(scoring, layer)
    if scoring.plan.options.aggregate != "exact":
        chunks = scoring.chunks(layer, step)
        return _ranked(scoring, layer, units_of(scoring, layer), least, chunks)
    whole = scoring.place.chunks(layer, True)
    ranked = _ranked(scoring, layer, units_of(scoring, layer), least, whole)
    step.read(layer.name, scoring.place.bytes(layer))
    return ranked


def _ranked(
    scoring: Scoring, layer: Layer, part: Units, least: int, chunks: Iterable[Chunk]
) -> Ranked:
    """Computes the worth of a layer's units, in one pass over its chunks."""
    aggregate, sums, alive = scoring.plan.options.aggregate, part.zeros(), _Alive(part, layer)
    for chunk in chunks:
        live = scoring.place.live(chunk)
        if aggregate == "exact":
            worth = _distortions(scoring, layer, part, chunk, live)
            alive.add(chunk, live)
            return Ranked(worth, part.sizes, alive.units(), least)
        with in_chunk(chunk):
            for scored, which in _scored(scoring, layer, chunk, live):
                part.add(sums, scored, which, aggregate)
        alive.add(chunk, live)
    worth = units.worth_of(sums, part.sizes, aggregate)
    return Ranked(worth, part.sizes, alive.units(), least)


def _distortions(
    scoring: Scoring, layer: Layer, part: Units, chunk: Chunk, live: Tensor | None
) -> Tensor:
    """Computes how much the neighborhood of a full layer changes when each of its units goes."""
    shape = part.grid if isinstance(part, GridUnits) else part.numbers
    criterion = scoring.criterion(layer)
    found = exact.worths(scoring.network, criterion, layer, chunk.weight, shape, live).flatten()
    found = torch.cat([found, found.new_zeros(part.count - found.numel())])
    return found.to(part.zeros().device)


def _require_whole(scoring: Scoring, layer: Layer) -> None:
    """Raises where a worth needs a full layer for which there is no room."""
    options = scoring.plan.options
    if options.aggregate == "exact" and not scoring.place.fits(layer, BESIDE):
        raise LapValueError(
            "room for a full layer, which {aggregate='exact'} needs, in {argument}",
            f"a layer of {scoring.place.bytes(layer):,} bytes beside its scores",
            "Raise it, or choose another worth of units.",
            layer=layer.name,
            argument="memory",
        )


class _Alive:
    """Marks the units of a layer that have a weight that may be kept."""

    def __init__(self, part: Units, layer: Layer) -> None:
        self._part, self._shape = part, matrix_of(layer).shape[1:]
        self._counts: Tensor | None = None
        self._full: list[tuple[int, int]] = []  # rows all of whose weights may be kept

    def add(self, chunk: Chunk, live: Tensor | None) -> None:
        """Counts the weights of a chunk that may be kept; None: all."""
        first = _first_row(chunk, self._shape)
        if live is None:
            count = chunk.weight.numel() // max(torch.Size(self._shape).numel(), 1)
            self._full.append((first, count))
        else:
            self._count(live.reshape(-1, *self._shape).to(torch.float32), first)

    def _count(self, values: Tensor, first: int) -> None:
        self._counts = self._part.zeros() if self._counts is None else self._counts
        self._part.add(self._counts, Scored.of_scores(values, first), None, "mean")

    def units(self) -> Tensor | None:
        """Marks the units; None: all."""
        if self._counts is None:
            return None
        for first, count in self._full:
            self._count(torch.ones(count, *self._shape, device=self._counts.device), first)
        return self._counts > 0


def _best(scoring: Scoring, ranked: Ranked, keep: int) -> Tensor:
    return units.best(ranked, keep, scoring.plan.options.multiple_of)


def _noted(scoring: Scoring, layer: Layer, kept: Tensor) -> Tensor:
    """Notes how many units of a layer are kept, for the result."""
    scoring.units[layer.name] = int(kept.count_nonzero()), kept.numel()
    return kept


def _none(scoring: Scoring, layer: Layer) -> Tensor:
    """Keeps none of the units of a layer without weights."""
    return torch.zeros(units_of(scoring, layer).count, dtype=torch.bool)
