# SPDX-License-Identifier: MIT
"""The exact threshold of a ranking whose scores are never all in memory.

The key of a score >= 0 is its IEEE bits as an integer. One pass over all keys counts, for each
slice, those above an interval and those inside it, and holds the ones inside up to a capacity:

    1  choose the interval: around the wanted rank in a sample, or all keys
    2  make a pass; if the rank is outside (the sample was misleading), repeat 2 on that side
    3  if all keys inside are held, one of them is the threshold
    4  otherwise shrink the interval to the histogram bin that contains the rank, and repeat 2

The result is the smallest key that is kept, and how many of the keys equal to it each slice keeps:
the first slices first. It is exact, whatever the sample. Keys below 0 are never kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lap_ext.ops.reference.key import key_dtype

CHUNK = BINS = 1 << 15  # elements at a time: they stay in the cache, and torch uses one thread
_MARGIN = 4.0  # standard deviations of the sample's rank on either side

# (low, high) -> (index of a slice, some of its keys) in the order of slices: all keys from low on
ReadKeys = Callable[[int, int], Iterable[tuple[int, Tensor]]]


@dataclass(frozen=True)
class Threshold:
    """What a ranking keeps: keys above key, and of those equal to it the first ties[i] of slice i.

    kept: how many weights each slice keeps in all; where all are kept, those below 0 count too.
    """

    key: int
    ties: tuple[int, ...]
    kept: tuple[int, ...]


def keys_of(scores: Tensor) -> Tensor:
    """Views scores >= 0 as integers of the same order, flat: int32, int64 for float64."""
    return scores.flatten().view(key_dtype(scores.dtype))


def live_keys_of(scores: Tensor, weight: Tensor) -> Tensor:
    """Works like `keys_of`, with -1 for weights that are zero: they count as pruned already."""
    keys = keys_of(scores)
    zero = weight.flatten() == 0
    return keys.masked_fill(zero, -1) if bool(zero.any()) else keys


def largest(dtype: torch.dtype) -> int:
    """Returns the largest key of scores of a dtype."""
    return torch.iinfo(key_dtype(dtype)).max


def bracket(sample: Tensor, keep: int, total: int, dtype: torch.dtype) -> tuple[int, int]:
    """Estimates keys that enclose the keep-th largest of total from a sample of scores, float64."""
    top, size = largest(dtype), sample.numel()
    if size == 0:
        return 0, top
    share = keep / total
    margin = _MARGIN * math.sqrt(size * share * (1 - share)) + 2
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    keys = keys_of(sample.to(dtype)).sort(descending=True).values
    # one key wider: the sample's scores are rounded otherwise than the passes'
    high = min(int(keys[first]) + 2, top) if first >= 0 else top
    low = max(int(keys[last]) - 2, 0) if last < size else 0
    return low, high


def threshold(
    read_keys: ReadKeys,
    sizes: Sequence[int],
    keep: int,
    interval: tuple[int, int],
    dtype: torch.dtype,
    capacity: int,
) -> Threshold:
    """Finds the threshold of the keep largest keys of all slices.

    Args:
        read_keys: gives all keys, once each time it is called; it may leave out those below the
            first number that it is given, and replace those above the second.
        sizes: number of keys of each slice.
        keep: how many to keep, of all.
        interval: lowest and highest key to look at first.
        dtype: of the scores.
        capacity: how many keys may be held.
    """
    if keep <= 0:
        return Threshold(largest(dtype), (0,) * len(sizes), (0,) * len(sizes))
    if keep >= sum(sizes):
        return Threshold(0, tuple(sizes), tuple(sizes))
    low, high = interval
    while True:
        counted = Pass(len(sizes), low, high, capacity)
        for index, keys in read_keys(low, high):
            counted.add(index, keys)
        above, inside = sum(counted.above), sum(counted.inside)
        if keep <= above:
            low, high = high + 1, largest(dtype)
        elif keep > above + inside and low > 0:
            low, high = 0, low - 1
        elif keep > above + inside:  # keys below 0 are left
            kept = tuple(map(sum, zip(counted.above, counted.inside, strict=True)))
            return Threshold(0, kept, kept)
        elif counted.complete:
            return _solved(counted, keep)
        elif low == high:
            return _shared(low, counted.above, counted.inside, keep)
        else:
            low, high = counted.bin_of(keep - above)


@dataclass
class Pass:
    """The counts of one pass over all keys, and the keys inside the interval.

    Attributes:
        slices: how many there are.
        low, high: the interval, both ends included.
        capacity: how many keys may be held.
        above, inside: how many keys of each slice are above the interval, and inside it.
        complete: whether all keys inside are held.
    """

    slices: int
    low: int
    high: int
    capacity: int
    above: list[int] = field(init=False)
    inside: list[int] = field(init=False)
    complete: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.above, self.inside = [0] * self.slices, [0] * self.slices
        # allocated at once: small buffers between large ones would fragment the heap
        self.held = torch.empty(0)
        self.ends = [0] * self.slices  # where the held keys of each slice end
        self.shift = max(0, (self.high - self.low).bit_length() - (BINS.bit_length() - 1))
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.complete = self.low != self.high  # keys that are all equal need not be held

    def add(self, index: int, keys: Tensor) -> None:
        """Counts the next keys of a slice."""
        for chunk in keys.split(CHUNK):
            at_least = chunk >= self.low
            over = chunk > self.high
            above = int(over.count_nonzero())
            inside = int(at_least.count_nonzero()) - above
            self.above[index] += above
            self.inside[index] += inside
            if inside and self.low != self.high:
                self._hold(index, chunk[at_least ^ over])

    def _hold(self, index: int, keys: Tensor) -> None:
        bins = (keys.long() - self.low) >> self.shift
        self.histogram += torch.bincount(bins, minlength=BINS)
        begin = max(self.ends[: index + 1])
        end = begin + keys.numel()
        self.complete = self.complete and end <= self.capacity
        if self.complete:
            if self.held.dtype != keys.dtype:
                self.held = torch.empty(self.capacity, dtype=keys.dtype)
            self.held[begin:end] = keys
            self.ends[index] = end

    def bin_of(self, rank: int) -> tuple[int, int]:
        """Finds the first and last key of the bin that contains the rank-th largest key inside."""
        upward = self.histogram.flip(0).cumsum(0)
        index = BINS - 1 - int(torch.searchsorted(upward, rank))
        first = self.low + (index << self.shift)
        return first, min(first + (1 << self.shift) - 1, self.high)


def _solved(counted: Pass, keep: int) -> Threshold:
    """Finds the threshold where all keys inside the interval are held."""
    ends = [0, *itertools.accumulate(counted.ends, max)]
    held = [counted.held[begin:end] for begin, end in itertools.pairwise(ends)]
    everything = counted.held[: ends[-1]]
    rank = keep - sum(counted.above)
    key = int(everything.kthvalue(everything.numel() - rank + 1).values)
    above = [
        n + int((keys > key).count_nonzero()) for n, keys in zip(counted.above, held, strict=True)
    ]
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


def mask_of(keys: Tensor, key: int, ties: int) -> tuple[Tensor, int]:
    """Masks the keys above key and the first ties equal ones; also returns how many equal ones."""
    kept = keys >= key if ties else keys > key
    equal = int(kept.count_nonzero()) - int((keys > key).count_nonzero()) if ties else 0
    if equal > ties:
        dropped = (keys == key).nonzero().flatten()[ties:]
        kept[dropped] = False
    return kept, min(equal, ties)
