# SPDX-License-Identifier: MIT
"""A place for tests: a model's weights in chunks that are cut wherever a test says.

It is as hostile as the contract of `Place` allows. The memory of a chunk is overwritten with NaN as
soon as it need not be valid any longer, notes pass through JSON, and samples may mislead.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lap_ext import structures
from lap_ext.places import Chunk, readable
from lap_ext.places.place import row_length
from lap_ext.pruning import pipeline, selection
from lap_ext.pruning.matrices import rows_together
from lap_ext.pruning.plan import options_of, plan_of
from lap_ext.structures import Structure
from lap_ext.topology import Layer, Topology
from tests.helpers.checkpoints import bits

Cuts = Callable[[Layer], Iterable[int]]  # rows, of the longest kind, where something begins

_SAMPLE = 64 * 32  # weights: a ranking takes one of 32, and trusts some tens of them


def every_row(layer: Layer) -> Iterable[int]:
    """Cuts after each row."""
    return range(rows(layer))


def ragged(layer: Layer) -> Iterable[int]:
    """Cuts into chunks of 1, 2, 3, ... rows."""
    return [n * (n + 1) // 2 for n in range(rows(layer))]


def rows(layer: Layer) -> int:
    """Counts the rows that a chunk cannot divide."""
    return math.prod(layer.shape) // row_length(layer)


class Cut:
    """The place.

    Args:
        topology: of the model.
        cuts: where chunks begin.
        slices: where stored slices begin.
        fits: whether a layer can be one chunk too.
        pieces: how many scores are computed at a time.
        capacity: how many keys of a ranking may be held.
        sampled: for each layer the rows of a sample, over and over; None for no sample.
        masks: layer name -> mask of the weights that may be kept.
        structure: what the place is made for: chunks end between the rows that a pattern must see
            at once, counted from where a slice begins.
    """

    held = False

    def __init__(
        self,
        topology: Topology,
        cuts: Cuts = every_row,
        *,
        slices: Cuts = lambda _: [0],
        fits: bool = False,
        pieces: int = 1 << 30,
        capacity: int = 1000,
        sampled: Cuts | None = None,
        masks: Mapping[str, Tensor] | None = None,
        structure: str | Structure | None = None,
    ) -> None:
        self.topology, self.pieces = topology, pieces
        made_for = None if structure is None else structures.of(structure)
        self._together = rows_together(list(topology.layers.values()), made_for)
        self.sampled = 0 if sampled is None else 2
        self.masks = dict(masks or {})
        self._cuts, self._slices, self._rows = cuts, slices, sampled
        self._fits, self._capacity = fits, capacity
        self._ended: list[tuple[Tensor, Tensor]] = []  # chunks of calls that have ended, and copies
        self._notes: dict[str, str] = {}
        self._tensors: tuple[str, dict[str, Tensor]] = "", {}

    def dtype(self, layer: Layer) -> torch.dtype:
        return layer.weight.dtype

    def bytes(self, layer: Layer) -> int:
        return layer.weight.nbytes

    def starts(self, layer: Layer) -> Sequence[int]:
        return self._flat(layer, {0, *self._slices(layer)})[:-1] or [0]

    def _flat(self, layer: Layer, begins: Iterable[int]) -> list[int]:
        """Converts rows to flat indices, with the end."""
        length, count = row_length(layer), math.prod(layer.shape)
        inside = {row * length for row in begins if 0 <= row * length < count}
        return [*sorted(inside), count]

    def fits(self, layer: Layer, beside: int) -> bool:
        return self._fits

    def ordered(self, layers: Iterable[Layer]) -> list[Layer]:
        return sorted(layers, key=lambda layer: layer.name, reverse=True)

    def chunks(self, layer: Layer, whole: bool = False) -> Iterator[Chunk]:
        begins = [0] if whole else self._begins(layer)
        if whole and not self._fits:
            raise AssertionError(f"{layer.name} does not fit")
        bounds = list(pairwise(self._flat(layer, begins)))
        return self._given(layer, bounds or [(0, 0)] * whole)

    def _begins(self, layer: Layer) -> set[int]:
        """Finds the rows where chunks begin."""
        slices, count = {0, *self._slices(layer)}, self._together.get(layer.name, 1)
        first = [max(x for x in slices if x <= cut) for cut in self._cuts(layer)]
        cuts = zip(first, self._cuts(layer), strict=True)
        return slices | {begin + (cut - begin) // count * count for begin, cut in cuts}

    def _given(self, layer: Layer, bounds: Sequence[tuple[int, int]]) -> Iterator[Chunk]:
        """Gives chunks, and overwrites those that are not valid any longer."""
        flat = readable(layer).contiguous().flatten()
        while self._ended:
            _overwrite(*self._ended.pop())
        given: deque[tuple[Tensor, Tensor]] = deque()
        try:
            for begin, end in bounds:
                if len(given) == 2:
                    _overwrite(*given.popleft())
                weight = flat[begin:end].clone()
                given.append((weight, flat[begin:end].clone()))
                yield Chunk.of(layer, weight, begin)
        finally:
            self._ended += given

    def each(self, layers: Sequence[Layer], beside: int) -> Iterator[tuple[Layer, Iterator[Chunk]]]:
        for layer in layers:
            yield layer, self.chunks(layer, self.fits(layer, beside))

    def sample(self, layer: Layer, count: int) -> Iterator[Chunk]:
        length = row_length(layer)
        drawn = () if self._rows is None else self._rows(layer)
        bounds = [(row * length, (row + 1) * length) for row in drawn]
        bounds = [x for x in bounds if 0 <= x[0] and x[1] <= math.prod(layer.shape)]
        return self._given(layer, bounds * (_SAMPLE // (len(bounds) * length or 1) + 1))

    def mask(self, chunk: Chunk) -> Tensor | None:
        mask = self.masks.get(chunk.layer.name)
        return None if mask is None else chunk.cut_from(mask).clone()

    def live(self, chunk: Chunk) -> Tensor | None:
        mask, nonzero = self.mask(chunk), chunk.parameter != 0
        if mask is None:
            return None if nonzero.all() else nonzero
        return mask & nonzero

    def set_masks(self, layer: Layer, masks: Iterable[tuple[Chunk, Tensor]]) -> None:
        given, end = [], 0
        for chunk, mask in masks:
            assert chunk.first == end and mask.shape == chunk.weight.shape
            assert mask.dtype == torch.bool
            end += mask.numel()
            given.append(mask.flatten().clone())
        assert end == math.prod(layer.shape)
        self.masks[layer.name] = torch.cat(given or [torch.empty(0, dtype=torch.bool)]).reshape(
            layer.shape
        )

    def round(self, number: int, make: Callable[[], None]) -> None:
        make()

    def capacity(self, count: int) -> int:
        return self._capacity

    def noted(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._notes:
            self._notes[name] = json.dumps(make())
        return json.loads(self._notes[name])

    def noted_tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self._tensors[0] != name:
            self._tensors = name, {key: x.clone() for key, x in make().items()}
        return self._tensors[1]

    def total(self, counts: Tensor) -> Tensor:
        assert not counts.is_floating_point()
        return counts.clone()


def _overwrite(weight: Tensor, copy: Tensor) -> None:
    assert torch.equal(bits(weight), bits(copy)), "a chunk was written to"
    weight.fill_(math.nan)


def masks_of(
    place: Any, sparsity: Any, data: Path | None = None, **options: Any
) -> dict[str, Tensor]:
    """Prunes the layers of a place and returns their masks."""
    plan = plan_of(place.topology, options_of(options.pop("criterion", "lookahead"), **options))
    task = pipeline.begin(plan, place, sparsity, data, None)
    result = {}
    selected = pipeline.select(task)
    for layer in task.layers:
        full = selection.is_full(task.scoring, layer, selected[layer.name])
        pairs = selection.masked(
            task.scoring, layer, selected[layer.name], place.chunks(layer, full)
        )
        flat = [mask.flatten().clone() for _, mask in pairs]
        result[layer.name] = torch.cat(flat or [torch.empty(0, dtype=torch.bool)]).view(layer.shape)
    return result
