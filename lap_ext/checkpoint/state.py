# SPDX-License-Identifier: MIT
"""The working directory of a pruning, from which an interrupted one is resumed.

    .OUT.lap_ext/          next to OUT, on the same disk
        files/             becomes OUT, by one rename at the end
        state.json         the options, and what is done
        squared norms.safetensors
        lock               locked while a process works here

A shard counts as done once it is complete and on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lap_ext.errors import LapOSError, LapValueError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SQUARED_NORMS = "squared norms.safetensors"


class Work:
    """The working directory of a run, locked by this process.

    Attributes:
        files: the directory that the result is written to.
        facts: intermediate results, saved as JSON: "done" (the names of finished shards), and the
            results of the passes.
    """

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        self.directory = directory
        self.files = directory / "files"
        self.options = json.loads(json.dumps(options))  # as it is read back
        self.facts: dict[str, Any] = {"done": []}

    def begin(self, resume: bool) -> None:
        """Takes over what an earlier run of the same task has left, or starts from nothing."""
        if resume and self._load():
            return
        self.facts = {"done": []}
        shutil.rmtree(self.files, ignore_errors=True)
        (self.directory / _SQUARED_NORMS).unlink(missing_ok=True)
        self.files.mkdir()
        self.save()

    def _load(self) -> bool:
        """Reads the facts of an earlier run; False if they are of another task, or damaged."""
        try:
            state = json.loads((self.directory / "state.json").read_bytes())
            if state["options"] != self.options or not self.files.is_dir():
                return False
            self.facts = dict(state["facts"])
            return isinstance(self.facts["done"], list)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def has(self, name: str, size: int) -> bool:
        """Whether a shard is done and still there."""
        path = self.files / name
        return name in self.facts["done"] and path.is_file() and path.stat().st_size == size

    def save(self) -> None:
        """Writes the facts atomically; the temporary file has a name that a resumed run expects."""
        text = json.dumps({"options": self.options, "facts": self.facts}).encode()
        temporary = self.directory / "state.json.part"
        with on_disk(self.directory), temporary.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / "state.json")

    def save_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Saves the results of the first pass."""
        from safetensors.torch import save_file

        temporary = self.directory / f"{_SQUARED_NORMS}.part"
        with on_disk(self.directory):
            save_file({name: x.contiguous() for name, x in tensors.items()}, temporary)
        temporary.replace(self.directory / _SQUARED_NORMS)

    def tensors(self) -> dict[str, Tensor] | None:
        """Reads what save_tensors has saved; None if there is nothing, or it is incomplete."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.directory / _SQUARED_NORMS)
        except (OSError, SafetensorError):
            return None

    def finish(self, out: Path) -> None:
        """Renames the result to out, and removes the working directory."""
        out.parent.mkdir(parents=True, exist_ok=True)
        self.files.rename(out)
        descriptor = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def working(out: Path, options: dict[str, Any], resume: bool) -> Iterator[Work]:
    """Opens the working directory of a task; it is kept for a later run if this one is interrupted.

    A wrong value in the data (ValueError, TypeError) would come again: then it is removed.
    """
    directory = out.with_name(f".{out.name}.lap_ext")
    with on_disk(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(exist_ok=True)
    with _locked(directory, out):
        _check_ours(directory)
        work = Work(directory, options)
        work.begin(resume)
        try:
            yield work
        except (ValueError, TypeError):
            shutil.rmtree(directory, ignore_errors=True)
            raise
        except BaseException:
            if not resume:
                shutil.rmtree(directory, ignore_errors=True)
            raise


def _check_ours(directory: Path) -> None:
    ours = {
        "files",
        "state.json",
        "state.json.part",
        _SQUARED_NORMS,
        f"{_SQUARED_NORMS}.part",
        "lock",
    }
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in ours)
    if foreign:
        raise LapValueError(f"nothing but an earlier run's files in {str(directory)!r}", foreign[0])


@contextmanager
def _locked(directory: Path, out: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LapOSError(
                f"one process at a time that writes {str(out)!r}",
                "another one at work",
                "Wait for it, or choose another name.",
                number=error.errno,
            ) from None
        yield


@contextmanager
def on_disk(directory: Path) -> Iterator[None]:
    """Turns the errors of a full disk into one clear LapOSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _disk_full(error.errno, directory, "space", "none") from None
    except Exception as error:  # safetensors raises an error of its own
        if "No space left" not in str(error):
            raise
        raise _disk_full(errno.ENOSPC, directory, "space", "none") from None


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
