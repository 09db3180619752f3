# SPDX-License-Identifier: MIT
"""Progress events, counted in bytes of weights read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lap_ext.errors import callback


@dataclass(frozen=True)
class Progress:
    """The progress of one step of a pruning or scoring.

    Attributes:
        step: "measure" (neighbor norms), "score" (scores that are stored), "rank" (selects the
            weights to keep), "write" (the files of a checkpoint), "verify", "count zeros" (of
            inspected layers), or "data" (criteria that use data, whose length is not known). Each
            round or pass reports a step once; norms that are measured again within a round
            (sequential orders) are not reported.
        name: the layer or tensor; "" for all of them.
        done: bytes of weights that the step has read, or written, so far.
        total: all bytes that it will read or write; 0: not known.
    """

    step: str
    name: str
    done: int
    total: int


class Step:
    """Counts the bytes of one step of the work and reports them to the listener.

    Args:
        on_progress: the listener, or None.
        name: of the step.
        total: bytes of weights that it will read or write.

    Example:
        >>> step = Step(lambda event: print(event.name, event.done, event.total), "rank", 8)
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
        """Counts size more bytes, of a layer or tensor, and reports them to the listener."""
        self.done += size
        if self._on_progress is not None:
            with callback():
                self._on_progress(Progress(self.name, name, self.done, self.total))
