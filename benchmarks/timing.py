# SPDX-License-Identifier: MIT
"""The only timer of the benchmarks.

Two calls are compared in pairs: ours, the baseline, ours, the baseline, ... in one loop, the order
within a pair alternating. A machine that becomes slower (a neighbor, heat) then slows both, and

    ratio = median over pairs of (baseline's seconds / our seconds)

stays what it is. The first calls of both are for the check of their results and for warming up;
only a baseline slower than SLOW_S keeps its first call as a sample. A call too short for the clock
is repeated within a sample. On CUDA: events, with the L2 cache overwritten before each call.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Check = Callable[[Any, Any], None]

SLOW_S = 0.3  # from here on warming up is too little of a call to matter
SAMPLE_S = 1e-3  # a sample lasts at least this long
MIN_PAIRS = 3
MAX_PAIRS = 41
MAX_CALLS = 2000  # in a sample


@dataclass(frozen=True)
class Stats:
    """Median and quartiles of count measurements (seconds, or a ratio)."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Stats:
        """Computes the statistics of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))


@dataclass(frozen=True)
class Pairs:
    """What a comparison has measured, sample by sample."""

    ours: list[float]  # seconds
    baseline: list[float]  # seconds

    @property
    def ratio(self) -> Stats:
        """The baseline's time / ours, pair by pair."""
        return Stats.of([r / o for o, r in zip(self.ours, self.baseline, strict=True)])


class Timer:
    """Compares calls on one device, spending about budget_s seconds on each comparison."""

    def __init__(self, device: torch.device, budget_s: float) -> None:
        self.device = device
        self.budget_s = budget_s
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def compare(
        self, ours: Call, baseline: Call, check: Check | None = None, pairs: int | None = None
    ) -> Pairs:
        """Checks the results of both (check raises), then times them; pairs: how many at most."""
        with _quiet():
            ours_s, mine = self._sample(ours, 1)
            baseline_s, theirs = self._sample(baseline, 1)
            if check is not None:
                check(mine, theirs)
            del mine, theirs
            found = Pairs([], [])
            if baseline_s >= SLOW_S:
                found.ours.append(self._sample(ours, 1)[0])
                found.baseline.append(baseline_s)
            else:
                baseline_s = self._sample(baseline, 1)[0]
            ours_s = min(ours_s, self._sample(ours, 1)[0])
            calls = self._calls(ours_s), self._calls(baseline_s)
            round_s = ours_s * calls[0] + baseline_s * calls[1]
            wanted = min(max(MIN_PAIRS, round(self.budget_s / round_s)), MAX_PAIRS, pairs or 1000)
            while len(found.ours) < wanted:
                if len(found.ours) % 2:
                    found.baseline.append(self._sample(baseline, calls[1])[0])
                    found.ours.append(self._sample(ours, calls[0])[0])
                else:
                    found.ours.append(self._sample(ours, calls[0])[0])
                    found.baseline.append(self._sample(baseline, calls[1])[0])
        return found

    def alone(self, call: Call, repeats: int = 9) -> Stats:
        """Times one call by itself."""
        with _quiet():
            self._sample(call, 1)
            calls = self._calls(self._sample(call, 1)[0])
            return Stats.of([self._sample(call, calls)[0] for _ in range(repeats)])

    def _calls(self, seconds: float) -> int:
        """Counts the calls in one sample. On CUDA one: the next would read from the cache."""
        if self._flush is not None:
            return 1
        return min(max(1, round(SAMPLE_S / max(seconds, 1e-7))), MAX_CALLS)

    def _sample(self, call: Call, calls: int) -> tuple[float, Any]:
        """Measures (seconds per call, result of the last); results are freed outside of it."""
        if self._flush is not None:
            return self._sample_cuda(call)
        result = None
        begin = time.perf_counter()
        for _ in range(calls):
            result = call()
        return (time.perf_counter() - begin) / calls, result

    def _sample_cuda(self, call: Call) -> tuple[float, Any]:
        assert self._flush is not None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, result


@contextmanager
def _quiet() -> Iterator[None]:
    """Prevents garbage collection and autograd in a measurement."""
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        gc.enable()
