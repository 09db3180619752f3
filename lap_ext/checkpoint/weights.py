# SPDX-License-Identifier: MIT
"""The weights of a checkpoint directory as a place: they pass by in chunks, within a memory budget.

Small state (squared norms, thresholds, counts) is noted in the working directory of a run, so that
a resumed one finds it there. The masks of rounds and of sequential orders are one bit per weight in
files beside it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lap_ext.checkpoint.directory import delete
from lap_ext.checkpoint.files import DTYPES, Copy, Slice, size_of
from lap_ext.checkpoint.memory import Limits
from lap_ext.checkpoint.reading import Buffer, Source, bytes_of
from lap_ext.checkpoint.state import Work
from lap_ext.checkpoint.structure import Structure
from lap_ext.checkpoint.writing import MaskFile
from lap_ext.errors import warn
from lap_ext.ops import native
from lap_ext.places import Chunk
from lap_ext.places.place import nonzero, row_length
from lap_ext.topology import Layer

_SAMPLED = 1 << 12  # weights of a sample that are read at a time, if a row has no more
_FALLBACK = 16  # bytes per weight that pure PyTorch needs for the mask of a full layer


class Files:
    """The place of weights in files.

    Args:
        structure: the layers, and where each is stored.
        source: reads the files.
        limits: what may be in memory at a time.
        vectors: name of a mask -> where the bias, norm or the like that it masks is stored.
    """

    held = False
    pieces = 1 << 30  # a chunk is small already

    def __init__(
        self,
        structure: Structure,
        source: Source,
        limits: Limits,
        vectors: Mapping[str, list[Copy]] | None = None,
    ) -> None:
        self.topology, self.copies = structure.topology, structure.copies
        self.source, self.limits, self.vectors = source, limits, dict(vectors or {})
        self.sampled = limits.sample
        self._free: list[Buffer] = []
        self._work: Work | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._masks: dict[str, MaskFile] = {}  # layer name -> the file that holds its mask
        self._open: dict[int, MaskFile] = {}  # round -> its masks
        self._round = 1  # the one that masks are set in
        self._sums: dict[str, int] = {}  # checksums of its masks

    def dtype(self, layer: Layer) -> torch.dtype:
        """Returns the dtype in which a layer is stored."""
        return DTYPES[self.copies[layer.name][0][0].entry.dtype]

    def bytes(self, layer: Layer) -> int:
        """Counts the bytes of a layer's weights in the files."""
        return size_of(self.copies[layer.name][0])

    def starts(self, layer: Layer) -> Sequence[int]:
        """Returns the flat index of the first weight of each stored slice."""
        return [stored.begin for stored in self.copies[layer.name][0]]

    def fits(self, layer: Layer, beside: int) -> bool:
        """Says whether a layer can be one chunk, with so many bytes per weight beside it."""
        beside += 0 if native.info().native else _FALLBACK
        return self.bytes(layer) + beside * math.prod(layer.shape) <= self.limits.rest

    def ordered(self, layers: Iterable[Layer]) -> list[Layer]:
        """Sorts layers as they lie in the files, to read these from front to back."""
        return sorted(layers, key=self._position)

    def _position(self, layer: Layer) -> tuple[str, int]:
        entry = self.copies[layer.name][0][0].entry
        return entry.shard, entry.begin

    def chunks(self, layer: Layer, whole: bool = False) -> Iterator[Chunk]:
        """Reads a layer in chunks of rows, or in one chunk."""
        copy = self.copies[layer.name][0]
        if not whole:
            yield from self.slices(layer, copy)
            return
        yield Chunk.of(layer, self.source.full(copy, Buffer()))

    def slices(self, layer: Layer, slices: Sequence[Slice]) -> Iterator[Chunk]:
        """Reads some slices of a layer in chunks of rows."""
        with self._buffers(2) as buffers:
            step = self.limits.chunk[layer.name]
            for first, weight in self.source.chunks(tuple(slices), step, buffers):
                yield Chunk.of(layer, weight, first)

    @contextmanager
    def _buffers(self, count: int) -> Iterator[list[Buffer]]:
        """Lends buffers that are used again: large blocks that come and go would fragment."""
        taken = [self._free.pop() if self._free else Buffer() for _ in range(count)]
        try:
            yield taken
        finally:
            self._free += taken

    def each(self, layers: Sequence[Layer], beside: int) -> Iterator[tuple[Layer, Iterator[Chunk]]]:
        """Reads layers one after the other, and the next full one ahead, if it fits."""
        fitting = [layer for layer in layers if self.fits(layer, beside)]
        names = {layer.name for layer in fitting}
        full = self.full([(x, self.copies[x.name][0]) for x in fitting], beside)
        for layer in layers:
            yield layer, iter([next(full)]) if layer.name in names else self.chunks(layer)
        for _ in full:  # ends its thread
            pass

    def full(
        self, copies: Sequence[tuple[Layer, Copy]], beside: int, *, background: bool = False
    ) -> Iterator[Chunk]:
        """Reads full layers one after the other; the next one is read ahead, if it fits.

        background: each stays valid until the second one after it is requested, if that fits.
        """
        ahead = self.in_turn([layer for layer, _ in copies], beside)[0]
        buffers = [Buffer() for _ in range(1 + ahead + background)]
        if not ahead:
            for layer, copy in copies:
                yield Chunk.of(layer, self.source.full(copy, buffers[0]))
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: Future[Tensor] | None = None
            for index, (layer, copy) in enumerate(copies):
                now = waiting or pool.submit(self.source.full, copy, buffers[0])
                weight = now.result()
                if index + 1 < len(copies):
                    following = copies[index + 1][1], buffers[(index + 1) % len(buffers)]
                    waiting = pool.submit(self.source.full, *following)
                yield Chunk.of(layer, weight)

    def in_turn(self, layers: Sequence[Layer], beside: int) -> tuple[bool, bool]:
        """Says whether a full layer can be read ahead, and the one before written meanwhile."""
        sizes = [(self.bytes(x), math.prod(x.shape)) for x in layers]
        most = max((size + beside * count for size, count in sizes), default=0)
        ahead = most + max((size for size, _ in sizes), default=0)
        before = max((size + count for size, count in sizes), default=0)
        return ahead <= self.limits.rest, ahead + before <= self.limits.rest

    def sample(self, layer: Layer, count: int) -> Iterator[Chunk]:
        """Reads about so many weights of a layer, in rows that are spread over it."""
        dtype, row = self.dtype(layer), row_length(layer)
        step = max(_SAMPLED // row, 1) * row
        total = math.prod(layer.shape)
        with self._buffers(1) as (buffer,):
            for stored in self.copies[layer.name][0]:
                size = stored.entry.numel
                reads = -(-count * size // max(total * step, 1))
                reads = min(reads, size // step)
                for number in range(reads):
                    first = (size - step) // row * number // max(reads - 1, 1) * row
                    view = buffer.view(step * dtype.itemsize)
                    self.source.fill(stored.entry, first * dtype.itemsize, view)
                    yield Chunk.of(layer, buffer.tensor(step, dtype), stored.begin + first)

    def mask(self, chunk: Chunk) -> Tensor | None:
        """Reads the mask of a chunk that a round has set; None before the first."""
        file = self._masks.get(chunk.layer.name)
        if file is None:
            return None
        bits = file.read(chunk.layer.name, chunk.first, chunk.weight.numel())
        return bits.reshape(chunk.weight.shape)

    def live(self, chunk: Chunk) -> Tensor | None:
        """Returns which weights of a chunk may be kept and are not zero; None for all."""
        return nonzero(chunk.weight, self.mask(chunk))

    def set_masks(self, layer: Layer, masks: Iterable[tuple[Chunk, Tensor]]) -> None:
        """Writes the masks of all chunks of a layer."""
        file, checksum = self._file(self._round), 0
        for chunk, mask in masks:
            flat = mask.flatten()
            checksum = zlib.crc32(bytes_of(flat), checksum)
            file.write(layer.name, chunk.first, flat)
        self._masks[layer.name], self._sums[layer.name] = file, checksum

    def round(self, number: int, make: Callable[[], None]) -> None:
        """Sets the masks of a round, unless an earlier run has ended it."""
        assert self._work is not None
        self._round, self._sums = number, {}
        done = self._work.facts.get("round", [0])[0]
        if number > done:
            make()
            self._file(number).sync()
            self._work.facts["round"] = [number, dict(self._sums)]
            notes = self._work.facts.get("notes", {})
            for name in [x for x in notes if x.startswith(f"round {number} ")]:
                del notes[name]  # its masks say it
            self._work.save()
        elif number == done:
            self._masks = dict.fromkeys(self._work.facts["round"][1], self._file(number))
        self._round = number + 1
        old = self._open.pop(number - 1, None)
        if old is not None:
            old.remove()

    def use(self, work: Work, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Notes results in a working directory from now on; shapes: of the layers to prune."""
        self._work, self._shapes = work, dict(shapes)
        number, sums = work.facts.get("round", [0, {}])
        good = bool(number) and self._intact(number, sums)
        if number and not good:
            warn(
                f"What an interrupted run has left in {str(work.directory)!r} is damaged in part. "
                "These are done again: the masks of its rounds."
            )
            del work.facts["round"]
        for path in work.rounds.iterdir():
            if not good or path.name != _round_name(number):
                delete(path)

    def _intact(self, number: int, sums: Mapping[str, int]) -> bool:
        """Whether the masks of a round are as they were written."""
        assert self._work is not None
        file = MaskFile(self._work.rounds, self._shapes, _round_name(number))
        if not file.open_complete():
            return False
        counts = {name: math.prod(self._shapes[name]) for name in sums}
        try:
            return all(file.checksum(x, 0, counts[x]) == noted for x, noted in sums.items())
        finally:
            file.close()

    def _file(self, number: int) -> MaskFile:
        """Opens the masks of a round; makes the file if there is none."""
        if number not in self._open:
            assert self._work is not None
            file = MaskFile(self._work.rounds, self._shapes, _round_name(number))
            if not file.complete:
                file.create()
            file.open()
            self._open[number] = file
        return self._open[number]

    def close(self) -> None:
        """Closes the files of rounds."""
        for file in self._open.values():
            file.close()

    def capacity(self, count: int) -> int:
        """Returns how many keys the memory budget leaves room for."""
        return self.limits.candidates

    def noted(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns a value for JSON that this or an earlier run has noted."""
        if self._work is None:
            return make()
        notes = self._work.facts.setdefault("notes", {})
        if name not in notes:
            notes[name] = make()
            self._work.save()
        return notes[name]

    def noted_tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns tensors that this or an earlier run has noted; the last ones are kept."""
        if self._work is None:
            return make()
        if self._work.facts.get("tensors of") == name:
            tensors = self._work.tensors()
            if tensors is not None:
                return tensors
            warn(
                f"What an interrupted run has left in {str(self._work.directory)!r} is damaged in "
                "part. These are done again: the squared norms."
            )
        tensors = make()
        if self._work.facts.pop("tensors of", None) is not None:
            self._work.save()  # first: a run that ends here has no tensors
        self._work.save_tensors(tensors)
        self._work.facts["tensors of"] = name
        self._work.save()
        return tensors

    def total(self, counts: Tensor) -> Tensor:
        """Returns the counts: one process reads all files."""
        return counts


def _round_name(number: int) -> str:
    """Names the file of a round's masks."""
    return f"round {number}.safetensors"
