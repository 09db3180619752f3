# SPDX-License-Identifier: MIT
"""Measures the facts of a report, in one pass over the chunks of each layer's weight.

    kept mass        sum of w^2 over the kept weights, divided by the sum over all weights
    dead rows        all-zero rows of the pruned weight as a matrix [rows, columns, *window]
    dead columns     all-zero columns of this matrix, counted in each group separately
    overlap          the share of the kept weights that magnitude would have kept as well
    distribution     histograms of kept and pruned |w| (or scores); a bin spans a factor 2^(1/4)

A chunk is some rows of a layer, so that a layer larger than memory can be measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STEPS = 4  # bins an octave
_LAST = 1024 * STEPS - 1  # the bin of the largest double
_UP = 600  # a denormal double times 2^600 is normal, and exact
_BATCH = 1 << 15  # values whose bins are counted together: they stay in the cache
_CHUNK = 1 << 22  # weights measured at once: 32 MB in float64
_DROPPED = 15  # bits of a float32 by which magnitudes are not told apart for the overlap: 1 / 256


@dataclass
class Histogram:
    """Counts of positive values by bin; bin b holds 2^(b / STEPS) <= value < 2^((b + 1) / STEPS).

    Zeros are counted separately: they have no bin on a logarithmic axis. Infinity counts as the
    largest number.

    Attributes:
        kept: bin -> number of kept values.
        pruned: bin -> number of pruned values.
        zeros_kept: number of zeros that are kept.
        zeros_pruned: number of zeros that are pruned.
        lowest: the smallest value that is kept, or None.

    Example:
        >>> import torch
        >>> counts = Histogram()
        >>> counts.add(torch.tensor([0., 1., 1.1, 2.]), torch.tensor([False, False, True, True]))
        >>> dict(counts.kept), dict(counts.pruned), counts.zeros_pruned, round(counts.lowest, 2)
        ({0: 1, 4: 1}, {0: 1}, 1, 1.1)
    """

    kept: Counter[int] = field(default_factory=Counter)
    pruned: Counter[int] = field(default_factory=Counter)
    zeros_kept: int = 0
    zeros_pruned: int = 0
    lowest: float | None = None

    def add(self, values: Tensor, kept: Tensor) -> None:
        """Counts values >= 0, in any shape, each as kept or pruned."""
        counts: dict[int, Tensor] = {}
        flat = values.reshape(-1), kept.reshape(-1)
        for batch, chosen in zip(*(x.split(_BATCH) for x in flat), strict=True):
            _count(batch if batch.dtype == torch.float32 else batch.double(), chosen, counts)
            if int(chosen.count_nonzero()):
                self._lower(float(torch.where(chosen, batch, torch.inf).min()))
        for shift, table in counts.items():
            self.zeros_pruned += int(table[0, 0])
            self.zeros_kept += int(table[0, 1])
            for counter, column in ((self.pruned, table[1:, 0]), (self.kept, table[1:, 1])):
                bins = column.nonzero().flatten()
                for index, count in zip(bins.tolist(), column[bins].tolist(), strict=True):
                    counter[min(index + 1 + shift, _LAST)] += count

    def update(self, other: Histogram) -> None:
        """Adds the counts of another histogram."""
        self.kept.update(other.kept)
        self.pruned.update(other.pruned)
        self.zeros_kept += other.zeros_kept
        self.zeros_pruned += other.zeros_pruned
        if other.lowest is not None:
            self._lower(other.lowest)

    def to_json(self) -> list[Any]:
        """Converts the counts to JSON; `of_json` reads them."""
        counts = [sorted(self.kept.items()), sorted(self.pruned.items())]
        return [*counts, self.zeros_kept, self.zeros_pruned, self.lowest]

    @classmethod
    def of_json(cls, counts: Sequence[Any]) -> Histogram:
        """Reads what `to_json` returned."""
        kept, pruned, *others = counts
        return cls(Counter(dict(kept)), Counter(dict(pruned)), *others)

    def _lower(self, value: float) -> None:
        self.lowest = value if self.lowest is None else min(self.lowest, value)


def _count(values: Tensor, kept: Tensor, counts: dict[int, Tensor], up: int = 0) -> None:
    """Adds values times 2^up to counts: shift of bins -> (pruned, kept) by bin, int64 [bins, 2].

    The bin is computed from the bits of a number: STEPS times its exponent, plus one for each
    fourth root of 2, 4 and 8 that its mantissa reaches. Zeros are in bin 0, which no normal number
    has.
    """
    single = values.dtype == torch.float32
    bits, mantissa = (values.view(torch.int32), 23) if single else (values.view(torch.int64), 52)
    if int((bits < 1 << mantissa).count_nonzero()) > int((bits == 0).count_nonzero()):  # denormals
        if single:
            _count(values.double(), kept, counts)
            return
        denormal = (bits > 0) & (bits < 1 << mantissa)
        _count(values[denormal] * 2.0**_UP, kept[denormal], counts, _UP)
        values, kept = values[~denormal], kept[~denormal]
        bits = values.view(torch.int64)
    exponents = 1 << (8 if single else 11)
    bins = bits >> mantissa
    for step in range(1, STEPS):
        root = math.isqrt(math.isqrt(1 << (4 * mantissa + step))) + 1 - (1 << mantissa)
        bins += (bits + ((1 << mantissa) - root)) >> mantissa  # carries where the root is reached
    bins = bins.mul_(2).add_(kept.to(bins.dtype))
    shift = -(exponents // 2 - 1 + up) * STEPS
    size = 2 * STEPS * exponents
    new = torch.bincount(bins, minlength=size).view(-1, 2)
    counts[shift] = counts[shift] + new if shift in counts else new


@dataclass
class LayerFacts:
    """One layer, before and after the pruning."""

    name: str
    kind: str
    shape: tuple[int, ...]
    fed_by: str = ""
    read_by: str = ""
    kept: int = 0
    total: int = 0
    square_kept: float = 0.0  # sum of squares of the kept weights
    square_total: float = 0.0
    agreed: int = 0  # kept weights that are also among the largest |w|
    rows: int = 0
    dead_rows: int = 0
    columns: int = 0
    dead_columns: int = 0
    weights: Histogram = field(default_factory=Histogram)
    scores: Histogram | None = None
    producers: tuple[str, ...] = ()  # names of the layers that feed it
    units: tuple[int, int] | None = (
        None  # of a structure: how many are kept, and how many there are
    )

    @property
    def empty(self) -> bool:
        """Whether the layer has weights, and keeps none."""
        return self.kept == 0 < self.total

    @property
    def dead(self) -> int:
        """Counts the dead rows and columns."""
        return self.dead_rows + self.dead_columns

    @property
    def overlap(self) -> float | None:
        """Computes the share of the kept weights that magnitude would have kept; None without any.

        Magnitudes that differ by less than 1 / 256 count as equal.
        """
        return self.agreed / self.kept if self.kept else None

    @property
    def threshold(self) -> float | None:
        """Returns the lowest score that is kept, or None if there are no scores or none is kept."""
        return None if self.scores is None else self.scores.lowest

    @property
    def sparsity(self) -> float:
        """Computes the fraction of the weights that is removed."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    @property
    def mass(self) -> float:
        """Computes the share of the sum of squares that is kept; 1 if the sum is 0."""
        return self.square_kept / self.square_total if self.square_total else 1.0


