# SPDX-License-Identifier: MIT
"""How many weights each layer keeps in one ranking by LAMP scores that are never all in memory.

    lamp[j] = s[j]^2 / sum of s[m]^2 over m ranked at or above j          (selection.lamp)

Within a layer LAMP scores decrease as scores do, so each layer is read from its largest score
down: the keys of scores are sorted, a range of them at a time, and squares are added in that order,
one by one, as for a layer in memory, so that the bits are the same. A pass ends where LAMP scores
fall below the interval of the threshold search (ranking.py). The next pass, over a narrower
interval, begins at a position that an earlier one has recorded (a mark).

Each layer then keeps that many weights, ranked by their squares; of equal ones the lower index.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext import allocation
from lap_ext.checkpoint import ranking
from lap_ext.checkpoint.layer_scores import LayerScores
from lap_ext.checkpoint.passes import Task
from lap_ext.checkpoint.reading import Buffer
from lap_ext.errors import LapValueError
from lap_ext.ops.reference.common import score_dtype
from lap_ext.ops.reference.key import key_dtype
from lap_ext.topology import Layer

_BETWEEN = 1 << 18  # weights between two marks
# keys (about 2 %) by which the interval is extended on either side: sums of a sample are rough
_WIDER = 1 << 47
_TOP = ranking.largest(torch.float64)


def kept(
    task: Task, layers: Sequence[Layer], keep: int, floors: Mapping[str, int]
) -> dict[str, tuple[int, float]]:
    """Finds for each layer (how many weights it keeps of keep in all, its largest score)."""
    buffer = Buffer()
    walks = {layer.name: _Walk(task, layer, buffer) for layer in layers}
    counts: dict[str, int] = {}

    def rank(names: Sequence[str], keep: int) -> dict[str, int]:
        some = {name: walks[name] for name in names}
        new = _kept(task, list(some.values()), keep)
        counts.update(new)
        return new

    allocation.rank_with_floors(list(walks), keep, floors, rank)
    return {name: (counts[name], float(walk.size)) for name, walk in walks.items()}


def _kept(task: Task, walks: Sequence[_Walk], keep: int) -> dict[str, int]:
    """Finds how many weights each layer keeps in one ranking."""
    layers = [walk.layer for walk in walks]

    def read_keys(low: int, high: int) -> Iterator[tuple[int, Tensor]]:
        for index, walk in enumerate(walks):
            for keys in walk.keys(low, high):
                yield index, keys

    counts = [math.prod(layer.shape) for layer in layers]
    low, high = ranking.bracket(_sampled(task, layers), keep, sum(counts), torch.float64)
    interval = max(low - _WIDER, 0), min(high + _WIDER, _TOP)
    capacity = task.limits.candidates
    threshold = ranking.threshold(read_keys, counts, keep, interval, torch.float64, capacity)
    for walk, ties in zip(walks, threshold.ties, strict=True):
        if ties and threshold.key in walk.ambiguous:
            raise LapValueError(
                "LAMP scores that differ in float64",
                "different weights near the threshold whose squares underflow to one score",
                "Multiply the layer's weights by a power of two.",
                layer=walk.layer.name,
            )
    return {layer.name: n for layer, n in zip(layers, threshold.kept, strict=True)}


def _sampled(task: Task, layers: Sequence[Layer]) -> Tensor:
    """Approximates the LAMP scores of a sample of these layers, float64; empty without a sample."""
    lamps = [torch.zeros(0, dtype=torch.float64)]
    for layer in layers:
        weight, step = task.samples.get(layer.name), task.steps.get(layer.name, 1)
        if weight is None:
            return lamps[0]
        scores = LayerScores(task.network, task.criterion_of(layer), layer).at(weight, step)
        squares = scores.sort(descending=True).values
        squares = (squares / squares[:1].clamp(min=1e-300)).square()
        lamps.append(torch.where(squares > 0, squares / (squares.cumsum(0) * step), 0.0))
    return torch.cat(lamps)


@dataclass(frozen=True)
class _Mark:
    """A position in a layer's ranking, after some of its weights."""

    lamp: int  # key of the last one's LAMP score
    score: int  # key of its score
    equal: int  # how many of them have that score
    rank: int  # how many weights are before the position
    above: float  # the sum of their squares


