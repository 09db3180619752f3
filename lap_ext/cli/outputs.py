# SPDX-License-Identifier: MIT
"""Checks, before any work, where a subcommand would write.

    an output       is no input, lies in none, and is no other output: by its path with all links
                    followed, and by device and inode
    page and plots  replace only a page or plots that lap_ext wrote, or with --force any file; never
                    a directory, a pipe or a device

What the disk would refuse (a name too long, a directory that is not writable) is known now too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lap_ext._files import replacing
from lap_ext.cli.output import work_of, writing
from lap_ext.cli.parser import spellings
from lap_ext.errors import LapFileExistsError, LapFileNotFoundError, LapValueError
from lap_ext.report import kinds, plots


class _Output(NamedTuple):
    argument: str
    path: Path


class _TriedError(Exception):
    """Ends a trial before anything is written."""


def second(plot: Path) -> Path:
    """Names the plot of the distributions, which is written beside that of the layers."""
    return plot.with_stem(f"{plot.stem}-distributions")


def check(options: Any) -> None:
    """Raises unless all outputs can be written, and harm no input and no file of another kind."""
    if plot := vars(options).get("plot"):
        plots.check(plot)
    outputs = list(_outputs(options))
    _check_apart(options, outputs)
    for argument, path in outputs:
        if argument != "out":
            _check_file(argument, path, options.force, argument)


def check_page(options: Any, page: Path) -> None:
    """Raises unless the page of an earlier result can be written, and harms nothing."""
    _check_apart(options, [_Output("out", page)])
    _check_file("out", page, options.force, "report")


def _outputs(options: Any) -> Iterator[_Output]:
    """Lists what the subcommand writes."""
    given = vars(options)
    if (out := given["out"]) is not None:
        yield _Output("out", out)
    if options.subcommand == "prune":
        yield _Output("out", work_of(out))
    if (page := given.get("report")) is not None:
        yield _Output("report", page)
    if (plot := given.get("plot")) is not None:
        yield _Output("plot", plot)
        yield _Output("plot", second(plot))


def _check_apart(options: Any, outputs: Sequence[_Output]) -> None:
    """Raises if an output is an input or another output, or lies in one."""
    names = spellings(options.subcommand)
    inputs = [(name, vars(options).get(name)) for name in ("model", "checkpoint", "result")]
    places = [
        (f"{names[name]}, which is only read", Path(given))
        for name, given in inputs
        if given is not None and Path(given).exists()
    ]
    for argument, path in outputs:
        for name, place in places:
            inside = argument == "out" and path.is_dir() and _is_in(place, path)  # with --force
            if inside or _is_in(path, place):
                raise LapValueError(
                    f"{{argument}} apart from {name}",
                    repr(str(path)),
                    "Choose another name.",
                    argument=argument,
                )
        places.append((f"{names[argument]}, which is written too", path))


def _is_in(path: Path, place: Path) -> bool:
    """Tells whether a path is a place, lies in it, or is another name of a file in it."""
    path, place = Path(os.path.realpath(path)), Path(os.path.realpath(place))
    if any(_is_one(x, place) for x in (path, *path.parents)):
        return True
    return path.exists() and any(
        _is_one(path, Path(folder, name)) for folder, _, names in os.walk(place) for name in names
    )


def _is_one(a: Path, b: Path) -> bool:
    """Tells whether two names are of one file; new ones that differ in case may become one."""
    if a.exists() and b.exists():
        return a.samefile(b)
    return str(a).casefold() == str(b).casefold()


def _check_file(argument: str, path: Path, force: bool, kind: str) -> None:
    """Raises unless a page or plot can be written, and what it replaces is one, or force is set."""
    if not Path(os.path.realpath(path)).parent.is_dir():
        expected = "{argument} in a directory that exists"
        raise LapFileNotFoundError(expected, repr(str(path)), argument=argument)
    with writing(path), suppress(_TriedError), replacing(path):
        raise _TriedError
    begins = kinds.PAGE if kind == "report" else kinds.PLOTS.get(path.suffix, ())
    if not force and not kinds.is_one(path, begins):
        raise LapFileExistsError(
            f"{{argument}} to be a new file, or a {kind} that lap_ext wrote",
            f"another file {str(path)!r}",
            "Choose another name, or add --force to replace it.",
            argument=argument,
        )
