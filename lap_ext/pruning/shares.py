# SPDX-License-Identifier: MIT
"""How many weights each layer keeps in one ranking of normalized scores that are never stored.

Within a layer, normalized scores fall as scores do, so that a layer's share is a number of its
highest scores. Scores come in chunks, in as many passes over all layers as it takes:

    1  count the scores of each layer in bins of their keys (a score's bits as an integer)
    2  bound the wanted normalized score T: each score of a bin is between the bin's ends, and so
       are the squares that are added up (normalization.py). T is between the results for the lower
       and for the upper ends
    3  narrow each layer's window to the bins that may hold T. What is above it is kept
    4  pass again: add up the squares above each window, and hold the keys inside if all layers'
       fit, or count them in narrower bins; repeat 2 until bins are single keys or all are held

Then T is exact: the layers keep what is above it, and of what equals it the first ones. A window
is a few of the bins before, whatever the scores, so that two passes are the rule and bins of single
keys end the search.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext.errors import in_layer
from lap_ext.ops import schema
from lap_ext.ops.reference.chunks import parts_of, squared
from lap_ext.ops.reference.key import key_dtype
from lap_ext.pruning import normalization
from lap_ext.pruning.normalization import Sums
from lap_ext.pruning.thresholds import Total

_MOST_BINS, _LEAST_BINS = 1 << 15, 1 << 8  # of a layer
_SORTED = 1 << 15  # held keys whose normalized scores are computed at a time


@dataclass(frozen=True)
class Source:
    """A layer's scores.

    Attributes:
        name: of the layer.
        read: gives all scores in chunks, each time it is called, and which of them may be kept
            (None: all).
        count: how many may be kept at most.
        dtype: their dtype, float32 or float64.
        size: the norm of the layer's scores (normalize="norm"); None for "lamp".
    """

    name: str
    read: Callable[[], Iterator[tuple[Tensor, Tensor | None]]]
    count: int
    dtype: torch.dtype
    size: float | None = None


def shares(sources: Sequence[Source], keep: int, capacity: int, total_of: Total) -> list[int]:
    """Finds how many of the keep highest normalized scores are each layer's.

    Of equal ones those of earlier layers are kept. At most capacity keys are held. total_of adds
    counts over all that hold weights.
    """
    total = sum(source.count for source in sources)
    if keep <= 0 or keep >= total:
        return [source.count if keep > 0 else 0 for source in sources]
    layers = [_Layer(source, total_of) for source in sources]
    bins = _bins_of(capacity, len(layers))
    least = 0.0
    while True:
        hold = sum(layer.inside for layer in layers) <= capacity
        for layer in layers:
            if layer.inside:
                layer.count(bins, hold)
        wanted = keep - sum(layer.above for layer in layers)
        if wanted >= sum(layer.inside for layer in layers):  # fewer than their counts may be kept
            return [layer.above + layer.inside for layer in layers]
        ranked = [layer for layer in layers if layer.inside]
        least = _largest([layer.lower for layer in ranked], wanted, least)
        if all(layer.exact for layer in ranked):
            return _divided(layers, wanted, least)
        most = _largest([layer.upper for layer in ranked], wanted, least)
        for layer in ranked:
            layer.narrow(least, most)


def _bins_of(capacity: int, layers: int) -> int:
    """Chooses a power of two; few bins are not empty, and those take the memory of four keys."""
    fitting = max(capacity // layers, 1)
    return min(max(1 << (fitting.bit_length() - 1), _LEAST_BINS), _MOST_BINS)


def _largest(ranked: Sequence[_Runs], wanted: int, least: float) -> float:
    """Finds the wanted-th largest of all scores, which is not below least."""
    low, high = _bits_of(least), _bits_of(max(runs.largest for runs in ranked)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if sum(runs.at_least(_of_bits(middle)) for runs in ranked) >= wanted:
            low = middle
        else:
            high = middle
    return _of_bits(low)


def _divided(layers: Sequence[_Layer], wanted: int, threshold: float) -> list[int]:
    """Gives each layer what is above the threshold, and what equals it to the first layers."""
    higher = _of_bits(_bits_of(threshold) + 1)
    ranked = [layer.lower if layer.inside else None for layer in layers]
    above = [runs.at_least(higher) if runs else 0 for runs in ranked]
    left, kept = wanted - sum(above), []
    for layer, runs, count in zip(layers, ranked, above, strict=True):
        ties = min(runs.at_least(threshold) - count, left) if runs else 0
        kept.append(layer.above + count + ties)
        left -= ties
    return kept


def _bits_of(x: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def _of_bits(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


class _Runs:
    """Normalized scores of a layer, decreasing, in runs of scores with one square each.

    Score i of a run, from 1 on, is its square over (the sum before the run + i times the square).
    Where counts is None, each run has one score.

    Attributes:
        rising: the last score of each run, from the last run to the first.
    """

    def __init__(
        self, rising: Tensor, first: Tensor | None = None, counts: Tensor | None = None
    ) -> None:
        self.rising, self._first, self._counts = rising, first, counts
        self._ends = None if counts is None else counts.cumsum(0)
        self._squares: tuple[Tensor, Sums, Sums] | None = None

    @classmethod
    def of_sorted(cls, scores: Tensor, layer: _Layer) -> _Runs:
        """Normalizes the scores in a layer's window, which are sorted."""
        count, above = scores.numel(), layer.squares
        rising = torch.empty(count, dtype=torch.float64)
        for begin in range(0, count, _SORTED):
            chunk = scores[begin : begin + _SORTED]
            if layer.size is not None:
                values = normalization.over(chunk, layer.size)
            else:
                q = squared(chunk, layer.exponent)
                sums = normalization.running(above, parts_of(q))
                above = normalization.total_of((sums[0][-1], sums[1][-1]))
                values = normalization.quotients(q, sums)
            end = begin + chunk.numel()
            rising[count - end : count - begin] = values.flip(0)
        return cls(rising)

    @classmethod
    def of_bins(cls, scores: Tensor, added: Tensor, counts: Tensor, layer: _Layer) -> _Runs:
        """Normalizes counts scores each, while the squares of others are added up."""
        if layer.size is not None:
            values = normalization.over(scores, layer.size)
            return cls(values.flip(0), values, counts)
        q = squared(scores, layer.exponent)
        parts = parts_of(squared(added, layer.exponent))
        sums = normalization.running(layer.squares, parts, counts)
        ones = sums[0] - parts[0] * (counts - 1), sums[1] - parts[1] * (counts - 1)
        last, first = normalization.quotients(q, sums), normalization.quotients(q, ones)
        runs = cls(last.flip(0), first, counts)
        runs._squares = q, parts, sums
        return runs

    @property
    def first(self) -> Tensor:
        """The first score of each run."""
        return self.rising.flip(0) if self._first is None else self._first

    @property
    def largest(self) -> float:
        """The largest score."""
        return float(self.rising[-1] if self._first is None else self._first[0])

    def at_least(self, value: float) -> int:
        """Counts the scores that are not below value."""
        full = self.rising.numel() - int(torch.searchsorted(self.rising, value))
        if self._counts is None or self._ends is None:
            return full
        before = int(self._ends[full - 1]) if full else 0
        if self._squares is None or full == self.rising.numel():
            return before
        return before + self._of_run(full, value)

    def _of_run(self, run: int, value: float) -> int:
        """Counts the scores of a run that are not below value; the last one is."""
        assert self._squares is not None and self._counts is not None
        q, part, total = (
            float(self._squares[0][run]),
            *(normalization.total_of((x[0][run], x[1][run])) for x in self._squares[1:]),
        )
        low, high = 0, int(self._counts[run])
        total -= high * part
        while high - low > 1:
            middle = (low + high) // 2
            if normalization.quotient(q, total + middle * part) >= value:
                low = middle
            else:
                high = middle
        return low


