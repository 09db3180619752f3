# SPDX-License-Identifier: MIT
"""The exact threshold of a ranking whose scores are never all in memory.

The key of a score >= 0 is its IEEE bits as an integer. One pass over all keys counts, for each
slice, those above an interval and those inside it, and holds the ones inside up to a capacity:

    1  choose the interval: around the wanted rank in a sample, or all keys
    2  make a pass; if the rank is outside (the sample was misleading), repeat 2 on that side
    3  if all keys inside are held, one of them is the threshold
    4  otherwise shrink the interval to the histogram bin that contains the rank, and repeat 2

The result is the smallest key that is kept, and how many of the keys equal to it each slice keeps:
the first slices first. It is exact, whatever the sample. Weights that may not be kept have no key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lap_ext.ops import schema
from lap_ext.ops.reference.key import key_dtype

_BINS = 1 << 15  # of a pass that cannot hold its keys
_MARGIN = 6.0  # standard deviations of the sample's rank on either side; it has rows, not weights

# An index of a slice, some of its scores, and which of them may be kept (None: all); in the order
# of slices. Each call gives all scores once.
Read = Callable[[], Iterable[tuple[int, Tensor, Tensor | None]]]
Total = Callable[[Tensor], Tensor]  # adds integers over all that hold weights


@dataclass(frozen=True)
class Threshold:
    """What a ranking keeps: keys above key, and of those equal to it the first ties[i] of slice i.

    kept: how many weights each slice keeps in all.
    """

    key: int
    ties: tuple[int, ...]
    kept: tuple[int, ...]


def key_of(score: float, dtype: torch.dtype) -> int:
    """Returns the key of a score."""
    return int(torch.tensor(score, dtype=dtype).view(key_dtype(dtype)))


def largest(dtype: torch.dtype) -> int:
    """Returns the largest key of scores of a dtype."""
    return torch.iinfo(key_dtype(dtype)).max


def bracket(sample: Tensor, keep: int, total: int) -> tuple[int, int]:
    """Estimates keys that enclose the keep-th largest of total from a sample of scores."""
    top, size = largest(sample.dtype), sample.numel()
    if size == 0:
        return 0, top
    share = min(keep / total, 1.0)
    margin = _MARGIN * math.sqrt(size * share * (1 - share)) + 2
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    keys = sample.view(key_dtype(sample.dtype)).sort(descending=True).values
    high = int(keys[first]) if first >= 0 else top
    low = int(keys[last]) if last < size else 0
    return low, high


def threshold(
    read: Read,
    slices: int,
    keep: int,
    interval: tuple[int, int],
    dtype: torch.dtype,
    capacity: int,
    total: Total,
) -> Threshold:
    """Finds the threshold of the keep largest keys of all slices.

    Args:
        read: gives all scores.
        slices: how many there are.
        keep: how many to keep, of all; where fewer may be kept, all of these are.
        interval: lowest and highest key to look at first.
        dtype: of the scores.
        capacity: how many keys may be held.
        total: adds counts over all that hold weights.
    """
    if keep <= 0:
        return Threshold(largest(dtype), (0,) * slices, (0,) * slices)
    low, high = interval
    while True:
        counted = _Pass(slices, low, high, capacity)
        for index, scores, live in read():
            counted.add(index, scores, live)
        counts, histogram = total(counted.counts), total(counted.histogram)
        above, inside = counts.sum(dim=0).tolist()
        if keep <= above:
            low, high = high + 1, largest(dtype)
        elif keep > above + inside and low > 0:
            low, high = 0, low - 1
        elif keep >= above + inside and low == 0:
            kept = tuple(counts.sum(dim=1).tolist())
            return Threshold(0, kept, kept)
        elif counted.complete:
            return _solved(counted, keep)
        elif low == high:
            return _shared(low, counts[:, 0].tolist(), counts[:, 1].tolist(), keep)
        else:
            low, high = counted.bin_of(histogram, keep - above)


@dataclass
class _Pass:
    """The counts of one pass over all keys, and the keys inside the interval.

    Attributes:
        slices: how many there are.
        low, high: the interval, both ends included.
        capacity: how many keys may be held.
        counts: of each slice, keys above the interval and inside it, [slices, 2].
        histogram: of the keys inside.
        complete: whether all keys inside are held.
    """

    slices: int
    low: int
    high: int
    capacity: int
    counts: Tensor = field(init=False)
    histogram: Tensor = field(init=False)
    complete: bool = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.slices, 2, dtype=torch.int64)
        self.histogram = torch.zeros(_BINS, dtype=torch.int64)
        # allocated at once: small buffers between large ones would fragment the heap
        self.held = torch.empty(0)
        self.ends = [0] * self.slices  # where the held keys of each slice end
        self.shift = max(0, (self.high - self.low).bit_length() - (_BINS.bit_length() - 1))
        self.complete = self.low != self.high  # keys that are all equal need not be held

    def add(self, index: int, scores: Tensor, live: Tensor | None) -> None:
        """Counts the next keys of a slice."""
        arguments = scores, live, self.low, self.high
        counts, keys = schema.call(schema.count_keys, *arguments, self.complete)
        self.counts[index] += counts.cpu()
        if self.low == self.high:
            return
        if not self.complete:
            bins = schema.call(schema.key_histogram, *arguments, self.shift, _BINS)
            self.histogram += bins.cpu()
        elif keys.numel():
            self._hold(index, keys)

    def _hold(self, index: int, keys: Tensor) -> None:
        bins = (keys.long() - self.low) >> self.shift
        self.histogram += torch.bincount(bins, minlength=_BINS)
        begin = max(self.ends[: index + 1])
        end = begin + keys.numel()
        self.complete = end <= self.capacity
        if self.complete:
            if self.held.dtype != keys.dtype:
                self.held = torch.empty(self.capacity, dtype=keys.dtype)
            self.held[begin:end] = keys
            self.ends[index] = end

    def bin_of(self, histogram: Tensor, rank: int) -> tuple[int, int]:
        """Finds the first and last key of the bin that contains the rank-th largest key inside."""
        upward = histogram.flip(0).cumsum(0)
        index = _BINS - 1 - int(torch.searchsorted(upward, rank))
        first = self.low + (index << self.shift)
        return first, min(first + (1 << self.shift) - 1, self.high)


def _solved(counted: _Pass, keep: int) -> Threshold:
    """Finds the threshold where all keys inside the interval are held."""
    ends = [0, *itertools.accumulate(counted.ends, max)]
    held = [counted.held[begin:end] for begin, end in itertools.pairwise(ends)]
    everything = counted.held[: ends[-1]]
    before = counted.counts[:, 0].tolist()
    rank = keep - sum(before)
    key = int(everything.kthvalue(everything.numel() - rank + 1).values)
    above = [n + int((keys > key).count_nonzero()) for n, keys in zip(before, held, strict=True)]
    ties = [int((keys == key).count_nonzero()) for keys in held]
    return _shared(key, above, ties, keep)


def _shared(key: int, above: Sequence[int], ties: Sequence[int], keep: int) -> Threshold:
    """Gives what is left to keep to the equal keys, first slices first."""
    left = keep - sum(above)
    share = []
    for count in ties:
        share.append(min(count, left))
        left -= share[-1]
    return Threshold(key, tuple(share), tuple(n + t for n, t in zip(above, share, strict=True)))
