# SPDX-License-Identifier: MIT
"""The safetensors files of a checkpoint directory and where each tensor is in them, checked first.

    file        8 bytes n (little-endian) | n bytes of JSON: name -> dtype, shape, offsets | tensors
    directory   model.safetensors, or shards and model.safetensors.index.json: name -> shard

The safetensors package checks each header (offsets without holes or overlaps, sizes that fit dtypes
and the file); the same JSON is read here for the offsets, which that package does not expose.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lap_ext._files import parsed_json, safetensors_package, small_file
from lap_ext.checkpoint import inside
from lap_ext.checkpoint.inside import Stamp
from lap_ext.errors import LapValueError

MASKS = "lap_ext_masks.safetensors"  # the masks beside the weights
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SINGLE, _INDEX = "model.safetensors", ".safetensors.index.json"
_LEAST_WEIGHTS = 1_000_000  # bytes of a file that may hold weights
_LONGEST_JSON = 100_000_000  # bytes; the limit of safetensors for a header
_LONGEST_NAME = 1_000
_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".safetensors"}
_PICKLES = {".pt", ".pth", ".bin", ".pt2"}
_BESIDE = (MASKS, "config.json", "lap_ext.json")  # what may be read beside a single file


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, as its bytes [begin, begin + size)."""

    name: str
    shard: str
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Slice:
    """A stored tensor that holds elements [begin, begin + entry.numel) of a parameter."""

    entry: Entry
    begin: int


Copy = tuple[Slice, ...]  # all elements of a parameter, in order


def size_of(copy: Copy) -> int:
    """Counts the bytes of a copy of a parameter."""
    return sum(x.entry.size for x in copy)


@dataclass(frozen=True)
class Shard:
    """A file: head bytes, then its entries without gaps."""

    name: str
    path: Path  # the real one, if its name is a link
    head: int
    entries: tuple[Entry, ...]  # in the order of the file
    stamp: Stamp  # of the file whose head was read

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.stamp.size


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its shards in order of name, and the index if there is one."""

    path: Path
    shards: tuple[Shard, ...]
    index: str | None

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by name."""
        return {entry.name: entry for shard in self.shards for entry in shard.entries}

    @property
    def size(self) -> int:
        """Bytes of the files that hold the weights."""
        return sum(shard.size for shard in self.shards)

    @property
    def masks(self) -> Path | None:
        """The mask file beside the weights, if there is one."""
        path = self.path / MASKS
        return path if path.is_file() else None

    def others(self) -> Iterator[Path]:
        """Lists all other files, relative to the directory, without those of git and of caches."""
        mine = {shard.name for shard in self.shards} | {MASKS}
        for path in sorted(self.path.rglob("*")):
            inner = path.relative_to(self.path)
            if path.is_file() and str(inner) not in mine and not inside.HIDDEN & set(inner.parts):
                yield inner

    def unpruned(self) -> list[str]:
        """Lists other files that may hold the same weights again: they are copied as they are."""
        return [str(x) for x in self.others() if x.suffix in _WEIGHTS and not _is_small(self, x)]


def _is_small(checkpoint: Checkpoint, inner: Path) -> bool:
    """Whether a file is no more than settings (training_args.bin)."""
    return (checkpoint.path / inner).stat().st_size < _LEAST_WEIGHTS


def open_path(path: Path) -> Checkpoint:
    """Reads the headers of a checkpoint directory, or of a single safetensors file."""
    if path.suffix in _PICKLES:
        raise LapValueError("a checkpoint directory or a safetensors file", repr(str(path)))
    if path.is_file():  # perhaps by a link: that is the user's choice
        for name in _BESIDE:
            inside.real(path.parent, name)
        return Checkpoint(path.parent, (read_shard(path, Path(os.path.realpath(path))),), None)
    return open_directory(path)


def open_directory(path: Path) -> Checkpoint:
    """Reads the headers of a checkpoint directory.

    Raises:
        LapValueError: a file is missing, damaged, of the wrong kind, or a link that leaves the
            directory.
    """
    if not path.is_dir():
        raise LapValueError("a checkpoint directory", repr(str(path)))
    index = _index_of(path)
    if index is None:
        single = path / _single_of(path)
        inside.check(path)
        shards = [read_shard(single, inside.real(path, single.name))]
    else:
        shards = _shards_of(path, index)
    seen: dict[str, str] = {}
    for entry in (entry for shard in shards for entry in shard.entries):
        if entry.name in seen:
            both = f"{seen[entry.name]!r} and {entry.shard!r}"
            raise LapValueError(f"one tensor {entry.name!r}", f"it in both {both}")
        seen[entry.name] = entry.shard
    return Checkpoint(path, tuple(shards), index)


