# SPDX-License-Identifier: MIT
"""The command line: lap-ext prune, score, inspect, verify, bench, demo, info.

Arguments -> prune -> report; no scoring of its own. Exit status: 0 all is well, 1 verify has findings,
2 a mistake or a bad file (one line on stderr), 130 stopped with Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lap_ext.cli import parser
from lap_ext.cli.output import line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

# Whom the library's messages name: not what its user has called.
_FUNCTION = re.compile(r"^([\w.]+: (?=expected )|(checkpoint\.)?(prune|scores|trace): )")
_MEMORY = re.compile(r"^expected memory (?=of )")  # an argument there, an option here


class _Terminated(BaseException):
    """SIGTERM: half-written files are removed on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    try:
        options = parser.parse(argv)
    except SystemExit as stop:  # --help, --version, a wrong option
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with _terminating(), _warnings_as_lines(options.verb):
            return _run(options)
    except KeyboardInterrupt:
        line(sys.stderr, f"lap-ext {options.verb}: stopped.{_goes_on(options)}")
        return 130
    except _Terminated:
        return 143
    except BrokenPipeError:  # the reader of our output has gone, as in lap-ext inspect ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            raise
        line(sys.stderr, f"lap-ext {options.verb}: {_text(error)}")
        return 2


def _goes_on(options: Any) -> str:
    """What there is of the result of a command that was not run to its end."""
    if options.verb not in ("prune", "score") or options.out is None:
        return ""
    out = options.out.resolve()
    work = options.out.with_name(f".{out.name}.lap_ext")
    if options.verb == "prune" and work.is_dir():
        return f" What is done is in {str(work)!r}: the same command goes on."
    written = any(out.iterdir()) if out.is_dir() else out.exists()
    return f" {str(options.out)!r} was {'' if written else 'not '}written."


def _run(options: Any) -> int:
    from lap_ext.cli import verbs  # torch is loaded here, not for --help

    status: int = verbs.VERBS[options.verb](options)
    sys.stdout.flush()
    return status


def _text(error: Exception) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    expected = (ValueError, TypeError, OSError, ModuleNotFoundError)
    if isinstance(error, MemoryError):
        return "out of memory. Give a smaller --memory, or run it on a larger machine."
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{_FUNCTION.sub('', error.strerror).rstrip('.')}{where}."
    if isinstance(error, expected) and "expected " in text:
        return _MEMORY.sub("expected --memory ", _FUNCTION.sub("", text))
    return f"{type(error).__name__}: {text.rstrip('.')}. Run it with --debug for the traceback.".strip()


@contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, where signals can be set (the main thread)."""

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
def _warnings_as_lines(verb: str) -> Iterator[None]:
    """A warning is one line on stderr, without the place in the library that it came from."""

    def show(message: Warning | str, *_place: object, **_more: object) -> None:
        text = _FUNCTION.sub("", " ".join(str(message).split()))
        line(sys.stderr, f"lap-ext {verb}: warning: {text}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
