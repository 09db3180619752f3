# SPDX-License-Identifier: MIT
"""When to prune, and how much: a training step -> the sparsity to prune to, or None.

    one_shot      s at one step
    linear        s0 + (s - s0) * u             the same number of weights each time
    cubic         s + (s0 - s) * (1 - u)^3      many at first, few at the end
    exponential   1 - (1 - s0) * ((1 - s) / (1 - s0))^u     the same fraction of the rest each time
    iterative     1 - (1 - ratio)^k             the same, told by the fraction: the k-th of rounds

u goes from 0 at step start to 1 at step end. Linear, cubic and exponential prune at start,
start + every, start + 2 * every, ... and at end, where the sparsity is exactly s.

A schedule is a pure function of the step: it remembers nothing, so a resumed run goes on as if it
had never stopped. A sparsity counts from all weights; with masks that carry over, as in the paper's
iterative pruning, each step removes the difference.

Sources: cubic in Zhu and Gupta, "To prune, or not to prune", 2017; iterative in Park et al., ICLR
2020, whose one-shot variant prunes the dense net to 1 - (1 - ratio)^k at once: see allocation.paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from lap_ext.ops import check
from lap_ext.ops.check import Number


class Schedule(Protocol):
    """Anything that is called with a training step; your own function will do.

    Example:
        >>> def every_thousand(step: int) -> float | None:
        ...     return 1 - 0.8 ** (step // 1000) if step % 1000 == 0 else None
        >>> schedule: Schedule = every_thousand
        >>> schedule(500), round(schedule(2000), 2)
        (None, 0.36)
    """

    def __call__(self, step: int, /) -> float | None:
        """The sparsity to prune to at this step; None: do not prune."""
        ...


@dataclass(frozen=True)
class one_shot:  # noqa: N801 (reads as the function that it is used as)
    """Prunes once.

    Args:
        sparsity: the fraction removed.
        at: the step.

    Example:
        >>> schedule = one_shot(0.9, at=100)
        >>> schedule, schedule(99), schedule(100)
        (one_shot(sparsity=0.9, at=100), None, 0.9)
    """

    sparsity: Number
    at: int = 0

    def __post_init__(self) -> None:
        check.keep_count("one_shot", self.sparsity, None, 0)
        _steps("one_shot", at=self.at)

    def __call__(self, step: int, /) -> float | None:
        """The sparsity to prune to at this step; None: do not prune."""
        return float(self.sparsity) if step == self.at else None


@dataclass(frozen=True)
class _Ramp:
    """From initial to sparsity between start and end.

    Args:
        sparsity: the fraction removed at the end.
        start: step of the first pruning.
        end: step of the last one.
        every: steps from one pruning to the next.
        initial: the sparsity at start.
    """

    sparsity: Number
    start: int
    end: int
    every: int = 1
    initial: Number = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for sparsity in (self.sparsity, self.initial):
            check.keep_count(name, sparsity, None, 0)
        _steps(name, start=self.start, end=self.end)
        _steps(name, least=1, every=self.every)
        if self.end <= self.start:
            raise ValueError(
                f"{name}: expected start < end, got {self.start} and {self.end}. "
                "Use one_shot to prune at one step."
            )
        if self.initial > self.sparsity:
            raise ValueError(
                f"{name}: expected initial <= sparsity (pruned weights do not return), got "
                f"{self.initial} and {self.sparsity}."
            )

    def __call__(self, step: int, /) -> float | None:
        """The sparsity to prune to at this step; None: do not prune."""
        if not self.start <= step <= self.end:
            return None
        if step == self.end:
            return float(self.sparsity)
        if (step - self.start) % self.every:
            return None
        first, last = float(self.initial), float(self.sparsity)
        value = self._between(first, last, (step - self.start) / (self.end - self.start))
        return min(max(value, first), last)  # rounding must not leave the range

    def _between(self, first: float, last: float, u: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class linear(_Ramp):  # noqa: N801
    """Removes the same number of weights each time.

    Example:
        >>> schedule = linear(0.5, start=0, end=100, every=50)
        >>> schedule, [schedule(step) for step in (0, 49, 50, 100, 101)]
        (linear(sparsity=0.5, start=0, end=100, every=50, initial=0.0), [0.0, None, 0.25, 0.5, None])
    """

    def _between(self, first: float, last: float, u: float) -> float:
        return first + (last - first) * u


@dataclass(frozen=True)
class cubic(_Ramp):  # noqa: N801
    """Removes many weights at first and few at the end (Zhu and Gupta, 2017).

    Example:
        >>> schedule = cubic(0.5, start=0, end=100, every=50)
        >>> schedule(50)  # 0.5 - 0.5 * (1 / 2)^3
        0.4375
    """

    def _between(self, first: float, last: float, u: float) -> float:
        return last + (first - last) * (1 - u) ** 3


@dataclass(frozen=True)
class exponential(_Ramp):  # noqa: N801
    """Removes the same fraction of what is left each time.

    Example:
        >>> schedule = exponential(0.75, start=0, end=100, every=50)
        >>> schedule(50)  # density (1 / 4)^(1 / 2)
        0.5
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity == 1:
            raise ValueError(
                "exponential: expected sparsity < 1 (no number of equal fractions removes all), "
                f"got {self.sparsity}. Use linear or cubic."
            )

    def _between(self, first: float, last: float, u: float) -> float:
        return 1 - (1 - first) * ((1 - last) / (1 - first)) ** u


@dataclass(frozen=True)
class iterative:  # noqa: N801
    """The paper's iterative pruning: the same fraction of what is left, so many times.

    Args:
        ratio: the fraction of the remaining weights that each pruning removes.
        rounds: how often.
        every: steps from one pruning to the next, the training between them.
        start: step of the first one.

    Example:
        >>> schedule = iterative(0.5, rounds=3, every=100)
        >>> [schedule(step) for step in (0, 50, 100, 200, 300)]
        [0.5, None, 0.75, 0.875, None]
    """

    ratio: Number
    rounds: int
    every: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        check.keep_count("iterative", self.ratio, None, 0)
        _steps("iterative", start=self.start)
        _steps("iterative", least=1, rounds=self.rounds, every=self.every)

    def __call__(self, step: int, /) -> float | None:
        """The sparsity to prune to at this step; None: do not prune."""
        done, off = divmod(step - self.start, self.every)
        if off or not 0 <= done < self.rounds:
            return None
        # as 1 - (1 - ratio)^k, without cancellation where the ratio is small
        return -math.expm1((done + 1) * math.log1p(-float(self.ratio))) if self.ratio < 1 else 1.0


def _steps(function: str, least: int = 0, **named: int) -> None:
    """Counts of steps are whole numbers."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"{function}: expected {name} to be an int (training steps), "
                f"got {type(value).__name__}."
            )
        if value < least:
            raise ValueError(f"{function}: expected {name} >= {least}, got {value}.")
