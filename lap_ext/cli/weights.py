# SPDX-License-Identifier: MIT
"""Weights and masks of files, some at a time: a checkpoint larger than memory can be looked at.

A mask file holds one bit a weight (mask_file.py); bits are read where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lap_ext import mask_file
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


class BitMasks:
    """Masks of a file, read in parts.

    Attributes:
        shapes: layer name -> shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> BitMasks:
        opener, broken = mask_file._safetensors("masks")
        try:
            self._file: Any = opener(self.path, framework="pt").__enter__()
            self.shapes = mask_file._shapes(self._file.metadata() or {})
            if set(self._file.keys()) != set(self.shapes):
                raise mask_file._FileError("its tensors are not those its metadata lists")
            for name, shape in self.shapes.items():
                bits = self._file.get_slice(name)
                if bits.get_dtype() != "U8" or bits.get_shape() != [(math.prod(shape) + 7) // 8]:
                    raise mask_file._FileError(f"the bits of {name!r} do not fit its shape")
        except (mask_file._FileError, broken) as error:
            raise ValueError(
                f"expected masks as lap_ext writes them, got {str(self.path)!r}: {error}."
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def part(self, name: str, begin: int, count: int) -> Tensor:
        """Whether weights [begin, begin + count) are kept, flat."""
        first = begin // 8
        packed = self._file.get_slice(name)[first : (begin + count + 7) // 8]
        flat = mask_file.unpack(packed, (packed.numel() * 8,))
        return flat[begin - 8 * first : begin - 8 * first + count]


def masks_of(folder: Folder) -> Path | None:
    """The mask file beside the weights."""
    path = folder.path / MASKS
    return path if path.is_file() else None
