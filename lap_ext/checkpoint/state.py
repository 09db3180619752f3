# SPDX-License-Identifier: MIT
"""The working directory of a pruning, from which an interrupted one is resumed.

    .OUT.lap_ext/          next to OUT, on the same disk
        files/             becomes OUT, by one rename at the end
        state.json         the task, what is done, and a hash of both
        squared norms.safetensors
        rounds/            masks of rounds, one bit per weight
        lock               locked while a process works here (directory.py)

A shard counts as done once it is complete and on the disk. What is taken over from an earlier run
is compared with a hash first; of another task, or damaged, it is done anew, with a warning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lap_ext._files import small_file
from lap_ext.checkpoint import directory as owned
from lap_ext.errors import LapFileExistsError, LapOSError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_FILES, _ROUNDS = "files", "rounds"
_STATE, _SQUARED_NORMS = "state.json", "squared norms.safetensors"
_PARTS = (f"{_STATE}.part", f"{_SQUARED_NORMS}.part")
_LARGEST_STATE, _LARGEST_TENSORS = 1 << 26, 1 << 30  # bytes; larger ones are not ours
_OTHERS = {  # what the tasks of two runs differ in -> what the earlier one was of
    "path": "another directory",
    "files": "this directory before its files have changed",
    "network": "another model",
}


class Work:
    """The working directory of a run, locked by this process.

    Attributes:
        files: the directory that the result is written to.
        rounds: the directory of the masks of rounds.
        options: what the run does: a table for JSON. Only a run of equal options is resumed.
        facts: intermediate results, saved as JSON: "done" (name of a finished shard -> its
            checksums), and the results of the passes.
        notice: why the facts of an earlier run are not used, for a warning, or "".
    """

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        self.directory = directory
        self.files, self.rounds = directory / _FILES, directory / _ROUNDS
        self.options = json.loads(json.dumps(options))  # as it is read back
        self.facts: dict[str, Any] = {"done": {}}
        self.notice = ""

    def begin(self, resume: bool) -> None:
        """Takes over what an earlier run of the same task has left, or starts from nothing."""
        for name in (_STATE, _SQUARED_NORMS, *_PARTS):
            if (self.directory / name).is_dir():
                owned.delete(self.directory / name)
        for inner in (self.files, self.rounds):
            if not inner.is_dir():
                owned.delete(inner)
        found = any((self.directory / name).exists() for name in (_STATE, _FILES))
        problem = self.take_over() if resume and found else "of another run"
        if problem:
            if resume and found:
                self.notice = (
                    "The pruning starts anew: what an interrupted one has left in "
                    f"{str(self.directory)!r} is {problem}."
                )
            self.facts = {"done": {}}
            for name in (_FILES, _ROUNDS, _STATE, _SQUARED_NORMS, *_PARTS):
                owned.delete(self.directory / name)
            self.save()
        self.files.mkdir(exist_ok=True)
        self.rounds.mkdir(exist_ok=True)

    def take_over(self) -> str:
        """Reads the facts of an earlier run; says what they are if they can't be used, else ""."""
        try:
            state = json.loads(small_file(self.directory / _STATE, _LARGEST_STATE))
            options, facts = state["options"], state["facts"]
            if state != _sealed(options, facts):
                return "damaged"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "damaged"
        if options != self.options:
            differing = [x for x in _OTHERS if options.get(x) != self.options.get(x)]
            return f"of {_OTHERS[differing[0]] if differing else 'other options'}"
        self.facts = facts
        return ""

    def keep(self, names: Collection[str]) -> None:
        """Removes all files of the result so far but these."""
        for path in self.files.iterdir():
            if path.name not in names:
                owned.delete(path)

    def save(self) -> None:
        """Writes the facts atomically."""
        self._write(_STATE, json.dumps(_sealed(self.options, self.facts)).encode())

    def save_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Writes the results of the first pass; `save` adds their hash to the state."""
        from safetensors.torch import save

        data = save({name: x.contiguous() for name, x in tensors.items()})
        self._write(_SQUARED_NORMS, data)
        self.facts["tensors"] = _hash(data)

    def tensors(self) -> dict[str, Tensor] | None:
        """Reads what save_tensors has written; None if it is not there, or damaged."""
        from safetensors.torch import load

        try:
            data = small_file(self.directory / _SQUARED_NORMS, _LARGEST_TENSORS)
        except (OSError, ValueError):
            return None
        return load(data) if _hash(data) == self.facts["tensors"] else None

    def _write(self, name: str, data: bytes) -> None:
        """Writes a file atomically; the temporary one has a name that a resumed run expects."""
        temporary = self.directory / f"{name}.part"
        owned.delete(temporary)
        with on_disk(self.directory), temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / name)

    def finish(self, out: Path) -> None:
        """Renames the result to out, and removes the working directory."""
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.files.rename(out)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            raise _occupied("something that came meanwhile", error.errno) from None
        descriptor = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        owned.remove(self.directory)


def _sealed(options: Any, facts: Any) -> dict[str, Any]:
    """Makes the content of a state file: it has a hash of itself."""
    content = {"options": options, "facts": facts}
    return {**content, "sha256": _hash(json.dumps(content, sort_keys=True).encode())}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def working(out: Path, options: dict[str, Any], resume: bool) -> Iterator[Work]:
    """Opens the working directory of a task; it is kept for a later run if this one is interrupted.

    A wrong value in the data (ValueError, TypeError) would come again: then it is removed.
    """
    directory = out.with_name(f".{out.name}.lap_ext")
    with on_disk(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = owned.hold(directory, out, {_FILES, _ROUNDS, _STATE, _SQUARED_NORMS, *_PARTS})
    try:
        if occupied(out):  # it was not, before the lock
            owned.leave(directory)
            raise _occupied("the output of another run that has just ended", errno.EEXIST)
        work = Work(directory, options)
        try:
            work.begin(resume)
            yield work
        except BaseException as error:
            if not resume or isinstance(error, (ValueError, TypeError)):
                owned.remove(directory)
            raise
    finally:
        os.close(lock)


def occupied(path: Path) -> bool:
    """Whether a path leads to anything but an empty directory."""
    real = Path(os.path.realpath(path))  # links in a circle lead to a link
    return os.path.lexists(real) and (not real.is_dir() or any(real.iterdir()))


def _occupied(got: str, number: int | None) -> LapFileExistsError:
    return LapFileExistsError(
        "{argument} not to exist, or to be an empty directory",
        got,
        "Choose another name.",
        argument="out",
        number=number,
    )


@contextmanager
def on_disk(directory: Path) -> Iterator[None]:
    """Turns the errors of a full disk into one clear LapOSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _disk_full(error.errno, directory, "space", "none") from None


def check_free(directory: Path, size: int) -> None:
    """Raises LapOSError unless so many bytes are free."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise _disk_full(errno.ENOSPC, directory, f"{size:,} bytes", f"{free:,} bytes")


def _disk_full(number: int, directory: Path, needed: str, free: str) -> LapOSError:
    return LapOSError(
        f"{needed} on the disk of {str(directory)!r}",
        free,
        "Free some and call it again: what is done is kept.",
        number=number,
    )
