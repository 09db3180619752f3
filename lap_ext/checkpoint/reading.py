# SPDX-License-Identifier: MIT
"""Reads weights from files into buffers that are reused.

With read(), not mmap: every page of a mapped file counts as memory of the process, a buffer once.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lap_ext.checkpoint import inside
from lap_ext.checkpoint.files import DTYPES, Checkpoint, Copy, Entry, Shard

CHUNK = 1 << 24  # bytes of a chunk; a multiple of 8 elements of every dtype
_COMPARED = 1 << 19  # bytes of each of two tensors that are compared at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Buffer:
    """Bytes that hold one tensor after the other."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def view(self, size: int) -> memoryview:
        """Returns the first size bytes; invalid once a larger view is requested."""
        if len(self._bytes) < size:
            self._bytes = bytearray()  # the old one first: never both
            self._bytes = bytearray(size)
        return memoryview(self._bytes)[:size]

    def tensor(self, count: int, dtype: torch.dtype) -> Tensor:
        """Returns the first count elements as a tensor on the same bytes."""
        size = count * dtype.itemsize
        if size == 0:
            return torch.empty(0, dtype=dtype)
        self.view(size)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count)


class Source:
    """The files of a checkpoint directory, to read from; each must be the one that was opened."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._shards = {shard.name: shard for shard in checkpoint.shards}

    def fill(self, entry: Entry, offset: int, into: memoryview) -> None:
        """Reads bytes [offset, offset + len(into)) of a tensor."""
        self._fill(entry.shard, entry.begin + offset, into)

    def head(self, shard: Shard) -> bytes:
        """Reads the bytes before a shard's tensors."""
        head = bytearray(shard.head)
        self._fill(shard.name, 0, memoryview(head))
        return bytes(head)

    def _fill(self, name: str, begin: int, into: memoryview) -> None:
        shard = self._shards[name]
        with inside.opened(shard.path, shard.stamp) as file:
            file.seek(begin)
            done = 0
            while done < len(into):
                count = file.readinto(into[done:])
                if not count:  # it became shorter just now
                    raise inside.changed(name)
                done += count

    def full(self, copy: Copy, buffer: Buffer) -> Tensor:
        """Reads all elements of a copy, flat, into the buffer."""
        dtype = DTYPES[copy[0].entry.dtype]
        size = sum(x.entry.size for x in copy)
        view = buffer.view(size)
        for x in copy:
            first = x.begin * dtype.itemsize
            self.fill(x.entry, 0, view[first : first + x.entry.size])
        return buffer.tensor(size // dtype.itemsize, dtype)

    def chunks(
        self, copy: Copy, step: int, buffers: Buffer | Sequence[Buffer]
    ) -> Iterator[tuple[int, Tensor]]:
        """Reads (first element, elements) of a copy, step elements at a time, slice by slice.

        The buffers take turns: each tensor is valid until its buffer is filled again.
        """
        dtype = DTYPES[copy[0].entry.dtype]
        turns = itertools.cycle([buffers] if isinstance(buffers, Buffer) else buffers)
        for x in copy:
            count = x.entry.numel
            for first in range(0, count, step):
                length = min(step, count - first)
                size = length * dtype.itemsize
                buffer = next(turns)
                self.fill(x.entry, first * dtype.itemsize, buffer.view(size))
                yield x.begin + first, buffer.tensor(length, dtype)


def bits(source: Source, entry: Entry, buffer: Buffer) -> Iterator[tuple[int, Tensor]]:
    """Reads (first element, elements as integers) of a tensor, a chunk at a time.

    Where the elements are smaller than a byte, each byte counts as one element.
    """
    even = entry.numel and entry.size % entry.numel == 0
    kind = _INTEGERS.get(entry.size // entry.numel, torch.uint8) if even else torch.uint8
    yield from _chunks(source, entry, kind, buffer)


def zeros(source: Source, entry: Entry, buffer: Buffer) -> int:
    """Counts the zeros of a tensor, of either sign; 0 for a dtype that weights cannot have."""
    if entry.dtype not in DTYPES:
        return 0
    chunks = _chunks(source, entry, DTYPES[entry.dtype], buffer)
    return sum(chunk.numel() - int(chunk.count_nonzero()) for _, chunk in chunks)


def _chunks(
    source: Source, entry: Entry, dtype: torch.dtype, buffer: Buffer
) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, entry.size, CHUNK):
        length = min(CHUNK, entry.size - first)
        source.fill(entry, first, buffer.view(length))
        yield first // dtype.itemsize, buffer.tensor(length // dtype.itemsize, dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """Views the bytes of a contiguous CPU tensor, not copied."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]  # lives as long as the view
    return memoryview(array).cast("B")


def same(source: Source, one: Copy, other: Copy) -> bool:
    """Whether two copies of a parameter are stored alike: the same slices of the same bytes."""
    layouts = [[(x.begin, x.entry.dtype, x.entry.size) for x in copy] for copy in (one, other)]
    pairs = zip(one, other, strict=False)
    return layouts[0] == layouts[1] and all(_same_bytes(source, a.entry, b.entry) for a, b in pairs)


def _same_bytes(source: Source, one: Entry, other: Entry) -> bool:
    buffers = Buffer(), Buffer()
    for offset in range(0, one.size, _COMPARED):
        views = [buffer.view(min(_COMPARED, one.size - offset)) for buffer in buffers]
        for entry, view in zip((one, other), views, strict=True):
            source.fill(entry, offset, view)
        if views[0] != views[1]:
            return False
    return True
