# SPDX-License-Identifier: MIT
"""Weights of files, some at a time: a checkpoint larger than memory can be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lap_ext.checkpoint.files import DTYPES, MASKS, Entry, Folder, open_folder, read_shard
from lap_ext.checkpoint.reading import Buffer, Source

PIECE = 1 << 24  # bytes looked at together; a multiple of 8 of every dtype's elements
RECORD = "lap_ext.json"  # what was asked, beside the weights
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def opened(path: Path) -> Folder:
    """The tensors of a folder or of one file."""
    if path.suffix in (".pt", ".pth", ".bin", ".pt2"):
        raise ValueError(f"expected a folder or a safetensors file, got {str(path)!r}.")
    if path.is_file():
        return Folder(path.parent, (read_shard(path),), None)
    return open_folder(path)


def size(folder: Folder) -> int:
    """Bytes of the files that hold the weights."""
    return sum(shard.size for shard in folder.shards)


def item(entry: Entry) -> int:
    """Bytes of an element; 1 where elements are no whole bytes."""
    return entry.size // entry.numel if entry.numel and entry.size % entry.numel == 0 else 1


def bits(source: Source, entry: Entry, buffer: Buffer) -> Iterator[tuple[int, Tensor]]:
    """(first element, elements as whole numbers) of a tensor; bytes of a dtype that is no number."""
    kind = _WHOLE.get(item(entry), torch.uint8)
    for first in range(0, entry.size, PIECE):
        length = min(PIECE, entry.size - first)
        source.fill(entry, first, buffer.view(length))
        yield first // kind.itemsize, buffer.tensor(length // kind.itemsize, kind)


def zeros(source: Source, entry: Entry, buffer: Buffer) -> int:
    """How many weights of a tensor are zero, of either sign."""
    if entry.dtype not in DTYPES:
        return 0
    kind, count = DTYPES[entry.dtype], 0
    for first in range(0, entry.size, PIECE):
        length = min(PIECE, entry.size - first)
        source.fill(entry, first, buffer.view(length))
        part = buffer.tensor(length // kind.itemsize, kind)
        count += part.numel() - int(part.count_nonzero())
    return count


def masks_of(folder: Folder) -> Path | None:
    """The mask file beside the weights."""
    path = folder.path / MASKS
    return path if path.is_file() else None
