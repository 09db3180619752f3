# SPDX-License-Identifier: MIT
"""The safetensors files of a checkpoint folder: which tensors lie where, checked before anything else.

    file    8 bytes n (little-endian) | n bytes of JSON: name -> dtype, shape, offsets | the tensors
    folder  model.safetensors, or shards and model.safetensors.index.json: name -> shard

The safetensors package checks each header (offsets without holes or overlaps, sizes that fit dtypes
and the file); the same JSON is read here for the offsets, which that package does not tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lap_ext._files import safetensors_package

FUNCTION = "checkpoint.prune"  # whom errors name, unless they pass through `naming`
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
    """One tensor in a file: its bytes are [begin, begin + size)."""

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
class Piece:
    """A tensor in a file that holds elements [begin, begin + entry.numel) of a parameter."""

    entry: Entry
    begin: int


Copy = tuple[Piece, ...]  # all of a parameter, in order


def size_of(copy: Copy) -> int:
    """Bytes of a copy of a parameter."""
    return sum(piece.entry.size for piece in copy)


@dataclass(frozen=True)
class Shard:
    """One file: head bytes, then its entries without gaps."""

    name: str
    path: Path
    head: int
    entries: tuple[Entry, ...]  # in the order of the file
    size: int


@dataclass(frozen=True)
class Folder:
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
        """All other files, relative to the folder; folders of git and of download caches left out."""
        mine = {shard.name for shard in self.shards} | {MASKS}
        for path in sorted(self.path.rglob("*")):
            inner = path.relative_to(self.path)
            if path.is_file() and str(inner) not in mine and not _HIDDEN & set(inner.parts):
                yield inner

    def unpruned(self) -> list[str]:
        """Other files that may hold the same weights once more: they are copied as they are."""
        return [str(x) for x in self.others() if x.suffix in _WEIGHTS and not _is_small(self, x)]

    def stamps(self) -> list[list[Any]]:
        """(name, size, time of change) of each file that decides the result."""
        names = [shard.name for shard in self.shards] + [self.index or "", "config.json"]
        found = [(name, (self.path / name)) for name in names if name]
        stats = [(name, path.stat()) for name, path in found if path.exists()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _is_small(folder: Folder, inner: Path) -> bool:
    """Whether a file is no more than settings (training_args.bin)."""
    return (folder.path / inner).stat().st_size < _LEAST_WEIGHTS


def wrong(expected: str, got: object, cure: str = "") -> ValueError:
    """A ValueError in the house's form."""
    return ValueError(f"{FUNCTION}: expected {expected}, got {got}.{' ' if cure else ''}{cure}")


@contextmanager
def naming(function: str) -> Iterator[None]:
    """Lets errors of the steps that several functions share name the one that was called."""
    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        text = str(error)
        if text.startswith(FUNCTION):
            text = function + text.removeprefix(FUNCTION)
            error.args = (text, *error.args[1:])
            if isinstance(error, ModuleNotFoundError):
                error.msg = text
        raise


def open_path(path: Path) -> Folder:
    """The tensors of a folder, or of one safetensors file alone."""
    if path.suffix in _PICKLES:
        raise wrong("a folder or a safetensors file", repr(str(path)))
    if path.is_file():
        return Folder(path.parent, (read_shard(path),), None)
    return open_folder(path)


def open_folder(path: Path) -> Folder:
    """The tensors of a folder; ValueError if a file is missing, damaged or of something else."""
    if not path.is_dir():
        raise wrong("a folder with a checkpoint", repr(str(path)))
    index = _index_of(path)
    if index is None:
        shards = [read_shard(path / _single_of(path))]
    else:
        shards = _shards_of(path, index)
    seen: dict[str, str] = {}
    for entry in (entry for shard in shards for entry in shard.entries):
        if entry.name in seen:
            places = f"{seen[entry.name]!r} and {entry.shard!r}"
            raise wrong(f"one tensor {entry.name!r}", f"it in both {places}")
        seen[entry.name] = entry.shard
    return Folder(path, tuple(shards), index)


def _index_of(path: Path) -> str | None:
    """The index file's name; None where one file holds everything."""
    if (path / _SINGLE).exists():
        return None
    found = sorted(p.name for p in path.glob(f"*{_INDEX}"))
    if f"model{_INDEX}" in found:
        return f"model{_INDEX}"
    if len(found) > 1:
        raise wrong(f"one index in {str(path)!r}", ", ".join(found))
    return found[0] if found else None


def _single_of(path: Path) -> str:
    if (path / _SINGLE).exists():
        return _SINGLE
    found = sorted(p.name for p in path.glob("*.safetensors") if p.name != MASKS)
    if len(found) != 1:
        raise wrong(
            f"{_SINGLE} or {_SINGLE}.index.json in {str(path)!r}",
            ", ".join(found) if found else "neither",
            "Only safetensors are read: save the model with save_pretrained.",
        )
    return found[0]


def _shards_of(path: Path, index: str) -> list[Shard]:
    """The files that an index names, with the tensors that it says are there."""
    if (path / index).stat().st_size > _LONGEST_JSON:
        raise wrong(f"{index!r} of {_LONGEST_JSON} bytes at most", (path / index).stat().st_size)
    table = _parsed((path / index).read_bytes(), f"{index!r} to be JSON")
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
        raise wrong(f"{index!r} with a weight_map of tensor name -> file", "none")
    for name in sorted(set(table.values())):
        if Path(name).name != name or name in (".", "..") or "\0" in name:
            raise wrong(f"files beside {index!r}", repr(name))
        if not (path / name).exists():
            raise wrong(f"all files that {index!r} names", f"no {name!r} in {str(path)!r}")
    shards = [read_shard(path / name) for name in sorted(set(table.values()))]
    held = {entry.name: shard.name for shard in shards for entry in shard.entries}
    for name in sorted(held.keys() ^ table.keys()):
        if name in table:
            raise wrong(f"{name!r} in {table[name]!r}, as {index!r} says", "a file without it")
        raise wrong(f"{name!r} of {held[name]!r} to be in {index!r} too", "an index without it")
    for name, shard in table.items():
        if held[name] != shard:
            raise wrong(f"{name!r} in {shard!r}, as {index!r} says", f"it in {held[name]!r}")
    return shards


def read_shard(path: Path) -> Shard:
    """The header of one file, checked by safetensors first."""
    if not path.is_file():
        raise wrong(f"a file {path.name!r} in {str(path.parent)!r}", "something else")
    names = _checked(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = _parsed(file.read(length), f"{path.name!r} to have a JSON header")
    table.pop("__metadata__", None)
    if set(table) != names:
        raise wrong(
            f"{path.name!r} with one entry a tensor", "a header that can be read in two ways"
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
    """The names in a file that safetensors accepts."""
    safetensors = safetensors_package(FUNCTION, "it checks the files")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise wrong(
            f"a whole safetensors file {path.name!r}", str(error).rstrip("."), "Download it again."
        ) from None


def _parsed(text: bytes, expected: str) -> Any:
    """JSON without duplicate keys."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=table)
    except (ValueError, RecursionError) as error:
        raise wrong(expected, str(error).rstrip(".")) from None
