# SPDX-License-Identifier: MIT
"""Tells a listener, on_progress, how far a step of the work is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far one step of a pruning or scoring is.

    Attributes:
        step: "measure" (norms of neighbors), "score" (scores that are stored), "rank" (which weights
            are kept), "write" (a checkpoint's files), "verify", "count zeros" (of layers that are
            inspected), or "data" (criteria that look at data, which has no known length). A step
            comes once in each round or pass; norms that are taken again within a round
            (sequential orders) are not told.
        name: the layer or tensor; "" for all of them.
        done: bytes of weights that the step has read, or written, so far.
        total: all bytes that it will read or write; 0: not known.
    """

    step: str
    name: str
    done: int
    total: int


class Step:
    """Counts the bytes of one step of the work and tells the listener.

    Args:
        on_progress: the listener, or None.
        name: of the step.
        total: bytes of weights that it will read or write.

    Example:
        >>> step = Step(lambda progress: print(progress.name, progress.done, progress.total), "rank", 8)
        >>> step.read("fc", 4)
        fc 4 8
    """

    def __init__(
        self, on_progress: Callable[[Progress], Any] | None, name: str, total: int
    ) -> None:
        self._on_progress = on_progress
        self.name = name
        self.done, self.total = 0, total

    def read(self, name: str, size: int) -> None:
        """Counts size bytes more, of a layer or tensor, and tells the listener."""
        self.done += size
        if self._on_progress is not None:
            self._on_progress(Progress(self.name, name, self.done, self.total))