def _index_of(path: Path) -> str | None:
    """Finds the index file's name; None where one file holds everything."""
    if (path / SINGLE).exists():
        return None
    names = sorted(p.name for p in path.glob(f"*{_INDEX}"))
    if f"model{_INDEX}" in names:
        return f"model{_INDEX}"
    if len(names) > 1:
        raise LapValueError(f"one index in {str(path)!r}", ", ".join(names))
    return names[0] if names else None


def _single_of(path: Path) -> str:
    """Finds the name of the one file that holds all tensors."""
    if (path / SINGLE).exists():
        return SINGLE
    names = sorted(p.name for p in path.glob("*.safetensors") if p.name != MASKS)
    if len(names) != 1:
        raise LapValueError(
            f"{SINGLE} or {SINGLE}.index.json in {str(path)!r}",
            ", ".join(names) if names else "neither",
            "Only safetensors are read: save the model with save_pretrained.",
        )
    return names[0]


def _shards_of(path: Path, index: str) -> list[Shard]:
    """Reads the files that an index names; they must hold the tensors that it says."""
    inside.check(path)
    text = small_file(inside.real(path, index), _LONGEST_JSON)
    table = parsed(text, f"{index!r} to be JSON")
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
        raise LapValueError(f"{index!r} with a weight_map of tensor name -> file", "none")
    for name in sorted(set(table.values())):
        length = len(name.encode("utf-8", "surrogatepass"))
        if Path(name).name != name or name in (".", "..") or "\0" in name or length > 255:
            raise LapValueError(f"files beside {index!r}", repr(name))
        if not name.endswith(".safetensors") or name.casefold() == MASKS:
            expected = f"weights in .safetensors files other than {MASKS!r} in {index!r}"
            raise LapValueError(expected, repr(name))
        if not (path / name).exists():
            raise LapValueError(f"all files that {index!r} names", f"no {name!r} in {str(path)!r}")
    names = sorted(set(table.values()))
    shards = [read_shard(path / name, inside.real(path, name)) for name in names]
    held = {entry.name: shard.name for shard in shards for entry in shard.entries}
    for name in sorted(held.keys() ^ table.keys()):
        if name in table:
            raise LapValueError(
                f"{name!r} in {table[name]!r}, as {index!r} says", "a file without it"
            )
        raise LapValueError(
            f"{name!r} of {held[name]!r} to be in {index!r} too", "an index without it"
        )
    for name, shard in table.items():
        if held[name] != shard:
            raise LapValueError(
                f"{name!r} in {shard!r}, as {index!r} says", f"it in {held[name]!r}"
            )
    return shards


def read_shard(path: Path, real: Path) -> Shard:
    """Reads the header of a file, which safetensors checks first; real: its path without links."""
    if not path.is_file():
        raise LapValueError(f"a file {path.name!r} in {str(path.parent)!r}", "something else")
    with inside.opened(real) as file:
        names = _checked(path.name, real)
        stamp = Stamp.of(os.fstat(file.fileno()))
        if Stamp.of(real.stat()) != stamp:  # safetensors has opened it by its name
            raise inside.changed(path.name)
        length = int.from_bytes(file.read(8), "little")
        table = parsed(file.read(length), f"{path.name!r} to have a JSON header")
    table.pop("__metadata__", None)
    if set(table) != names or not all(isinstance(facts, dict) for facts in table.values()):
        raise LapValueError(
            f"each tensor once in the header of {path.name!r}",
            "a header that can be read in two ways",
            "Save the file again.",
        )
    if max(map(len, names), default=0) > _LONGEST_NAME:  # patterns are searched in them
        raise LapValueError(
            f"names of at most {_LONGEST_NAME:,} characters in {path.name!r}", "a longer one"
        )
    entries = []
    for name, facts in table.items():
        begin, end = facts["data_offsets"]
        shape = tuple(map(int, facts["shape"]))
        entries.append(
            Entry(name, path.name, facts["dtype"], shape, 8 + length + begin, end - begin)
        )
    entries.sort(key=lambda entry: (entry.begin, entry.size))
    return Shard(path.name, real, 8 + length, tuple(entries), stamp)


def _checked(name: str, path: Path) -> set[str]:
    """Lists the names in a file that safetensors accepts."""
    safetensors = safetensors_package("it checks the files")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise LapValueError(
            f"a complete safetensors file {name!r}",
            str(error).rstrip("."),
            "Download it again.",
        ) from None


def parsed(text: bytes, expected: str, *, finite: bool = True) -> Any:
    """Parses JSON from a file; an error says what was expected of it."""
    try:
        return parsed_json(text, _LONGEST_JSON, finite=finite)
    except LapValueError as error:
        raise LapValueError(expected, error.got) from None
