# SPDX-License-Identifier: MIT
"""Reports progress, counted in bytes of weights that are read or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lap_ext.errors import LapTypeError, callback


@dataclass(frozen=True)
class Progress:
    """The progress of one step in pruning or scoring.

    Attributes:
        step: "measure" (measures neighbor norms), "score" (stores scores), "rank" (selects the
            weights to keep), "write" (writes the files of a checkpoint), "check" (reads again what
            an interrupted run has written), "verify", "count zeros" (in inspected layers), or
            "data" (runs a criterion on data of unknown length). Each round or pass reports a step
            once; norms that sequential orders measure again within a round are not reported.
        name: the name of the layer or tensor; "" stands for all of them.
        done: bytes of weights that the step has read or written so far.
        total: all bytes that the step will read or write, or 0 if this is not known.
    """

    step: str
    name: str
    done: int
    total: int


class Step:
    """Counts the bytes of one step of the work and reports them to the listener.

    Args:
        on_progress: the listener, or None.
        name: name of the step.
        total: bytes of weights that the step will read or write.

    Example:
        >>> step = Step(lambda event: print(event.name, event.done, event.total), "rank", 8)
        >>> step.read("fc", 4)
        fc 4 8
    """

    def __init__(
        self, on_progress: Callable[[Progress], Any] | None, name: str, total: int
    ) -> None:
        if on_progress is not None and not callable(on_progress):
            raise LapTypeError(
                "{argument} to be a function of a lap_ext.progress.Progress",
                type(on_progress).__name__,
                argument="on_progress",
            )
        self._on_progress = on_progress
        self.name = name
        self.done, self.total = 0, total

    def read(self, name: str, size: int) -> None:
        """Counts `size` more bytes of a layer or tensor and reports them to the listener."""
        self.done += size
        if self._on_progress is not None:
            with callback():
                self._on_progress(Progress(self.name, name, self.done, self.total))