@dataclass
class Facts:
    """The facts that a report shows."""

    title: str
    criterion: str
    layers: Sequence[LayerFacts]
    options: Mapping[str, str] = field(default_factory=dict)  # of the pruning, as texts
    others: Sequence[str] = ()  # parameters that are not of layers and never pruned
    stops: Sequence[str] = ()  # where the trace stopped
    bytes_before: int | None = None
    bytes_after: int | None = None
    bytes_sparse: int | None = None  # kept values and one bit a weight, with all that is not pruned
    version: str = ""  # of lap_ext
    torch: str = ""  # its version
    date: str = ""  # when the facts were gathered
    command: str = ""  # the command line that pruned, if there was one
    seconds: float | None = None  # that the pruning took
    load: Sequence[str] = ()  # lines of Python that load the result
    structure: str | None = None  # what was removed together; None: single weights
    families: Sequence[tuple[str, int, int]] = ()  # of units: name, kept, all
    fixed: Sequence[str] = ()  # which channels cannot be removed and why, in sentences

    @property
    def empty_layers(self) -> list[str]:
        """Lists the layers that keep no weight."""
        return [layer.name for layer in self.layers if layer.empty]

    @property
    def kept(self) -> int:
        """Counts the kept weights of the pruned layers."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """Counts all weights of the pruned layers."""
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Computes the fraction of all weights of the pruned layers that is removed."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    @property
    def mass(self) -> float:
        """Computes the share of the sum of squares of the pruned layers that is kept."""
        total = math.fsum(layer.square_total for layer in self.layers)
        return math.fsum(layer.square_kept for layer in self.layers) / total if total else 1.0

    def distribution(self) -> Histogram:
        """Adds up the magnitudes of all layers."""
        counts = Histogram()
        for layer in self.layers:
            counts.update(layer.weights)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Converts the figures to a dict for JSON, without the distributions."""
        counts = "rows dead_rows columns dead_columns"
        names = f"name kind shape kept total units sparsity mass overlap {counts}".split()
        rows = [{name: getattr(layer, name) for name in names} for layer in self.layers]
        facts: dict[str, Any] = {"structure": self.structure, "mass": self.mass}
        if self.families:
            facts["families"] = [
                {"name": name, "kept": kept, "total": total} for name, kept, total in self.families
            ]
            facts["fixed"] = list(self.fixed)
        return {**facts, "empty_layers": self.empty_layers, "layers": rows}


