# SPDX-License-Identifier: MIT
"""Writes shards from front to back, and masks in any order.

A shard has the header of its original, byte for byte, and the same tensors at the same offsets. The
mask file has the format of `Masks.save` (masks/file.py), whose layout is known before any mask is.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lap_ext.checkpoint.files import MASKS
from lap_ext.checkpoint.reading import Buffer, bytes_of
from lap_ext.checkpoint.state import on_disk
from lap_ext.masks.file import CHUNK as HASHED
from lap_ext.masks.file import checksum, header, pack, unpack
from lap_ext.structures import StructureLike, spelled

_CHECKED = 1 << 20  # weights of a mask whose checksum is computed at a time
_PACKED = 1 << 15  # words at a time: they stay in the cache, and torch uses one thread
_SPREAD = 0x0102040810204080  # moves bit 0 of byte b of 8 bytes to bit 56 + b


class ShardFile:
    """A new file that is written once, from front to back; leaving `with` puts it on the disk.

    Attributes:
        checksum: CRC-32 of what has been written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checksum = 0

    def __enter__(self) -> ShardFile:
        with on_disk(self.path.parent):
            self._file = self.path.open("xb", buffering=0)  # never what a link leads to
        return self

    def write(self, data: memoryview | bytes) -> None:
        """Writes the next bytes."""
        done, left = 0, memoryview(data)
        self.checksum = zlib.crc32(left, self.checksum)
        with on_disk(self.path.parent):
            while done < len(left):
                done += self._file.write(left[done:])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with on_disk(self.path.parent):
            if kind is None:
                os.fsync(self._file.fileno())
            self._file.close()


class MaskFile:
    """A file of masks that is written in chunks, in any order; `seal` adds their checksums."""

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        file: str = MASKS,
        structure: StructureLike | None = None,
    ) -> None:
        self.path = directory / file
        self._structure = None if structure is None else spelled(structure)
        self._empty = {
            name: torch.empty(s, dtype=torch.bool, device="meta") for name, s in shapes.items()
        }
        self._head = header(self._empty, structure=self._structure)
        self._begin, begin = {}, len(self._head)
        for name, mask in self._empty.items():
            self._begin[name] = begin
            begin += (mask.numel() + 7) // 8
        self.size = begin
        self._buffer = Buffer()

    @property
    def complete(self) -> bool:
        """Whether the file exists in its full size; it may lack masks and checksums."""
        try:
            facts = self.path.lstat()
        except OSError:
            return False
        # a second name is a backup, perhaps: the file is written in place
        regular = stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1
        return regular and facts.st_size == self.size

    def create(self) -> None:
        """Creates the file with masks that keep no weight."""
        self.path.unlink(missing_ok=True)
        with on_disk(self.path.parent), self.path.open("xb") as file:
            file.write(self._head)
            file.truncate(self.size)

    def open(self) -> None:
        """Opens the file for writing."""
        self._file = self.path.open("r+b", buffering=0)

    def open_complete(self) -> bool:
        """Opens the file if an earlier run has left it in its full size."""
        try:
            if not self.complete:
                return False
            self.open()
        except OSError:
            return False
        return True

    def write(self, name: str, first: int, mask: Tensor) -> None:
        """Writes the mask of elements [first, first + len(mask)) of a layer, flat."""
        lead = first % 8
        if lead:
            mask = torch.cat([mask.new_zeros(lead), mask])
        size = (mask.numel() + 7) // 8
        view = self._buffer.view(size)
        pack_into(self._buffer.tensor(size, torch.uint8), mask)
        begin = self._begin[name] + first // 8
        with on_disk(self.path.parent):
            ends = {0} if lead else set()
            if mask.numel() % 8:
                ends.add(size - 1)
            for end in ends:  # bytes that other chunks share
                old = os.pread(self._file.fileno(), 1, begin + end)
                view[end] |= old[0] & _outside(end, size, lead, mask.numel())
            self._put(view, begin)

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Reads the mask of elements [first, first + count) of a layer, flat."""
        if not count:
            return torch.empty(0, dtype=torch.bool)
        begin, end = first // 8, (first + count + 7) // 8
        data = os.pread(self._file.fileno(), end - begin, self._begin[name] + begin)
        bits = unpack(torch.frombuffer(bytearray(data), dtype=torch.uint8), (8 * len(data),))
        return bits[first - 8 * begin :][:count]

    def checksum(self, name: str, first: int, count: int, before: int = 0) -> int:
        """Goes on with a CRC-32 over the mask of elements [first, first + count), a byte each."""
        for begin in range(first, first + count, _CHECKED):
            mask = self.read(name, begin, min(_CHECKED, first + count - begin))
            before = zlib.crc32(bytes_of(mask), before)
        return before

    @property
    def padded(self) -> bool:
        """Whether the bits after the last weight of each mask are 0."""
        for name, mask in self._empty.items():
            used = mask.numel() % 8
            if used:
                (last,) = os.pread(self._file.fileno(), 1, self._begin[name] + mask.numel() // 8)
                if last >> used:
                    return False
        return True

    def sync(self) -> None:
        """Puts what was written on the disk."""
        with on_disk(self.path.parent):
            os.fsync(self._file.fileno())

    def seal(self) -> None:
        """Writes the checksums, from what the file holds once all masks are written, and syncs."""
        sums = {}
        for name, mask in self._empty.items():
            begin = self._begin[name]
            end = begin + (mask.numel() + 7) // 8
            number = self._file.fileno()
            chunks = (
                os.pread(number, min(HASHED, end - at), at) for at in range(begin, end, HASHED)
            )
            sums[name] = checksum(name, mask.shape, chunks, self._structure)
        with on_disk(self.path.parent):
            self._put(memoryview(header(self._empty, sums, self._structure)), 0)
        self.sync()

    def _put(self, data: memoryview, begin: int) -> None:
        """Writes bytes at a place in the file."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], begin + done)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def remove(self) -> None:
        """Closes the file and removes it."""
        self.close()
        self.path.unlink(missing_ok=True)


def _outside(byte: int, size: int, lead: int, bits: int) -> int:
    """Returns the bits of the first or last byte that belong to other chunks."""
    before = (1 << lead) - 1 if byte == 0 else 0
    last = bits - 8 * (size - 1)
    after = 0xFF & ~((1 << last) - 1) if byte == size - 1 else 0
    return before | after


def pack_into(packed: Tensor, mask: Tensor) -> None:
    """Writes the bits of a flat mask [n] to packed [ceil(n / 8)], as `pack` does."""
    full = mask.numel() // 8 * 8
    if full:
        flags = mask[:full] if _aligned(mask) else mask[:full].clone()
        words = flags.view(torch.int64)
        for begin in range(0, words.numel(), _PACKED):
            bits = words[begin : begin + _PACKED] * _SPREAD
            packed[begin : begin + bits.numel()] = bits >> 56  # a negative number wraps to its byte
    if full < mask.numel():
        packed[full // 8 :] = pack(mask[full:])


def _aligned(mask: Tensor) -> bool:
    return mask.storage_offset() % 8 == 0
