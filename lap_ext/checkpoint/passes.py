# SPDX-License-Identifier: MIT
"""The passes before anything is written: squared norms, sizes of scores, thresholds of rankings.

    measure  each layer once, for its row and column squared norms (criteria with neighbor norms)
             and for a sample of its weights
    sizes    the L2 norm of a layer's scores (normalize="norm"); lamp.py: how many weights a layer
             keeps
    rank     the threshold of a ranking over more than fits into memory: of all layers
             (scope="global"), or of a layer that does not fit, is used twice or is stored in slices

Each gives the bits that the same step over full tensors in memory gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lap_ext import allocation
from lap_ext.checkpoint import ranking
from lap_ext.checkpoint.files import DTYPES, Copy, size_of
from lap_ext.checkpoint.layer_scores import LayerScores
from lap_ext.checkpoint.memory import Limits
from lap_ext.checkpoint.norms import FileNetwork
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.criteria import Criterion
from lap_ext.errors import LapValueError, in_layer, warn
from lap_ext.progress import Progress, Step
from lap_ext.pruning import normalization, selection
from lap_ext.pruning.exact_sum import ExactSum
from lap_ext.topology import Layer

Key = tuple[str, int]  # a slice of a layer: the layer's name, the first element


@dataclass(frozen=True)
class SliceThreshold:
    """What a ranking keeps of a slice: keys above key, and the first ties of those equal to it."""

    key: int
    ties: int
    kept: int  # in all
    how: str  # which scores were ranked: "plain", "scaled" or "wide"


@dataclass
class Task:
    """The checked inputs of all passes, and the current step."""

    source: Source
    network: FileNetwork
    criterion: Criterion
    layers: list[Layer]  # to prune, in the order of the network
    copies: Mapping[str, list[Copy]]
    limits: Limits
    on_progress: Callable[[Progress], Any] | None = None
    step: Step = field(default_factory=lambda: Step(None, "", 0))
    samples: dict[str, Tensor] = field(default_factory=dict)  # layer name -> some weights, flat
    steps: dict[str, int] = field(default_factory=dict)  # layer name -> distance between them
    sizes: dict[str, float] = field(default_factory=dict)  # layer name -> divisor of its scores
    raw: bool = True  # whether scores that are all 0 stay, in place of magnitudes
    dead: dict[str, None] = field(default_factory=dict)  # names of layers whose scores are all 0

    def dtype(self, layer: Layer) -> torch.dtype:
        """Returns the dtype in which a layer is stored."""
        return DTYPES[self.copies[layer.name][0][0].entry.dtype]

    def criterion_of(self, layer: Layer) -> Criterion:
        """Returns the criterion that ranks a layer, as pruning in memory does."""
        empty = math.prod(layer.shape) == 0
        if empty or not selection.scores_nothing(self.network, self.criterion, layer):
            return self.criterion
        self.dead[layer.name] = None
        return self.criterion if self.raw else Criterion()

    def warn_of_dead(self) -> None:
        """Warns of the layers whose scores are all 0."""
        if self.dead:
            warn(selection.dead_text(self.dead, self.raw))

    def size(self, layer: Layer) -> int:
        """Counts the bytes of a layer's weight in the files."""
        return size_of(self.copies[layer.name][0])

    def begin(self, step: str, layers: Iterable[Layer]) -> None:
        """Begins a step that reads each of these layers once."""
        self.step = Step(self.on_progress, step, sum(map(self.size, layers)))

    def chunks(self, layer: Layer, copy: Copy, buffers: Buffer | Sequence[Buffer]) -> Iterator[Any]:
        """Reads (first element, elements) of a layer in chunks of rows."""
        for first, weight in self.source.chunks(copy, self.limits.chunk[layer.name], buffers):
            yield first, weight
            self.step.read(layer.name, weight.nbytes)

    def full(self, copies: Sequence[Copy], background: bool = False) -> Iterator[Tensor]:
        """Reads full copies one after the other; the next one is read ahead, if it fits.

        background: each stays valid until the second one after it is requested.
        """
        buffers = [Buffer() for _ in range(1 + self.limits.ahead + background)]
        if not self.limits.ahead:
            yield from (self.source.full(copy, buffers[0]) for copy in copies)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: Future[Tensor] | None = None
            for index, copy in enumerate(copies):
                now = waiting or pool.submit(self.source.full, copy, buffers[0])
                weight = now.result()
                if index + 1 < len(copies):
                    following = copies[index + 1], buffers[(index + 1) % len(buffers)]
                    waiting = pool.submit(self.source.full, *following)
                yield weight


