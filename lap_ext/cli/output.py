# SPDX-License-Identifier: MIT
"""Writes results to stdout, and progress with the time left to stderr.

On a terminal the progress is a bar (with rich, if it is installed) that disappears at the end;
elsewhere it is a line every few seconds. Work that takes less than a second shows none.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lap_ext._text import visible
from lap_ext.errors import LapError

_EVERY = 10.0  # seconds between lines where no bar can be drawn
_LATER = 1.0  # seconds before anything is shown


def line(stream: IO[str] | None, text: str) -> None:
    """Writes a text and the end of its line, as far as the stream can take it.

    Only line breaks are written as they are; every other control character is made visible. What
    nobody reads on stderr is dropped, with the buffer, which would fail once more at the exit.
    """
    if stream is None:  # closed since the start
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = visible(text, keep="\n").encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(f"{shown}\n")
        stream.flush()
    except BrokenPipeError:
        drop(stream)
        if stream is not sys.stderr:
            raise


def drop(stream: IO[str]) -> None:
    """Lets everything that is still written to a stream vanish."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def result(options: Any, facts: Mapping[str, Any], text: str, brief: str = "") -> None:
    """Prints the result of a subcommand: JSON with --json, one line with --quiet, else a text."""
    shown = brief if brief and options.quiet else text
    if options.json:
        shown = json.dumps(_finite(facts), indent=2, allow_nan=False)
    line(sys.stdout, shown)


def terminal_width() -> int | None:
    """Returns the letters of a line where results are shown; None if that is no terminal."""
    shown = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if shown else None


def _finite(value: Any) -> Any:
    """Replaces the numbers that JSON does not have by "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return list(map(_finite, value)) if isinstance(value, (list, tuple)) else value


def work_of(out: Path) -> Path:
    """Names the working directory of a pruning, which is beside out, or beside what it links to."""
    real = Path(os.path.realpath(out))
    return real.with_name(f".{real.name}.lap_ext")


@contextmanager
def writing(path: Path, done: str = "") -> Iterator[None]:
    """Adds the path to errors of the disk, and what is complete nevertheless (done)."""
    try:
        yield
    except LapError:  # it names the path
        raise
    except OSError as error:
        text = _failed(error.strerror or "", error.filename or path, done)
        raise OSError(error.errno, text) from None
    except Exception as error:  # safetensors has an error of its own
        if "No space left on device" not in str(error):
            raise
        raise OSError(errno.ENOSPC, _failed("No space left on device", path, done)) from None


def _failed(why: str, path: object, done: str) -> str:
    return f"{why} ({visible(str(path))}){done}"


class Progress:
    """Shows how far a subcommand is and how long it will still take.

    Example:
        >>> with Progress(show=False) as progress:
        ...     progress.step("read", 10)
        ...     progress.advance(3)
        ...     progress.done, progress.total
        (3, 10)
    """

    def __init__(self, show: bool = True, stream: IO[str] | None = None) -> None:
        self.stream: IO[str] | None = sys.stderr if stream is None else stream
        self.text, self.done, self.total = "", 0.0, 0.0
        self._started = self._shown = self._began = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        terminal = self.stream is not None and self.stream.isatty()
        self._rich = terminal and importlib.util.find_spec("rich") is not None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = (
            threading.Thread(target=self._show_periodically, daemon=True) if show else None
        )

    def __enter__(self) -> Progress:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._close()

    def step(self, text: str, total: float = 0) -> None:
        """Begins a step of the work; total: in the units of advance, 0 if it is not known."""
        with self._lock:
            self._close()
            self.text, self.done, self.total = text, 0, total
            self._began = time.monotonic()

    def advance(self, count: float = 1) -> None:
        """Counts so much more of the step as done."""
        self.done += count

    def follow(self, facts: Any) -> None:
        """Takes the progress that a library function reports, as its `on_progress`."""
        if (facts.step, facts.total) != (self.text, self.total) or facts.done < self.done:
            self.step(facts.step, facts.total)
        self.done = facts.done

    def refresh(self) -> None:
        """Shows the progress, if that is due."""
        with self._lock:
            now = time.monotonic()
            if now - self._started < _LATER:
                return
            if self._rich:
                self._draw()
            elif now - self._shown >= _EVERY:
                self._shown = now
                line(self.stream, f"{self.text}{self._left(now)}")

    def _show_periodically(self) -> None:
        while not self._over.wait(_LATER):
            self.refresh()

    def _left(self, now: float) -> str:
        if not self.total or not self.done or now == self._began:
            return " ..."
        left = (now - self._began) * (self.total / self.done - 1)
        return f": {self.done / self.total:.0%}, {max(left, 0):.0f} s left"

    def _draw(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Rich
            from rich.progress import TimeRemainingColumn as Remaining

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                Remaining(),
                TextColumn("left"),
            )
            self._bar = Rich(*columns, console=Console(file=self.stream), transient=True)
            self._task = self._bar.add_task(visible(self.text), total=None)
            self._bar.start()
        self._bar.update(
            self._task,
            description=visible(self.text),
            completed=self.done,
            total=self.total or None,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
