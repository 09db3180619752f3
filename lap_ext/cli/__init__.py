# SPDX-License-Identifier: MIT
"""The command line: lap-ext prune, score, inspect, verify, bench, demo, info.

It turns arguments into calls of the library and shows the results. Exit status: 0 success, 1 verify
has found a difference, 2 a usage error or an unusable file (one line on stderr), 130 stopped with
Ctrl-C, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lap_ext.cli import parser
from lap_ext.cli.output import line
from lap_ext.errors import LapError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class _Terminated(BaseException):
    """Raised at SIGTERM, so that half-written files are removed on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    try:
        options = parser.parse(argv)
    except SystemExit as stop:  # --help, --version, a wrong option
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with _terminating(), _warnings_as_lines(options.subcommand):
            return _run(options)
    except KeyboardInterrupt:
        line(sys.stderr, f"lap-ext {options.subcommand}: stopped.{_state_of_output(options)}")
        return 130
    except _Terminated:
        return 143
    except BrokenPipeError:  # nobody reads our output any more, as in lap-ext inspect ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            raise
        line(sys.stderr, f"lap-ext {options.subcommand}: {_text(error, options)}")
        return 2


def _state_of_output(options: Any) -> str:
    """Says what a stopped subcommand leaves of its output, and how to resume it."""
    if options.subcommand not in ("prune", "score") or options.out is None:
        return ""
    out = options.out.resolve()
    work = options.out.with_name(f".{out.name}.lap_ext")
    if options.subcommand == "prune" and work.is_dir():
        return f" Partial results are in {str(work)!r}. Run the same command again to resume."
    written = any(out.iterdir()) if out.is_dir() else out.exists()
    return f" {str(options.out)!r} was {'' if written else 'not '}written."


def _run(options: Any) -> int:
    from lap_ext.cli import commands  # torch is loaded here, not for --help

    status: int = commands.COMMANDS[options.subcommand](options)
    sys.stdout.flush()
    return status


def _text(error: Exception, options: Any) -> str:
    """Puts an error into one line, with arguments spelled as options."""
    if isinstance(error, LapError):
        names = parser.spellings(options.subcommand)
        text = error.text(lambda argument: names.get(argument, argument), named=error.final)
    elif isinstance(error, MemoryError):
        text = "out of memory. Give a smaller --memory, or run it on a larger machine."
    elif isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror.rstrip('.')}{where}."
    else:
        message = _joined(str(error)).rstrip(".")
        text = f"{type(error).__name__}: {message}. Run it with --debug for the traceback."
    return _joined(text)


def _joined(text: str) -> str:
    """Joins the lines of a text."""
    return " ".join(text.split())


@contextmanager
def _terminating() -> Iterator[None]:
    """Makes SIGTERM unwind as Ctrl-C does, where signals can be set (the main thread)."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings_as_lines(subcommand: str) -> Iterator[None]:
    """Shows each warning as one line on stderr, without the line of code that it came from."""

    def show(message: Warning | str, *_source: object, **_more: object) -> None:
        line(sys.stderr, f"lap-ext {subcommand}: warning: {_joined(str(message))}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
