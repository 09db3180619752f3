# SPDX-License-Identifier: MIT
"""How far a work on many weights is, for on_progress: counted in bytes of weights that are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a pruning or scoring is, for on_progress.

    Attributes:
        step: "measure" (energies), "score" (scores that are kept), "rank" (which weights are kept;
            of a checkpoint: the cut of a ranking over more than is in memory), "write" (a
            checkpoint's files), or "data" (criteria that look at data, which has no known length).
        name: the layer or tensor; "" for all of them.
        done: bytes read so far, over all steps.
        total: bytes that will be read; grows if a ranking needs another pass.
    """

    step: str
    name: str
    done: int
    total: int


class Count:
    """The bytes that have been read of those that will be.

    Example:
        >>> count = Count(lambda progress: print(progress.step, progress.done, progress.total))
        >>> count.expect(8)
        >>> count.read("measure", "fc", 4)
        measure 4 8
    """

    def __init__(self, on_progress: Callable[[Progress], Any] | None) -> None:
        self.on_progress = on_progress
        self.done = self.total = 0

    def expect(self, size: int) -> None:
        """Size bytes more will be read."""
        self.total += size

    def read(self, step: str, name: str, size: int) -> None:
        """Size bytes more have been read."""
        self.done += size
        self.total = max(self.total, self.done)
        if self.on_progress is not None:
            self.on_progress(Progress(step, name, self.done, self.total))
