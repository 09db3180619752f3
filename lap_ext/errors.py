# SPDX-License-Identifier: MIT
"""Defines the errors of lap_ext, which hold the parts of a message and build it when it is shown.

    <function>, layer '<layer>': expected <expected>, got <got>. <cure>

The code that raises an error knows what was expected, what it got and the cure, but not its caller.
`calling`, around every public function, adds the function; `in_layer`, around every loop over
layers, adds the layer. No code parses or rewrites a message: what the user would type, which is
another thing in Python and on the command line, has a mark in it.

    {argument}          the argument at fault        memory           --memory
    {scope='global'}    an option to give            scope='global'   --scope global
"""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

from lap_ext._text import shortened, visible

_F = TypeVar("_F", bound=Callable[..., Any])
_PACKAGE = str(Path(__file__).parent)
ARGUMENT = "{argument}"  # in the parts of an error: stands for the argument's name
_OPTION = re.compile(r"\{(\w+)=((?:[^{}]|\{[^{}]*\})*)\}")  # in what was expected, and in cures
Option = Callable[[str, str], str]  # name and value -> what the user types


def in_python(name: str, value: str) -> str:
    """Spells an option as an argument of a call."""
    return f"{name}={value}"


def _spelled(text: str, option: Option) -> str:
    """Replaces the marks of options."""
    return _OPTION.sub(lambda mark: option(mark[1], mark[2]), text)


class LapError(Exception):
    """The base class of all errors of lap_ext; its attributes are the parts of the message.

    Each subclass also derives from the usual built-in error: ValueError, TypeError, OSError, ...

    Attributes:
        expected: what was expected, with the reason in parentheses.
        got: what was passed or found; "" if expected alone is enough.
        cure: what the user can do about the error, in full sentences. In it and in expected,
            "{scope='global'}" stands for an option to give.
        argument: the argument at fault, if any; "{argument}" in the other parts stands for it.
        option: the cure in functions of tensors that have an option for such values, such as
            check_finite=False; it is shown instead of cure as long as no layer is known.
        layer: the layer of a model at fault, or None.
        function: the public function that was called, or None.

    Example:
        >>> error = LapValueError("{argument} >= 1", "0", argument="rounds")
        >>> print(error)
        expected rounds >= 1, got 0.
        >>> error.function, error.layer = "prune", "fc1"
        >>> print(error)
        prune, layer 'fc1': expected rounds >= 1, got 0.
        >>> error.text(spelled=lambda argument: f"--{argument}", named=False)
        "layer 'fc1': expected --rounds >= 1, got 0."
    """

    def __init__(
        self,
        expected: str,
        got: object = "",
        cure: str = "",
        *,
        argument: str | None = None,
        option: str = "",
        layer: str | None = None,
    ) -> None:
        got = str(got)
        self.args = (
            expected,
            got,
            cure,
        )  # here: OSError's __init__ has its own fields
        self.expected, self.got, self.cure = expected, got, cure
        self.argument, self.option = argument or None, option
        self.layer = layer
        self.function: str | None = None
        self.final = False  # the function was called in a user's callback: keep its name

    def text(
        self,
        spelled: Callable[[str], str] = str,
        option: Option = in_python,
        *,
        named: bool = True,
    ) -> str:
        """Builds the message.

        Args:
            spelled: converts an argument's name to what the user types, such as "--memory".
            option: converts an option and its value to what the user types: "--scope global".
            named: whether the message begins with the function's name.
        """
        cure = self.option if self.option and self.layer is None else self.cure
        where = [self.function] if named and self.function else []
        argument = spelled(self.argument) if self.argument else ""
        if self.layer is not None:
            if self.argument == "w" and ARGUMENT in self.expected:  # no argument of the user's call
                argument = f"layer {self.layer!r}"
            else:
                where.append(f"layer {self.layer!r}")
        parts = _spelled(self.expected, option), self.got, _spelled(cure, option)
        expected, got, cure = (shortened(part.replace(ARGUMENT, argument)) for part in parts)
        sentences = [f"expected {expected}{', got ' if got else ''}{got}."]
        if cure:
            sentences.append(cure)
        prefix = f"{shortened(', '.join(where))}: " if where else ""
        return visible(prefix + " ".join(sentences), keep="\n")

    def __str__(self) -> str:
        return self.text()


class LapValueError(LapError, ValueError):
    """A value, shape or file that lap_ext cannot accept."""


class LapTypeError(LapError, TypeError):
    """An argument of the wrong type or dtype."""


class TopologyError(LapValueError):
    """A model that lap_ext cannot trace; the message gives the layer, the operation and the cure.

    Example:
        >>> import lap_ext
        >>> issubclass(lap_ext.TopologyError, ValueError)
        True
    """


