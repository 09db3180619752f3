# SPDX-License-Identifier: MIT
"""Weights from files, read into buffers that are used again.

read(), not mmap: pages of a mapped file count as memory of the process, a buffer counts once.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lap_ext.checkpoint.files import DTYPES, Copy, Entry, wrong

CHUNK = 1 << 24  # bytes looked at together; a multiple of 8 of every dtype's elements
_COMPARED = 1 << 22  # bytes of each at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Buffer:
    """Bytes that are used for one tensor after the other."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def view(self, size: int) -> memoryview:
        """The first size bytes; invalid once a larger view is asked for."""
        if len(self._bytes) < size:
            self._bytes = bytearray()  # the old one first: never both
            self._bytes = bytearray(size)
        return memoryview(self._bytes)[:size]

    def tensor(self, count: int, dtype: torch.dtype) -> Tensor:
        """The first elements, as a tensor on the same bytes."""
        size = count * dtype.itemsize
        if size == 0:
            return torch.empty(0, dtype=dtype)
        self.view(size)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count)


class Source:
    """The files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fill(self, entry: Entry, offset: int, into: memoryview) -> None:
        """Reads bytes [offset, offset + len(into)) of a tensor."""
        with (self._folder / entry.shard).open("rb", buffering=0) as file:
            file.seek(entry.begin + offset)
            done = 0
            while done < len(into):
                count = file.readinto(into[done:])
                if not count:
                    raise wrong(
                        f"{entry.shard!r} as it was at the start", "a shorter file", "Start anew."
                    )
                done += count

    def whole(self, pieces: Copy, buffer: Buffer) -> Tensor:
        """All elements of a copy, flat, in the buffer."""
        dtype = DTYPES[pieces[0].entry.dtype]
        size = sum(piece.entry.size for piece in pieces)
        view = buffer.view(size)
        for piece in pieces:
            first = piece.begin * dtype.itemsize
            self.fill(piece.entry, 0, view[first : first + piece.entry.size])
        return buffer.tensor(size // dtype.itemsize, dtype)

    def runs(
        self, pieces: Copy, step: int, buffers: Buffer | Sequence[Buffer]
    ) -> Iterator[tuple[int, Tensor]]:
        """(first element, elements) of a copy, step elements at a time and piece by piece.

        The tensors lie in the buffers, in turns: each is gone when that buffer's next is asked for.
        """
        dtype = DTYPES[pieces[0].entry.dtype]
        turns = itertools.cycle([buffers] if isinstance(buffers, Buffer) else buffers)
        for piece in pieces:
            count = piece.entry.numel
            for first in range(0, count, step):
                length = min(step, count - first)
                size = length * dtype.itemsize
                buffer = next(turns)
                self.fill(piece.entry, first * dtype.itemsize, buffer.view(size))
                yield piece.begin + first, buffer.tensor(length, dtype)


def bits(source: Source, entry: Entry, buffer: Buffer) -> Iterator[tuple[int, Tensor]]:
    """(first element, elements as integers) of a tensor, a chunk at a time.

    Where elements are no whole bytes, each byte counts as one.
    """
    even = entry.numel and entry.size % entry.numel == 0
    kind = _INTEGERS.get(entry.size // entry.numel, torch.uint8) if even else torch.uint8
    yield from _chunks(source, entry, kind, buffer)


def zeros(source: Source, entry: Entry, buffer: Buffer) -> int:
    """How many weights of a tensor are zero, of either sign; 0 for a dtype that weights cannot have."""
    if entry.dtype not in DTYPES:
        return 0
    chunks = _chunks(source, entry, DTYPES[entry.dtype], buffer)
    return sum(part.numel() - int(part.count_nonzero()) for _, part in chunks)


def _chunks(
    source: Source, entry: Entry, dtype: torch.dtype, buffer: Buffer
) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, entry.size, CHUNK):
        length = min(CHUNK, entry.size - first)
        source.fill(entry, first, buffer.view(length))
        yield first // dtype.itemsize, buffer.tensor(length // dtype.itemsize, dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    place = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(place).cast("B")


def same(source: Source, one: Copy, other: Copy) -> bool:
    """Whether two copies of a parameter are stored alike: the same pieces of the same bytes."""
    places = [[(x.begin, x.entry.dtype, x.entry.size) for x in copy] for copy in (one, other)]
    pairs = zip(one, other, strict=False)
    return places[0] == places[1] and all(_same_bytes(source, a.entry, b.entry) for a, b in pairs)


def _same_bytes(source: Source, one: Entry, other: Entry) -> bool:
    buffers = Buffer(), Buffer()
    for offset in range(0, one.size, _COMPARED):
        views = [buffer.view(min(_COMPARED, one.size - offset)) for buffer in buffers]
        for entry, view in zip((one, other), views, strict=True):
            source.fill(entry, offset, view)
        if views[0] != views[1]:
            return False
    return True
