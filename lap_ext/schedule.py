# SPDX-License-Identifier: MIT
"""Decides when to prune and how much: maps a training step to a sparsity or None.

    one_shot      s at one step
    linear        s0 + (s - s0) * u             the same number of weights each time
    cubic         s + (s0 - s) * (1 - u)^3      many at first, few at the end
    exponential   1 - (1 - s0) * ((1 - s) / (1 - s0))^u     the same fraction of the rest each time
    iterative     1 - (1 - ratio)^k             the given fraction of the rest, at the k-th pruning

The sparsity goes from s0 to s while u goes from 0 at step start to 1 at step end. Linear, cubic and
exponential prune at start, start + every, start + 2 * every, ... and at end, where the sparsity is
exactly s.

A schedule is a pure function of the step. It stores nothing, so a resumed run continues as if it
had never stopped. A sparsity is a fraction of all weights; if masks carry over, as in the paper's
iterative pruning, each step removes only what is missing to the new sparsity.

Sources: cubic is from Zhu and Gupta, "To prune, or not to prune", 2017; iterative is from Park et
al., ICLR 2020. Its one-shot variant, which prunes the dense net to 1 - (1 - ratio)^k at once, is
allocation.compounded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from lap_ext.errors import LapTypeError, LapValueError, calling
from lap_ext.ops import check
from lap_ext.ops.check import Number


class Schedule(Protocol):
    """Decides from the training step whether to prune and to what sparsity; any function will do.

    Example:
        >>> def every_thousand(step: int) -> float | None:
        ...     return 1 - 0.8 ** (step // 1000) if step % 1000 == 0 else None
        >>> schedule: Schedule = every_thousand
        >>> schedule(500), round(schedule(2000), 2)
        (None, 0.36)
    """

    def __call__(self, step: int, /) -> float | None:
        """Returns the sparsity to prune to at this step, or None not to prune."""
        ...


@dataclass(frozen=True)
class one_shot:  # noqa: N801 (reads as the function that it is used as)
    """Prunes once, at one step.

    Args:
        sparsity: the fraction of all weights to remove.
        at: the step at which to prune.

    Example:
        >>> schedule = one_shot(0.9, at=100)
        >>> schedule, schedule(99), schedule(100)
        (one_shot(sparsity=0.9, at=100), None, 0.9)
    """

    sparsity: Number
    at: int = 0

    @calling("one_shot")
    def __post_init__(self) -> None:
        check.keep_count(self.sparsity, None, 0)
        _steps(at=self.at)

    def __call__(self, step: int, /) -> float | None:
        """Returns the sparsity to prune to at this step, or None not to prune."""
        return float(self.sparsity) if step == self.at else None


@dataclass(frozen=True)
class _Ramp(ABC):
    """Grows from initial to sparsity between start and end.

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
        with calling(type(self).__name__):
            self._check()

    def _check(self) -> None:
        check.keep_count(self.sparsity, None, 0)
        check.keep_count(self.initial, None, 0, argument="initial")
        _steps(start=self.start, end=self.end)
        _steps(least=1, every=self.every)
        if self.end <= self.start:
            raise LapValueError(
                "{argument} < end",
                f"{self.start} and {self.end}",
                "Use one_shot to prune at one step.",
                argument="start",
            )
        if self.initial > self.sparsity:
            raise LapValueError(
                "{argument} <= sparsity (pruned weights do not return)",
                f"{self.initial} and {self.sparsity}",
                argument="initial",
            )

    def __call__(self, step: int, /) -> float | None:
        """Returns the sparsity to prune to at this step, or None not to prune."""
        if not self.start <= step <= self.end:
            return None
        if step == self.end:
            return float(self.sparsity)
        if (step - self.start) % self.every:
            return None
        first, last = float(self.initial), float(self.sparsity)
        value = self._between(first, last, (step - self.start) / (self.end - self.start))
        return min(max(value, first), last)  # rounding must not leave the range

    @abstractmethod
    def _between(self, first: float, last: float, u: float) -> float:
        """Returns the sparsity at u in (0, 1), between first and last."""


@dataclass(frozen=True)
class linear(_Ramp):  # noqa: N801
    """Removes the same number of weights at each pruning.

    Example:
        >>> schedule = linear(0.5, start=0, end=100, every=50)
        >>> schedule
        linear(sparsity=0.5, start=0, end=100, every=50, initial=0.0)
        >>> [schedule(step) for step in (0, 49, 50, 100, 101)]
        [0.0, None, 0.25, 0.5, None]
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
    """Removes the same fraction of the remaining weights at each pruning.

    Example:
        >>> schedule = exponential(0.75, start=0, end=100, every=50)
        >>> schedule(50)  # density (1 / 4)^(1 / 2)
        0.5
    """

    def _check(self) -> None:
        super()._check()
        if self.sparsity == 1:
            raise LapValueError(
                "{argument} < 1 (no number of equal fractions removes all)",
                self.sparsity,
                "Use linear or cubic.",
                argument="sparsity",
            )

    def _between(self, first: float, last: float, u: float) -> float:
        return 1 - (1 - first) * ((1 - last) / (1 - first)) ** u


@dataclass(frozen=True)
class iterative:  # noqa: N801
    """Removes the same fraction of the remaining weights several times, as in the lookahead paper.

    Args:
        ratio: the fraction of the remaining weights that each pruning removes.
        rounds: the number of prunings.
        every: the number of training steps from one pruning to the next.
        start: the step of the first pruning.

    Example:
        >>> schedule = iterative(0.5, rounds=3, every=100)
        >>> [schedule(step) for step in (0, 50, 100, 200, 300)]
        [0.5, None, 0.75, 0.875, None]
    """

    ratio: Number
    rounds: int
    every: int = 1
    start: int = 0

    @calling("iterative")
    def __post_init__(self) -> None:
        check.keep_count(self.ratio, None, 0, argument="ratio")
        _steps(start=self.start)
        _steps(least=1, rounds=self.rounds, every=self.every)

    def __call__(self, step: int, /) -> float | None:
        """Returns the sparsity to prune to at this step, or None not to prune."""
        done, off = divmod(step - self.start, self.every)
        if off or not 0 <= done < self.rounds:
            return None
        # as 1 - (1 - ratio)^k, without cancellation where the ratio is small
        return -math.expm1((done + 1) * math.log1p(-float(self.ratio))) if self.ratio < 1 else 1.0


def _steps(least: int = 0, **named: int) -> None:
    """Checks that numbers of steps are integers from least on."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise LapTypeError(
                "{argument} to be an int (training steps)", type(value).__name__, argument=name
            )
        if value < least:
            raise LapValueError(f"{{argument}} >= {least}", value, argument=name)
