# SPDX-License-Identifier: MIT
"""The safetensors files of a checkpoint directory and where each tensor is in them, checked first.

    file        8 bytes n (little-endian) | n bytes of JSON: name -> dtype, shape, offsets | tensors
    directory   model.safetensors, or shards and model.safetensors.index.json: name -> shard

The safetensors package checks each header (offsets without holes or overlaps, sizes that fit dtypes
and the file); the same JSON is read here for the offsets, which that package does not expose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lap_ext._files import safetensors_package
from lap_ext.errors import LapValueError

MASKS = "lap_ext_masks.safetensors"  # the masks beside the weights
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SINGLE, _INDEX = "model.safetensors", ".safetensors.index.json"
_LEAST_WEIGHTS = 1_000_000  # bytes of a file that may hold weights
_LONGEST_JSON = 100_000_000  # bytes; the limit of safetensors for a header
_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".safetensors"}
_PICKLES = {".pt", ".pth", ".bin", ".pt2"}
_HIDDEN = {".git", ".cache"}  # what git and the hub's downloader keep beside a checkpoint


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
    path: Path
    head: int
    entries: tuple[Entry, ...]  # in the order of the file
    size: int


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
            if path.is_file() and str(inner) not in mine and not _HIDDEN & set(inner.parts):
                yield inner

    def unpruned(self) -> list[str]:
        """Lists other files that may hold the same weights again: they are copied as they are."""
        return [str(x) for x in self.others() if x.suffix in _WEIGHTS and not _is_small(self, x)]

    def stamps(self) -> list[list[Any]]:
        """Lists (name, size, time of change) of each file that decides the result."""
        names = [shard.name for shard in self.shards] + [self.index or "", "config.json"]
        paths = [(name, self.path / name) for name in names if name]
        stats = [(name, path.stat()) for name, path in paths if path.exists()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _is_small(checkpoint: Checkpoint, inner: Path) -> bool:
    """Whether a file is no more than settings (training_args.bin)."""
    return (checkpoint.path / inner).stat().st_size < _LEAST_WEIGHTS


def open_path(path: Path) -> Checkpoint:
    """Reads the headers of a checkpoint directory, or of a single safetensors file."""
    if path.suffix in _PICKLES:
        raise LapValueError("a checkpoint directory or a safetensors file", repr(str(path)))
    if path.is_file():
        return Checkpoint(path.parent, (read_shard(path),), None)
    return open_directory(path)


def open_directory(path: Path) -> Checkpoint:
    """Reads the headers of a checkpoint directory.

    Raises:
        LapValueError: a file is missing, damaged or of the wrong kind.
    """
    if not path.is_dir():
        raise LapValueError("a checkpoint directory", repr(str(path)))
    index = _index_of(path)
    if index is None:
        shards = [read_shard(path / _single_of(path))]
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
    if (path / _SINGLE).exists():
        return None
    names = sorted(p.name for p in path.glob(f"*{_INDEX}"))
    if f"model{_INDEX}" in names:
        return f"model{_INDEX}"
    if len(names) > 1:
        raise LapValueError(f"one index in {str(path)!r}", ", ".join(names))
    return names[0] if names else None


def _single_of(path: Path) -> str:
    """Finds the name of the one file that holds all tensors."""
    if (path / _SINGLE).exists():
        return _SINGLE
    names = sorted(p.name for p in path.glob("*.safetensors") if p.name != MASKS)
    if len(names) != 1:
        raise LapValueError(
            f"{_SINGLE} or {_SINGLE}.index.json in {str(path)!r}",
            ", ".join(names) if names else "neither",
            "Only safetensors are read: save the model with save_pretrained.",
        )
    return names[0]


def _shards_of(path: Path, index: str) -> list[Shard]:
    """Reads the files that an index names; they must hold the tensors that it says."""
    if (path / index).stat().st_size > _LONGEST_JSON:
        raise LapValueError(
            f"{index!r} of {_LONGEST_JSON} bytes at most", (path / index).stat().st_size
        )
    table = _parsed((path / index).read_bytes(), f"{index!r} to be JSON")
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
        raise LapValueError(f"{index!r} with a weight_map of tensor name -> file", "none")
    for name in sorted(set(table.values())):
        if Path(name).name != name or name in (".", "..") or "\0" in name:
            raise LapValueError(f"files beside {index!r}", repr(name))
        if not (path / name).exists():
            raise LapValueError(f"all files that {index!r} names", f"no {name!r} in {str(path)!r}")
    shards = [read_shard(path / name) for name in sorted(set(table.values()))]
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


def read_shard(path: Path) -> Shard:
    """Reads the header of a file, which safetensors checks first."""
    if not path.is_file():
        raise LapValueError(f"a file {path.name!r} in {str(path.parent)!r}", "something else")
    names = _checked(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = _parsed(file.read(length), f"{path.name!r} to have a JSON header")
    table.pop("__metadata__", None)
    if set(table) != names:
        raise LapValueError(
            f"each tensor once in the header of {path.name!r}",
            "a header that can be read in two ways",
            "Save the file again.",
        )
    entries = []
    for name, facts in table.items():
        begin, end = facts["data_offsets"]
        shape = tuple(map(int, facts["shape"]))
        entries.append(
            Entry(name, path.name, facts["dtype"], shape, 8 + length + begin, end - begin)
        )
    entries.sort(key=lambda entry: (entry.begin, entry.size))
    return Shard(path.name, path, 8 + length, tuple(entries), path.stat().st_size)


def _checked(path: Path) -> set[str]:
    """Lists the names in a file that safetensors accepts."""
    safetensors = safetensors_package("it checks the files")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise LapValueError(
            f"a complete safetensors file {path.name!r}",
            str(error).rstrip("."),
            "Download it again.",
        ) from None


def _parsed(text: bytes, expected: str) -> Any:
    """Parses JSON without duplicate keys."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    try:
        return json.loads(text, object_pairs_hook=table)
    except (ValueError, RecursionError) as error:
        raise LapValueError(expected, str(error).rstrip(".")) from None
