# SPDX-License-Identifier: MIT
"""The passes before anything is written: energies, sizes of scores, cuts of rankings.

    measure  each layer once, for its row and column energies (criteria with factors of neighbors)
             and for a sample of its weights
    sizes    the L2 norm of a layer's scores (normalize="norm"); lamp.py: the largest, and a layer's share
    rank     the cut of a ranking over more than is in memory: of all layers (scope="global"), of
             one that does not fit, is used twice or is stored in pieces

Each gives the bits that the same step over whole tensors in memory gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lap_ext.checkpoint import ranking
from lap_ext.checkpoint.energies import FileNetwork
from lap_ext.checkpoint.files import DTYPES, Copy, size_of, wrong
from lap_ext.checkpoint.layer_scores import LayerScores
from lap_ext.checkpoint.memory import Limits
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.criteria import Criterion
from lap_ext.progress import Progress, Step
from lap_ext.pruning import selection
from lap_ext.topology import Layer

Key = tuple[str, int]  # a piece of a layer: its name, the first element


@dataclass(frozen=True)
class PieceCut:
    """A ranking keeps of this piece the keys above key, and the first ties of those equal to it."""

    key: int
    ties: int
    kept: int  # in all
    how: str  # the scores were ranked: "plain", "scaled", "wide" or "squared"


@dataclass
class Task:
    """What is to be done: everything that has been checked, and the current step."""

    source: Source
    network: FileNetwork
    criterion: Criterion
    layers: list[Layer]  # to prune, in the order of the network
    copies: Mapping[str, list[Copy]]
    limits: Limits
    on_progress: Callable[[Progress], Any] | None = None
    step: Step = field(default_factory=lambda: Step(None, "", 0))
    samples: dict[str, Tensor] = field(default_factory=dict)  # "w" of a layer, flat
    steps: dict[str, int] = field(default_factory=dict)  # a sample has every so many-th weight
    sizes: dict[str, float] = field(default_factory=dict)  # layer name -> what scores are over

    def dtype(self, layer: Layer) -> torch.dtype:
        """As it is stored."""
        return DTYPES[self.copies[layer.name][0][0].entry.dtype]

    def size(self, layer: Layer) -> int:
        """Bytes of a layer's weight in the files."""
        return size_of(self.copies[layer.name][0])

    def begin(self, step: str, layers: Iterable[Layer]) -> None:
        """Begins a step that reads each of these layers once."""
        self.step = Step(self.on_progress, step, sum(map(self.size, layers)))

    def runs(self, layer: Layer, copy: Copy, buffers: Buffer | Sequence[Buffer]) -> Iterator[Any]:
        """(first element, elements) of a layer in runs of whole rows."""
        for first, weight in self.source.runs(copy, self.limits.run[layer.name], buffers):
            yield first, weight
            self.step.read(layer.name, weight.nbytes)

    def whole(self, jobs: Sequence[Copy], behind: bool = False) -> Iterator[Tensor]:
        """Copies one after the other, each all in memory; the next one is read meanwhile.

        behind: each stays until the one behind the next is asked for.
        """
        buffers = [Buffer() for _ in range(1 + self.limits.ahead + behind)]
        if not self.limits.ahead:
            yield from (self.source.whole(job, buffers[0]) for job in jobs)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting: Future[Tensor] | None = None
            for place, job in enumerate(jobs):
                now = waiting or reader.submit(self.source.whole, job, buffers[0])
                weight = now.result()
                if place + 1 < len(jobs):
                    following = jobs[place + 1], buffers[(place + 1) % len(buffers)]
                    waiting = reader.submit(self.source.whole, *following)
                yield weight


def measure(task: Task) -> None:
    """Energies of all layers, and samples of those that have a step."""
    layers = sorted(task.network.topology.layers.values(), key=lambda x: _place(task, x))
    fits = [x for x in layers if x.name in task.limits.measured_whole]
    whole = task.whole([task.copies[x.name][0] for x in fits])
    buffer = Buffer()
    task.begin("measure", layers)
    for layer in layers:
        copy = task.copies[layer.name][0]
        sampled = _Sample(task, layer)
        if layer.name in task.limits.measured_whole:
            weight = next(whole)
            task.network.hold(layer, weight)
            task.network.measure(layer)
            sampled.add(0, weight)
            task.step.read(layer.name, weight.nbytes)
        else:
            runs = task.runs(layer, copy, buffer)
            task.network.measure_runs(layer, sampled.passing(runs))
        sampled.store()
    for _ in whole:  # ends the reader
        pass


def _place(task: Task, layer: Layer) -> tuple[str, int]:
    entry = task.copies[layer.name][0][0].entry
    return entry.shard, entry.begin