class LapImportError(LapError, ModuleNotFoundError):
    """An optional package that is required but not installed.

    Attributes:
        name: the name of the package, as in every ModuleNotFoundError.
    """

    def __init__(
        self,
        expected: str,
        got: object = "",
        cure: str = "",
        *,
        argument: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(expected, got, cure, argument=argument)
        self.name = name


class LapOSError(LapError, OSError):
    """A file or directory that cannot be read or written.

    Args:
        expected: as in `LapError`.
        got: as in `LapError`.
        cure: as in `LapError`.
        argument: as in `LapError`.
        number: the system's error number, for code that reads errno.

    Example:
        >>> import errno
        >>> error = LapOSError("8 bytes on the disk", "4 bytes", number=errno.ENOSPC)
        >>> print(error, error.errno == errno.ENOSPC)
        expected 8 bytes on the disk, got 4 bytes. True
    """

    def __init__(
        self,
        expected: str,
        got: object = "",
        cure: str = "",
        *,
        argument: str | None = None,
        number: int | None = None,
    ) -> None:
        super().__init__(expected, got, cure, argument=argument)
        self.__setstate__({"number": number})

    def __setstate__(self, state: Any) -> None:
        """Restores errno and strerror, which pickle does not keep."""
        super().__setstate__(state)
        if (number := state["number"]) is not None:
            self.errno, self.strerror = number, os.strerror(number)


class LapFileNotFoundError(LapOSError, FileNotFoundError):
    """A file or directory that does not exist."""


class LapFileExistsError(LapOSError, FileExistsError):
    """A file or directory that already exists where a new one is to be written."""


class LapRuntimeError(LapError, RuntimeError):
    """A call that is not valid in the current state."""


class _Context:
    """Completes the errors raised in a with block or, as a decorator, in each call."""

    def complete(self, error: LapError) -> None:
        """Adds to an error what this context knows."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, LapError) and not error.final:
            self.complete(error)

    def __call__(self, function: _F) -> _F:
        # not contextlib.ContextDecorator: torch.compile can trace this, but not our contexts
        @functools.wraps(function)
        def completing(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except LapError as error:
                if not error.final:
                    self.complete(error)
                raise

        return cast(_F, completing)


class calling(_Context):  # noqa: N801 (reads as a statement: with calling("prune"))
    """Adds the name of the public function that the user called (the outermost one) to its errors.

    Example:
        >>> @calling("halve")
        ... def halve(n):
        ...     raise LapValueError("an even {argument}", n, argument="n")
        >>> halve(3)
        Traceback (most recent call last):
        lap_ext.errors.LapValueError: halve: expected an even n, got 3.
    """

    def __init__(self, function: str) -> None:
        self.function = function

    def complete(self, error: LapError) -> None:
        """Adds the function to the error."""
        error.function = self.function


class in_layer(_Context):  # noqa: N801
    """Adds a layer's name to the errors raised in one iteration of a loop over layers.

    Example:
        >>> with in_layer("fc1"):
        ...     raise LapValueError("finite weights in {argument}", "inf", argument="w")
        Traceback (most recent call last):
        lap_ext.errors.LapValueError: expected finite weights in layer 'fc1', got inf.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def complete(self, error: LapError) -> None:
        """Adds the layer, unless the error already has one."""
        if error.layer is None:
            error.layer = self.layer


class callback(_Context):  # noqa: N801
    """Keeps errors from a user's function unchanged; they name the lap_ext function it called.

    Example:
        >>> @calling("score")
        ... def score(w):
        ...     raise LapTypeError("{argument} to be a tensor", type(w).__name__, argument="w")
        >>> with calling("prune"), in_layer("fc1"), callback():
        ...     score(None)
        Traceback (most recent call last):
        lap_ext.errors.LapTypeError: score: expected w to be a tensor, got NoneType.
    """

    def complete(self, error: LapError) -> None:
        """Makes the error final if it already names a function."""
        error.final = error.function is not None


class LapWarning(UserWarning):
    """A warning of lap_ext, with marks of options as in the cure of an error.

    Example:
        >>> warning = LapWarning("No layer is left. Use {scope='layer'}.")
        >>> print(warning)
        No layer is left. Use scope='layer'.
        >>> warning.text(lambda name, value: f"--{name} {value}")
        "No layer is left. Use --scope 'layer'."
    """

    def text(self, option: Option = in_python) -> str:
        """Builds the message; option: as in `LapError.text`."""
        return visible(_spelled(str(self.args[0]), option), keep="\n")

    def __str__(self) -> str:
        return self.text()


def warn(message: str) -> None:
    """Issues a warning that points to the line of the user's program that called lap_ext."""
    level, frame = 1, cast("FrameType | None", sys._getframe())
    while frame is not None:
        file = frame.f_code.co_filename
        importing = "importlib" in file and "_bootstrap" in file  # warnings does not count these
        if not importing and not file.startswith(_PACKAGE):
            break
        level, frame = level + (not importing), frame.f_back
    warnings.warn(LapWarning(message), stacklevel=level)
