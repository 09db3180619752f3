# SPDX-License-Identifier: MIT
"""The exact cut of a ranking whose scores are never all in memory.

A score >= 0 is its IEEE bits as an integer, the key. One pass over all keys counts, part by part,
those above an interval and those inside it, and keeps the ones inside while there is room for them:

    1  the interval: around the wanted rank in a sample, or everything
    2  a pass. Rank outside the interval (a misled sample): again with what is on that side of it
    3  all inside are at hand: the cut is the right one of them
    4  else the interval shrinks to the bin of a histogram that holds the rank, and back to 2

The cut is the smallest key that is kept, and how many of the equal ones each part keeps: the first
parts first. It is exact, whatever the sample says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lap_ext.ops.reference.key import key_dtype

CHUNK = BINS = 1 << 15  # elements at a time: they stay in the cache, and torch uses one thread
_MARGIN = 4.0  # standard deviations of the sample's rank on either side

# (part, some of its keys), in the order of parts: all keys from low on; low and high are given
Sweep = Callable[[int, int], Iterable[tuple[int, Tensor]]]


@dataclass(frozen=True)
class Cut:
    """What a ranking keeps: keys above key, and of those equal to it ties[p] of part p, the first.

    kept: how many weights each part keeps in all.
    """

    key: int
    ties: tuple[int, ...]
    kept: tuple[int, ...]


def keys_of(scores: Tensor) -> Tensor:
    """Integers that sort as scores >= 0 do, flat: int32, int64 for float64. A view."""
    return scores.flatten().view(key_dtype(scores.dtype))


def largest(dtype: torch.dtype) -> int:
    """The largest key of scores of a dtype."""
    return torch.iinfo(key_dtype(dtype)).max


def bracket(sample: Tensor, keep: int, total: int, dtype: torch.dtype) -> tuple[int, int]:
    """Keys that probably enclose the keep-th largest of total, by a sample of scores, float64."""
    top, size = largest(dtype), sample.numel()
    if size == 0:
        return 0, top
    part = keep / total
    margin = _MARGIN * math.sqrt(size * part * (1 - part)) + 2
    first, last = math.floor(part * size - margin), math.ceil(part * size + margin)
    keys = keys_of(sample.to(dtype)).sort(descending=True).values
    # one key wider: the sample's scores are rounded otherwise than the passes'
    high = min(int(keys[first]) + 2, top) if first >= 0 else top
    low = max(int(keys[last]) - 2, 0) if last < size else 0
    return low, high


def cut(
    sweep: Sweep,
    sizes: Sequence[int],
    keep: int,
    interval: tuple[int, int],
    dtype: torch.dtype,
    room: int,
) -> Cut:
    """The cut of the keep largest keys of all parts.

    Args:
        sweep: gives all keys, once each time it is called; it may leave out those below the first
            number that it is given, and put other ones for those above the second.
        sizes: number of keys of each part.
        keep: how many to keep, of all.
        interval: lowest and highest key to look at first.
        dtype: of the scores.
        room: keys that may be held.
    """
    if keep <= 0:
        return Cut(largest(dtype), (0,) * len(sizes), (0,) * len(sizes))
    if keep >= sum(sizes):
        return Cut(0, tuple(sizes), tuple(sizes))
    low, high = interval
    while True:
        found = Pass(len(sizes), low, high, room)
        for part, keys in sweep(low, high):
            found.add(part, keys)
        above, inside = sum(found.above), sum(found.inside)
        if keep <= above:
            low, high = high + 1, largest(dtype)
        elif keep > above + inside:
            low, high = 0, low - 1
        elif found.complete:
            return _solved(found, keep)
        elif low == high:
            return _shared(low, found.above, found.inside, keep)
        else:
            low, high = found.bin_of(keep - above)


@dataclass
class Pass:
    """What one pass over all keys has found."""

    parts: int
    low: int
    high: int
    room: int
    above: list[int] = field(init=False)
    inside: list[int] = field(init=False)
    complete: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.above, self.inside = [0] * self.parts, [0] * self.parts
        # in one piece from the start: small ones between large ones would fragment the heap
        self.held = torch.empty(0)
        self.ends = [0] * self.parts  # where the keys of each part end
        self.shift = max(0, (self.high - self.low).bit_length() - (BINS.bit_length() - 1))
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.complete = self.low != self.high  # one key needs no room

    def add(self, part: int, keys: Tensor) -> None:
        """The next keys of a part."""
        for chunk in keys.split(CHUNK):
            at_least = chunk >= self.low
            over = chunk > self.high
            above = int(over.count_nonzero())
            inside = int(at_least.count_nonzero()) - above
            self.above[part] += above
            self.inside[part] += inside
            if inside and self.low != self.high:
                self._hold(part, chunk[at_least ^ over])

    def _hold(self, part: int, keys: Tensor) -> None:
        places = (keys.long() - self.low) >> self.shift
        self.histogram += torch.bincount(places, minlength=BINS)
        begin = max(self.ends[: part + 1])
        end = begin + keys.numel()
        self.complete = self.complete and end <= self.room
        if self.complete:
            if self.held.dtype != keys.dtype:
                self.held = torch.empty(self.room, dtype=keys.dtype)
            self.held[begin:end] = keys
            self.ends[part] = end

    def bin_of(self, rank: int) -> tuple[int, int]:
        """First and last key of the bin that holds the rank-th largest key inside."""
        upward = self.histogram.flip(0).cumsum(0)
        place = BINS - 1 - int(torch.searchsorted(upward, rank))
        first = self.low + (place << self.shift)
        return first, min(first + (1 << self.shift) - 1, self.high)

    def intervals(self) -> Iterator[tuple[int, int]]:
        """The interval in parts, the highest first: each has as many keys as there is room for.

        Or those of one bin.
        """
        last, count = self.high, 0
        for place, more in reversed(list(enumerate(self.histogram.tolist()))):
            if count and count + more > self.room:
                yield self.low + ((place + 1) << self.shift), last
                count = 0
            if not count:
                last = min(self.low + ((place + 1) << self.shift) - 1, self.high)
            count += more
        if count:
            yield self.low, last


def _solved(found: Pass, keep: int) -> Cut:
    """The cut where all keys inside the interval are at hand."""
    ends = [0, *itertools.accumulate(found.ends, max)]
    held = [found.held[begin:end] for begin, end in itertools.pairwise(ends)]
    everything = found.held[: ends[-1]]
    rank = keep - sum(found.above)
    key = int(everything.kthvalue(everything.numel() - rank + 1).values)
    above = [
        n + int((keys > key).count_nonzero()) for n, keys in zip(found.above, held, strict=True)
    ]
    ties = [int((keys == key).count_nonzero()) for keys in held]
    return _shared(key, above, ties, keep)


def _shared(key: int, above: Sequence[int], ties: Sequence[int], keep: int) -> Cut:
    """Gives what is left to the keys that are equal, first parts first."""
    left = keep - sum(above)
    share = []
    for count in ties:
        share.append(min(count, left))
        left -= share[-1]
    return Cut(key, tuple(share), tuple(n + t for n, t in zip(above, share, strict=True)))


def mask_of(keys: Tensor, key: int, ties: int) -> tuple[Tensor, int]:
    """(mask of the keys above key and of the first ties equal ones, equal ones that it keeps)."""
    kept = keys >= key if ties else keys > key
    equal = int(kept.count_nonzero()) - int((keys > key).count_nonzero()) if ties else 0
    if equal > ties:
        places = (keys == key).nonzero().flatten()[ties:]
        kept[places] = False
    return kept, min(equal, ties)