class _Walk:
    """The LAMP scores of a layer, the largest first.

    Attributes:
        size: the largest score, float64; 1 before the first walk.
        ambiguous: keys of LAMP scores that weights of different squares share, and that in memory
            would be ranked by index alone: of float64 weights whose squares underflow.
    """

    def __init__(self, task: Task, layer: Layer, buffer: Buffer) -> None:
        self.task, self.layer, self._buffer = task, layer, buffer
        self.size = torch.ones((), dtype=torch.float64)
        self.ambiguous: set[int] = set()
        self._dtype = score_dtype(task.dtype(layer))
        self._capacity = min(task.limits.sorted, math.prod(layer.shape))
        self._marks = [_Mark(_TOP, ranking.largest(self._dtype), 0, 0, 0.0)]

    def keys(self, low: int, high: int) -> Iterator[Tensor]:
        """Gives decreasing keys of LAMP scores: exact in [low, high], above it any larger ones."""
        mark = next(x for x in reversed(self._marks) if x.lamp > high or x.rank == 0)
        least = next((x.score for x in self._marks if x.lamp < low), 0)
        yield torch.full((1,), _TOP).expand(mark.rank)
        left = mark.equal  # those of the first range that are before the mark
        for scores in self._decreasing(least, mark.score):
            for begin in range(left, scores.numel(), ranking.CHUNK):
                lamps, mark = self._next(scores[begin : begin + ranking.CHUNK], mark)
                yield ranking.keys_of(lamps)
                if mark.lamp < low:
                    return
            left = max(left - scores.numel(), 0)

    def _next(self, scores: Tensor, before: _Mark) -> tuple[Tensor, _Mark]:
        """Computes the LAMP scores of the next weights by rank, and the mark after them."""
        double = scores.double()
        if before.rank == 0:
            self.size = double[0].clone()
            if not bool(self.size.isfinite()):
                raise LapValueError("finite scores", float(self.size), layer=self.layer.name)
        squares = (double / self.size).square() if bool(self.size > 0) else double
        sums = torch.cat([torch.tensor([before.above], dtype=torch.float64), squares]).cumsum(0)[1:]
        lamps = torch.where(squares > 0, squares / sums, 0.0)
        if self._dtype == torch.float64:
            same = (lamps[1:] == lamps[:-1]) & (squares[1:] != squares[:-1])
            self.ambiguous.update(ranking.keys_of(lamps[1:][same]).tolist())
        last = int(ranking.keys_of(scores[-1:]))
        equal = int((ranking.keys_of(scores) == last).count_nonzero())
        passed = before.rank + scores.numel()
        if equal == scores.numel() and last == before.score:
            equal += before.equal
        mark = _Mark(int(ranking.keys_of(lamps[-1:])), last, equal, passed, float(sums[-1]))
        if passed // _BETWEEN > self._marks[-1].rank // _BETWEEN:
            self._marks.append(mark)
        return lamps, mark

    def _decreasing(self, low: int, high: int) -> Iterator[Tensor]:
        """Gives all scores whose keys are in [low, high], decreasing, as many at a time as fit."""
        counted = ranking.Pass(1, low, high, self._capacity)
        copy = self.task.copies[self.layer.name][0]
        self.task.begin("rank", [self.layer])
        how = self.task.criterion_of(self.layer)
        scores = LayerScores(self.task.network, how, self.layer)
        for first, weight in self.task.chunks(self.layer, copy, self._buffer):
            counted.add(0, ranking.live_keys_of(scores.of(weight, first), weight))
        count = counted.inside[0]
        if low == high:
            one = torch.tensor([low], dtype=key_dtype(self._dtype))
            yield one.view(self._dtype).expand(count)
        elif count and counted.complete:
            yield counted.held[:count].sort(descending=True).values.view(self._dtype)
        else:
            counted.held = counted.held[:0]
            yield from itertools.chain.from_iterable(
                self._decreasing(*interval) for interval in counted.intervals()
            )