class _Sample:
    """Every step-th weight of a layer, flat; the step has no factor in common with its rows."""

    def __init__(self, task: Task, layer: Layer) -> None:
        self.task, self.layer = task, layer
        self.step = task.steps.get(layer.name, 0)
        size = -(-math.prod(layer.shape) // self.step) if self.step else 0
        self.found = torch.empty(size, dtype=task.dtype(layer))
        self.seen = 0

    def add(self, first: int, weight: Tensor) -> None:
        """The next run of its elements."""
        if self.step:
            new = weight[-first % self.step :: self.step]
            self.found[self.seen : self.seen + new.numel()] = new
            self.seen += new.numel()

    def passing(self, runs: Iterator[Any]) -> Iterator[Any]:
        """The same runs, seen in passing."""
        for first, weight in runs:
            self.add(first, weight)
            yield first, weight

    def store(self) -> None:
        """All runs were there."""
        if self.step:
            self.task.samples[self.layer.name] = self.found


def sample_steps(layers: Sequence[Layer], limit: int) -> dict[str, int]:
    """How far apart the weights of a sample of these layers are, together within the limit."""
    count = sum(math.prod(x.shape) for x in layers)
    steps = {}
    for layer in layers:
        size = max(1, min(limit, round(count ** (2 / 3))))  # candidates: about as many
        step = max(1, -(-count // size)) | 1
        while math.gcd(step, max(math.prod(layer.shape[1:]), 1)) > 1:
            step += 2
        steps[layer.name] = step
    return steps


def score_sizes(task: Task) -> dict[str, float]:
    """Layer name -> the norm of its scores, as selection.normalized has it."""
    buffer, sizes = Buffer(), {}
    task.begin("rank", task.layers)
    for layer in task.layers:
        scores = LayerScores(task.network, task.criterion, layer)
        energies: list[float] = []
        for first, weight in task.runs(layer, task.copies[layer.name][0], buffer):
            energies += selection.row_energies(scores.of(weight, first), layer.shape[-1])
        size = math.sqrt(math.fsum(energies))
        if not math.isfinite(size):
            raise wrong(f"scores with a finite norm in layer {layer.name!r}", size)
        sizes[layer.name] = size
    return sizes


def cut_of(task: Task, layers: Sequence[Layer], keep: int, how: str) -> dict[Key, PieceCut]:
    """What one ranking keeps of each piece of its layers."""
    parts = [(x, piece) for x in layers for piece in task.copies[x.name][0]]
    counts = [piece.entry.numel for _, piece in parts]
    dtype = _score_dtype(task, layers, how)
    buffer = Buffer()

    def sweep(_low: int, _high: int) -> Iterator[tuple[int, Tensor]]:  # all keys
        task.begin("rank", layers)
        place = 0
        for layer in layers:
            score = scorer(task, layer, how)
            for piece in task.copies[layer.name][0]:
                for first, weight in task.runs(layer, (piece,), buffer):
                    yield place, ranking.keys_of(score(weight, first))
                place += 1

    interval = ranking.bracket(_sampled(task, layers, how), keep, sum(counts), dtype)
    found = ranking.cut(sweep, counts, keep, interval, dtype, task.limits.room)
    if how == "scaled" and 0 < keep < sum(counts) and _underflows(found.key, dtype, layers[0]):
        return cut_of(task, layers, keep, "wide")
    shared = zip(parts, found.ties, found.kept, strict=True)
    return {
        (layer.name, piece.begin): PieceCut(found.key, ties, kept, how)
        for (layer, piece), ties, kept in shared
    }


def scorer(task: Task, layer: Layer, how: str) -> Callable[[Tensor, int], Tensor]:
    """Scores of runs of a layer, as they are ranked."""
    squared = how == "squared"
    scores = LayerScores(task.network, task.criterion, layer, "plain" if squared else how)
    size = task.sizes.get(layer.name)
    if size is None:
        return scores.of
    if squared:
        return lambda weight, first: selection.over(scores.of(weight, first), size).square()
    return lambda weight, first: selection.over(scores.of(weight, first), size)


def _score_dtype(task: Task, layers: Sequence[Layer], how: str) -> torch.dtype:
    kinds = {task.dtype(layer) == torch.float64 for layer in layers}
    return torch.float64 if how == "wide" or task.sizes or True in kinds else torch.float32


def _sampled(task: Task, layers: Sequence[Layer], how: str) -> Tensor:
    """About the scores of a sample of these layers, float64; empty if there is none."""
    found = [torch.zeros(0, dtype=torch.float64)]
    for layer in layers:
        weight = task.samples.get(layer.name)
        if weight is None:
            return found[0]
        position = torch.arange(weight.numel()) * task.steps[layer.name]
        squared = how == "squared"
        scores = LayerScores(task.network, task.criterion, layer, "plain" if squared else how)
        size = task.sizes.get(layer.name) or 1.0
        about = scores.at(weight, position) / size
        found.append(about.square() if squared else about)
    return torch.cat(found)


def _underflows(key: int, dtype: torch.dtype, layer: Layer) -> bool:
    """Whether products of factors may have lost the order around a threshold."""
    tiny = torch.tensor(torch.finfo(dtype).tiny, dtype=dtype)
    if key > int(ranking.keys_of(tiny)):
        return False
    if dtype == torch.float64 and key > 0:
        raise wrong(
            f"products within float64's range in layer {layer.name!r}",
            "scores around the threshold that underflow",
        )
    return dtype != torch.float64