def measure(task: Task) -> None:
    """Takes the squared norms of all layers, and samples of those that have a step."""
    task.network.check_scales()
    layers = sorted(task.network.topology.layers.values(), key=lambda x: _position(task, x))
    fitting = [x for x in layers if x.name in task.limits.measured_full]
    full = task.full([task.copies[x.name][0] for x in fitting])
    buffer = Buffer()
    task.begin("measure", layers)
    for layer in layers:
        copy = task.copies[layer.name][0]
        sample = _Sample(task, layer)
        if layer.name in task.limits.measured_full:
            weight = next(full)
            task.network.hold(layer, weight)
            task.network.measure(layer)
            sample.add(0, weight)
            task.step.read(layer.name, weight.nbytes)
        else:
            chunks = task.chunks(layer, copy, buffer)
            task.network.measure_chunks(layer, sample.passing(chunks))
        sample.store()
    for _ in full:  # ends its thread
        pass


def _position(task: Task, layer: Layer) -> tuple[str, int]:
    """Says where a layer is in the files, to read them from front to back."""
    entry = task.copies[layer.name][0][0].entry
    return entry.shard, entry.begin


class _Sample:
    """Every step-th weight of a layer, flat; the step has no factor in common with its rows."""

    def __init__(self, task: Task, layer: Layer) -> None:
        self.task, self.layer = task, layer
        self.step = task.steps.get(layer.name, 0)
        size = -(-math.prod(layer.shape) // self.step) if self.step else 0
        self.weights = torch.empty(size, dtype=task.dtype(layer))
        self.seen = 0

    def add(self, first: int, weight: Tensor) -> None:
        """Takes what the next chunk has of the sample."""
        if self.step:
            new = weight[-first % self.step :: self.step]
            self.weights[self.seen : self.seen + new.numel()] = new
            self.seen += new.numel()

    def passing(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """Passes chunks on, and samples them."""
        for first, weight in chunks:
            self.add(first, weight)
            yield first, weight

    def store(self) -> None:
        """Gives the sample to the task, after the last chunk."""
        if self.step:
            self.task.samples[self.layer.name] = self.weights


def sample_steps(layers: Sequence[Layer], limit: int) -> dict[str, int]:
    """Computes the distance between the weights of a sample of these layers, within the limit."""
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
    """Computes the norm of each layer's scores, as normalization.normalized does."""
    buffer, sizes = Buffer(), {}
    task.begin("rank", task.layers)
    for layer in task.layers:
        scores = LayerScores(task.network, task.criterion_of(layer), layer)
        squares = ExactSum()
        for first, weight in task.chunks(layer, task.copies[layer.name][0], buffer):
            normalization.squares_of(scores.of(weight, first).view(-1, layer.shape[-1]), squares)
        with in_layer(layer.name):
            sizes[layer.name] = normalization.size_of(squares)
    return sizes


def thresholds_of(
    task: Task, layers: Sequence[Layer], keep: int, how: str
) -> dict[Key, SliceThreshold]:
    """Finds what one ranking keeps of each slice of its layers."""
    slices = [(x, stored) for x in layers for stored in task.copies[x.name][0]]
    counts = [stored.entry.numel for _, stored in slices]
    dtype = _score_dtype(task, layers, how)
    buffer = Buffer()

    def read_keys(_low: int, _high: int) -> Iterator[tuple[int, Tensor]]:  # all keys
        task.begin("rank", layers)
        index = 0
        for layer in layers:
            score = scorer(task, layer, how)
            for stored in task.copies[layer.name][0]:
                for first, weight in task.chunks(layer, (stored,), buffer):
                    yield index, ranking.live_keys_of(score(weight, first), weight)
                index += 1

    interval = ranking.bracket(_sampled(task, layers, how), keep, sum(counts), dtype)
    capacity = task.limits.candidates
    threshold = ranking.threshold(read_keys, counts, keep, interval, dtype, capacity)
    if how == "scaled" and 0 < keep < sum(counts) and _underflows(threshold.key, dtype, layers[0]):
        return thresholds_of(task, layers, keep, "wide")
    shared = zip(slices, threshold.ties, threshold.kept, strict=True)
    return {
        (layer.name, stored.begin): SliceThreshold(threshold.key, ties, kept, how)
        for (layer, stored), ties, kept in shared
    }


def floored_thresholds(
    task: Task, layers: Sequence[Layer], keep: int, floors: Mapping[str, int], how: str
) -> dict[Key, SliceThreshold]:
    """Works like `thresholds_of`; each layer keeps at least its floor."""
    by_name = {layer.name: layer for layer in layers}
    result: dict[Key, SliceThreshold] = {}

    def rank(names: Sequence[str], keep: int) -> dict[str, int]:
        new = thresholds_of(task, [by_name[name] for name in names], keep, how)
        result.update(new)
        firsts = {(name, x.begin) for name in names for x in task.copies[name][0]}
        kept = dict.fromkeys(names, 0)
        for name, begin in firsts:
            kept[name] += new[name, begin].kept
        return kept

    allocation.rank_with_floors(list(by_name), keep, floors, rank)
    return result


def live_counts(task: Task, *, exact: bool) -> dict[str, int]:
    """Counts the weights of each layer that are not zero.

    exact: whether to read all of them; otherwise the first chunk that has one ends a layer.
    """
    buffer, live = Buffer(), {}
    for layer in task.layers:
        copy, count = task.copies[layer.name][0], 0
        for _, weight in task.source.chunks(copy, task.limits.chunk[layer.name], buffer):
            count += int(weight.count_nonzero())
            if count and not exact:
                break
        live[layer.name] = count
    return live


def scorer(task: Task, layer: Layer, how: str) -> Callable[[Tensor, int], Tensor]:
    """Returns what scores a chunk of a layer (weights, first element), as it is ranked."""
    scores = LayerScores(task.network, task.criterion_of(layer), layer, how)
    size = task.sizes.get(layer.name)
    if size is None:
        return scores.of
    return lambda weight, first: normalization.over(scores.of(weight, first), size)


def _score_dtype(task: Task, layers: Sequence[Layer], how: str) -> torch.dtype:
    kinds = {task.dtype(layer) == torch.float64 for layer in layers}
    return torch.float64 if how == "wide" or task.sizes or True in kinds else torch.float32


def _sampled(task: Task, layers: Sequence[Layer], how: str) -> Tensor:
    """Approximates the scores of a sample of these layers, float64; empty without a sample."""
    sampled = [torch.zeros(0, dtype=torch.float64)]
    for layer in layers:
        weight = task.samples.get(layer.name)
        if weight is None:
            return sampled[0]
        scores = LayerScores(task.network, task.criterion_of(layer), layer, how)
        size = task.sizes.get(layer.name) or 1.0
        sampled.append(scores.at(weight, task.steps[layer.name]) / size)
    return torch.cat(sampled)


def _underflows(key: int, dtype: torch.dtype, layer: Layer) -> bool:
    """Whether products of norms may have lost the order around a threshold."""
    tiny = torch.tensor(torch.finfo(dtype).tiny, dtype=dtype)
    if key > int(ranking.keys_of(tiny)):
        return False
    if dtype == torch.float64 and key > 0:
        raise LapValueError(
            "products within float64's range",
            "scores around the threshold that underflow",
            "Multiply the weights of the layer by a power of two; a common factor changes no mask.",
            layer=layer.name,
        )
    return dtype != torch.float64
