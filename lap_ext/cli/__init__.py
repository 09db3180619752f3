# SPDX-License-Identifier: MIT
"""The command line: lap-ext prune, score, inspect, verify, report, bench, demo, info, help.

It turns arguments into calls of the library and shows the results. Exit status: 0 success, 1 verify
has found a difference, 2 a usage error or an unusable file (one line on stderr), 130 stopped with
Ctrl-C, 141 nobody reads the output, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lap_ext._text import visible
from lap_ext.cli import parser
from lap_ext.cli.output import drop, line, work_of
from lap_ext.errors import LapError, LapWarning

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


_LEFT = (signal.SIG_IGN, None)  # handlers that are left in place


class _Terminated(BaseException):
    """Raised at SIGTERM, so that half-written files are removed on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    try:
        return _main(argv)
    except BrokenPipeError:  # nobody reads our output any more, as in lap-ext inspect ... | head
        drop(sys.stdout)
        return 141


def _main(argv: Sequence[str] | None) -> int:
    try:
        options = parser.parse(argv)
    except SystemExit as stop:  # --help, --version, a wrong option
        _flush()
        return stop.code if isinstance(stop.code, int) else 2
    options.command = shlex.join(["lap-ext", *(sys.argv[1:] if argv is None else argv)])
    arrived: list[int] = []
    try:
        with _stopping(arrived), _warnings_as_lines(options.subcommand):
            return _run(options)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            arrived.append(signal.SIGINT)
        if arrived:
            return _stopped(arrived[0], options)
        if options.debug or not isinstance(error, Exception) or isinstance(error, BrokenPipeError):
            raise
        line(sys.stderr, f"lap-ext {options.subcommand}: {_text(error, options)}")
        return 2


def _stopped(number: int, options: Any) -> int:
    """Says what a signal has stopped, whatever error an import that it hit made of it."""
    if number == signal.SIGINT:
        line(sys.stderr, f"lap-ext {options.subcommand}: stopped.{_state_of_output(options)}")
    return 128 + number


def _state_of_output(options: Any) -> str:
    """Says what a stopped subcommand leaves of its output, and how to resume it."""
    if options.subcommand not in ("prune", "score") or options.out is None:
        return ""
    out, work = options.out, work_of(options.out)
    if options.subcommand == "prune" and work.is_dir():
        return f" Partial results are in {str(work)!r}. Run the same command again to resume."
    if out.is_dir() and out.stat().st_ino == vars(options).get("before"):
        return f" {str(out)!r} is as it was."
    written = any(out.iterdir()) if out.is_dir() else out.exists()
    return f" {str(out)!r} was {'' if written else 'not '}written."


def _run(options: Any) -> int:
    from lap_ext.cli import commands  # torch is loaded here, not for --help

    status: int = commands.COMMANDS[options.subcommand](options)
    _flush()
    return status


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _text(error: Exception, options: Any) -> str:
    """Puts an error into one line, with arguments spelled as options."""
    if isinstance(error, LapError):
        names, option = parser.spellings(options.subcommand), parser.options(options.subcommand)
        for given in parser.TARGETS:  # in place of a sparsity
            if getattr(options, given, None) is not None:
                names |= dict.fromkeys(("sparsity", "target"), names[given])
        text = error.text(lambda x: names.get(x, x), option, named=error.final)
    elif isinstance(error, MemoryError):
        text = "out of memory. Give a smaller --memory, or run it on a larger machine."
    elif isinstance(error, OSError) and error.strerror:
        where = f" ({visible(str(error.filename))})" if error.filename else ""
        text = f"{error.strerror.rstrip('.')}{where}."
    else:
        message = _joined(str(error)).rstrip(".")
        text = f"{type(error).__name__}: {message}. Run it with --debug for the traceback."
    return _joined(text)


def _joined(text: str) -> str:
    """Joins the lines of a text."""
    return " ".join(text.split())


@contextmanager
def _stopping(arrived: list[int]) -> Iterator[None]:
    """Makes SIGTERM unwind as Ctrl-C does, and notes which signal came; ignored ones stay so.

    Signals can be set in the main thread only.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    before = {}
    if threading.current_thread() is threading.main_thread():
        taken = [x for x in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(x) not in _LEFT]
        before = {number: signal.signal(number, stop) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings_as_lines(subcommand: str) -> Iterator[None]:
    """Shows each warning as one line on stderr, without the line of code that it came from."""

    def show(message: Warning | str, *_source: object, **_more: object) -> None:
        text = str(message)
        if isinstance(message, LapWarning):
            text = message.text(parser.options(subcommand))
        line(sys.stderr, f"lap-ext {subcommand}: warning: {_joined(text)}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
