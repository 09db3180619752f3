# SPDX-License-Identifier: MIT
"""The working folder of a run, from which an interrupted one goes on.

    .OUT.lap_ext/          beside OUT, on the same disk
        files/             what becomes OUT, by one rename at the end
        state.json         what was asked for, and what is done
        energies.safetensors
        lock               held while a run works here

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

from lap_ext.checkpoint.files import FUNCTION, wrong

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ENERGIES = "energies.safetensors"


class Work:
    """A working folder that this run holds.

    Attributes:
        files: where the result is written.
        facts: found on the way, JSON: "done" (names of shards), and what the passes have found.
    """

    def __init__(self, place: Path, asked: dict[str, Any]) -> None:
        self.place = place
        self.files = place / "files"
        self.asked = json.loads(json.dumps(asked))  # as it is read back
        self.facts: dict[str, Any] = {"done": []}

    def begin(self, resume: bool) -> None:
        """Takes over what an earlier run of the same task has left, or starts from nothing."""
        if resume and self._found():
            return
        self.facts = {"done": []}
        shutil.rmtree(self.files, ignore_errors=True)
        (self.place / _ENERGIES).unlink(missing_ok=True)
        self.files.mkdir()
        self.save()

    def _found(self) -> bool:
        try:
            state = json.loads((self.place / "state.json").read_bytes())
            if state["asked"] != self.asked or not self.files.is_dir():
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
        """Writes the facts, all or nothing; under a fixed name, which a resumed run knows as ours."""
        text = json.dumps({"asked": self.asked, "facts": self.facts}).encode()
        part = self.place / "state.json.part"
        with on_disk(self.place), part.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.place / "state.json")

    def save_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Keeps the state of the first pass."""
        from safetensors.torch import save_file

        part = self.place / f"{_ENERGIES}.part"
        with on_disk(self.place):
            save_file({name: x.contiguous() for name, x in tensors.items()}, part)
        part.replace(self.place / _ENERGIES)

    def tensors(self) -> dict[str, Tensor] | None:
        """What save_tensors was given; None if it was not, or not to the end."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.place / _ENERGIES)
        except (OSError, SafetensorError):
            return None

    def finish(self, out: Path) -> None:
        """The result takes its name."""
        out.parent.mkdir(parents=True, exist_ok=True)
        self.files.rename(out)
        folder = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        shutil.rmtree(self.place, ignore_errors=True)


@contextmanager
def working(out: Path, asked: dict[str, Any], resume: bool) -> Iterator[Work]:
    """A working folder for this task; kept for a later run if this one is interrupted.

    A wrong value in the data (ValueError, TypeError) would come again: then it is removed.
    """
    place = out.with_name(f".{out.name}.lap_ext")
    with on_disk(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True)
    with _locked(place, out):
        _check_ours(place)
        work = Work(place, asked)
        work.begin(resume)
        try:
            yield work
        except (ValueError, TypeError):
            shutil.rmtree(place, ignore_errors=True)
            raise
        except BaseException:
            if not resume:
                shutil.rmtree(place, ignore_errors=True)
            raise


def _check_ours(place: Path) -> None:
    ours = {"files", "state.json", "state.json.part", _ENERGIES, f"{_ENERGIES}.part", "lock"}
    foreign = sorted(path.name for path in place.iterdir() if path.name not in ours)
    if foreign:
        raise wrong(f"nothing but an earlier run's files in {str(place)!r}", foreign[0])


@contextmanager
def _locked(place: Path, out: Path) -> Iterator[None]:
    with (place / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{FUNCTION}: expected one run at a time that writes {str(out)!r}, got another one "
                "at work. Wait for it, or choose another name.",
            ) from None
        yield


@contextmanager
def on_disk(place: Path) -> Iterator[None]:
    """A full disk becomes one clear OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(error.errno, _full(place, "none")) from None
    except Exception as error:  # safetensors has an error of its own for it
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, _full(place, "none")) from None


def check_room(place: Path, size: int) -> None:
    """Raises OSError unless so many bytes are free."""
    free = shutil.disk_usage(place).free
    if free < size:
        raise OSError(errno.ENOSPC, _full(place, f"{free:,} bytes", f"{size:,} bytes"))


def _full(place: Path, free: str, size: str = "room") -> str:
    return (
        f"{FUNCTION}: expected {size} on the disk of {str(place)!r}, got {free}. Free some and call "
        "it again: what is done is kept."
    )