class _Layer:
    """A layer's window: an interval of keys with the threshold in it, or its place.

    Attributes:
        size: the norm of the layer's scores, or None.
        above, inside: how many scores are above the window and in it.
        exponent: of the layer's largest score.
        squares: the sum of the squares above the window.
        lower, upper: the normalized scores inside at the least, and at the most.
        exact: whether both are the normalized scores themselves.
    """

    def __init__(self, source: Source, total_of: Total) -> None:
        self._source, self.size, self._total = source, source.size, total_of
        self._key = key_dtype(source.dtype)
        self._low, self._high = 0, int(torch.tensor(math.inf, dtype=source.dtype).view(self._key))
        self.above, self.inside = 0, source.count
        self.exponent = 0
        self._begun = False
        self.squares = 0
        self.exact = False
        self.lower: _Runs
        self.upper: _Runs

    def count(self, bins: int, hold: bool) -> None:
        """Makes a pass: adds up the squares above the window, and counts or holds what is in it."""
        shift = max(0, (self._high - self._low).bit_length() - (bins.bit_length() - 1))
        counts = torch.zeros(bins, dtype=torch.int64)
        held, end, top = torch.empty(self.inside if hold else 0, dtype=self._key), 0, -1
        squares = torch.zeros(2, dtype=torch.int64)
        for scores, live in self._source.read():
            if not scores.numel():
                continue
            inside = scores, live, self._low, self._high
            if not self._begun:
                kept = scores if live is None else scores.masked_fill(~live, 0)
                top = max(top, int(kept.max().view(self._key)))
            elif self.size is None:
                above = scores, live, self._high, self.exponent
                squares += schema.call(schema.squares_above, *above).cpu()
            if hold:
                _, keys = schema.call(schema.count_keys, *inside, True)
                held[end : end + keys.numel()] = keys
                end += keys.numel()
            else:
                counts += schema.call(schema.key_histogram, *inside, shift, bins).cpu()
        counts, squares = self._total(counts), self._total(squares)
        self.squares = normalization.total_of((squares[0], squares[1]))
        if not self._begun:
            self.inside = end if hold else int(counts.sum())
            self._begin(top)
        self.exact = hold or shift == 0
        if hold:
            self._rank_held(held[:end])
        else:
            self._rank_bins(counts, shift)

    def narrow(self, least: float, most: float) -> None:
        """Narrows the window to bins that may hold a score from least to most."""
        begin = int((self.lower.rising > most).count_nonzero())
        end = int((self.upper.first >= least).count_nonzero())
        passed = [int(self._ends[n - 1]) if n else 0 for n in (begin, end)]
        self.above, self.inside = self.above + passed[0], passed[1] - passed[0]
        if self.inside:
            self._low, self._high = int(self._lows[end - 1]), int(self._highs[begin])

    def _begin(self, top: int) -> None:
        """Sets what the largest key decides."""
        largest = float(self._scores(torch.tensor([top], dtype=self._key)))
        with in_layer(self._source.name):
            how = "lamp" if self.size is None else "norm"
            normalization.require_finite_scores(largest, how)
        self.exponent, self._high = normalization.exponent_of(largest), top
        self._begun = True

    def _rank_held(self, keys: Tensor) -> None:
        """Normalizes the keys that are held."""
        ordered = keys.sort(descending=True).values
        self.lower = self.upper = _Runs.of_sorted(self._scores(ordered), self)

    def _rank_bins(self, counts: Tensor, shift: int) -> None:
        """Bounds the normalized scores that are counted in bins."""
        used = counts.nonzero().flatten().flip(0)
        lows = self._low + (used << shift)
        highs = (lows + ((1 << shift) - 1)).clamp(max=self._high)
        self._lows, self._highs = lows.to(self._key), highs.to(self._key)
        counts = counts[used]
        self._ends = counts.cumsum(0)
        least, most = self._scores(self._lows), self._scores(self._highs)
        self.lower = _Runs.of_bins(least, most, counts, self)
        self.upper = _Runs.of_bins(most, least, counts, self)

    def _scores(self, keys: Tensor) -> Tensor:
        return keys.view(self._source.dtype)