class Measure:
    """Measures the facts of one layer from chunks of complete rows, in order.

    Args:
        facts: the facts of the layer, which this class fills in.
        matrix: the shape [rows, columns, *window] to which the weight is reshaped; None means its
            own shape.
        groups: the number of groups of a convolution, or of experts, between which the rows are
            split.

    Example:
        >>> import torch
        >>> facts = LayerFacts("fc", "linear", (2, 2))
        >>> measure = Measure(facts)
        >>> measure.add(torch.tensor([[3., 1.]]), torch.tensor([[True, False]]))
        >>> measure.add(torch.tensor([[4., 2.]]), torch.tensor([[False, False]]))
        >>> measure.finish()
        >>> facts.kept, facts.mass, facts.dead_rows, facts.dead_columns      # 9 / (9 + 1 + 16 + 4)
        (1, 0.3, 1, 1)
        >>> facts.overlap                                   # magnitude would have kept the 4
        0.0
    """

    def __init__(
        self, facts: LayerFacts, matrix: tuple[int, ...] | None = None, groups: int = 1
    ) -> None:
        shape = facts.shape if matrix is None else matrix
        self.facts = facts
        self.inner = (*shape[1:], 1)[:1] + shape[2:]  # a vector is one column
        self.at = 0  # rows seen
        facts.rows = shape[0]
        self.rows_a_group = max(1, facts.rows // groups)
        self.alive = torch.zeros(groups, self.inner[0], dtype=torch.bool)
        self.magnitudes = torch.zeros(1 << 31 - _DROPPED, 2, dtype=torch.int64)  # pruned, kept

    @property
    def step(self) -> int:
        """Computes how many weights, in complete rows, are measured at once."""
        row = max(1, math.prod(self.inner))
        return row * max(1, _CHUNK // row)

    def add(self, weight: Tensor, kept: Tensor, scores: Tensor | None = None) -> None:
        """Measures the next rows, in any shape; scores are those by which they were ranked."""
        tensors = [weight, kept] if scores is None else [weight, kept, scores]
        flat = [x.detach().reshape(-1) for x in tensors]
        for start in range(0, weight.numel(), self.step):
            rows = [x[start : start + self.step].cpu().reshape(-1, *self.inner) for x in flat]
            self._add(rows[0], rows[1], rows[2] if scores is not None else None)

    def finish(self) -> None:
        """Sets the facts that depend on all rows together."""
        self.facts.columns = self.alive.numel()
        self.facts.dead_columns = int((~self.alive).sum())
        counts = self.magnitudes.flip(0)  # the largest first
        above = counts.sum(1).cumsum(0) - counts.sum(1)
        room = (self.facts.kept - above).clamp(min=0)  # for the weights of each magnitude
        self.facts.agreed = int(torch.minimum(room, counts[:, 1]).sum())

    def _add(self, weight: Tensor, kept: Tensor, scores: Tensor | None) -> None:
        facts = self.facts
        size = weight.abs().double()
        square = size.square()
        facts.square_total += float(square.sum())
        facts.square_kept += float(square[kept].sum())
        facts.kept += int(kept.count_nonzero())
        facts.total += weight.numel()
        facts.weights.add(size, kept)
        key = size.float().view(torch.int32).reshape(-1).long() >> _DROPPED
        counts = torch.bincount(2 * key + kept.reshape(-1), minlength=self.magnitudes.numel())
        self.magnitudes += counts.view(-1, 2)
        alive = (
            (kept & (weight != 0)).flatten(2).any(2) if weight.dim() > 2 else kept & (weight != 0)
        )
        facts.dead_rows += int((~alive.any(1)).sum())
        groups = torch.arange(self.at, self.at + alive.shape[0]) // self.rows_a_group
        groups = groups.clamp(max=self.alive.shape[0] - 1)
        for group in torch.unique(groups).tolist():
            self.alive[group] |= alive[groups == group].any(0)
        self.at += alive.shape[0]
        if scores is not None:
            facts.scores = facts.scores or Histogram()
            facts.scores.add(scores, kept)


def binned(
    histogram: Histogram, tail: float = 0.003, octaves: int = 24
) -> tuple[list[float], list[int], list[int]]:
    """Computes a chart's bin edges (one more than bins), kept counts and pruned counts.

    The first bin also holds the smallest values: the share `tail` of all values, and those more
    than `octaves` octaves below the largest value.

    Example:
        >>> import torch
        >>> counts = Histogram()
        >>> counts.add(torch.tensor([1., 1.1, 2.]), torch.tensor([False, True, True]))
        >>> edges, kept, pruned = binned(counts)
        >>> [round(edge, 2) for edge in edges], kept, pruned
        ([1.0, 1.19, 1.41, 1.68, 2.0, 2.38], [1, 0, 0, 0, 1], [1, 0, 0, 0, 0])
    """
    both = histogram.kept + histogram.pruned
    if not both:
        return [], [], []
    low, high, left = min(both), max(both), tail * both.total()
    for index in sorted(both):
        low, left = index, left - both[index]
        if left < 0:
            break
    low = max(low, high - STEPS * octaves + 1)
    bins = range(low, high + 1)

    def counts(counter: Counter[int]) -> list[int]:
        binned_counts = [counter[index] for index in bins]
        binned_counts[0] += sum(count for index, count in counter.items() if index < low)
        return binned_counts

    largest = 1024 - 2.0**-40  # a power of 2 that is finite
    edges = [2.0 ** min(index / STEPS, largest) for index in range(low, high + 2)]
    return edges, counts(histogram.kept), counts(histogram.pruned)
