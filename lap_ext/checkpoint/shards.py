# SPDX-License-Identifier: MIT
"""The last pass: every shard is read once more, masked and written.

A layer that fits goes through the fused mask in one piece. The others have their cut (passes.py) and
go by in runs of rows. What is no layer is copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lap_ext import selection
from lap_ext.checkpoint import rank
from lap_ext.checkpoint.files import Copy, Entry, Folder, Piece, Shard
from lap_ext.checkpoint.passes import Key, PieceCut, Task, scorer
from lap_ext.checkpoint.reading import Buffer, bytes_of
from lap_ext.checkpoint.scores import of_layer
from lap_ext.checkpoint.state import Work, check_room, on_disk
from lap_ext.checkpoint.writing import MaskFile, ShardFile
from lap_ext.topology import Layer

_COPIED = 1 << 23  # bytes copied at a time


@dataclass
class Writer:
    """Everything that the last pass needs.

    keeps: how many weights each layer keeps, of those that the fused mask takes.
    cuts: of all pieces of the others.
    masks: the file of masks, or None.
    """

    task: Task
    folder: Folder
    keeps: Mapping[str, int]
    cuts: Mapping[Key, PieceCut]
    masks: MaskFile | None

    def __post_init__(self) -> None:
        self._layers: dict[str, tuple[Layer, Piece]] = {
            piece.entry.name: (layer, piece)
            for layer in self.task.layers
            for copy in self.task.copies[layer.name]
            for piece in copy
        }
        self._buffer = Buffer()

    def run(self, work: Work) -> None:
        """Writes the shards that are not done, and the other files."""
        left = [shard for shard in self.folder.shards if shard.name not in work.facts["done"]]
        if self.masks is not None:
            self.masks.open()
        try:
            whole = self.task.whole(list(self._whole(left)))
            for shard in left:
                with ShardFile(work.files / shard.name) as file:
                    self._shard(shard, file, whole)
                if self.masks is not None:
                    self.masks.sync()
                work.facts["done"].append(shard.name)
                work.save()
            for _ in whole:  # ends the reader
                pass
        finally:
            if self.masks is not None:
                self.masks.close()
        self._others(work.files)

    def _whole(self, shards: list[Shard]) -> Iterator[Copy]:
        """What will be read in one piece, in order."""
        for entry in (entry for shard in shards for entry in shard.entries):
            if entry.name in self._layers and self._key(entry) not in self.cuts:
                yield (self._layers[entry.name][1],)

    def _key(self, entry: Entry) -> Key:
        layer, piece = self._layers[entry.name]
        return layer.name, piece.begin

    def _shard(self, shard: Shard, file: ShardFile, whole: Iterator[Tensor]) -> None:
        with shard.path.open("rb") as original:
            file.write(original.read(shard.head))
        for entry in shard.entries:
            if entry.name not in self._layers:
                self._copied(entry, file)
            elif self._key(entry) in self.cuts:
                self._cut(entry, file)
            else:
                weight = next(whole)
                self._fused(entry, weight)
                file.write(bytes_of(weight))
                self.task.report("write", entry.name, entry.size)

    def _copied(self, entry: Entry, file: ShardFile) -> None:
        for offset in range(0, entry.size, _COPIED):
            view = self._buffer.view(min(_COPIED, entry.size - offset))
            self.task.source.fill(entry, offset, view)
            file.write(view)
            self.task.report("write", entry.name, len(view))

    def _fused(self, entry: Entry, weight: Tensor) -> None:
        """Zeroes a whole layer in place by the fused mask."""
        layer, _ = self._layers[entry.name]
        self.task.network.hold(layer, weight)
        keep = self.keeps[layer.name]
        with of_layer(layer, 0, weight):
            mask = selection.layer_mask(self.task.network, self.task.criterion, layer, keep, None)
        self._apply(layer, 0, weight, mask.flatten())

    def _cut(self, entry: Entry, file: ShardFile) -> None:
        """Writes a piece whose cut is known, in runs."""
        layer, piece = self._layers[entry.name]
        found = self.cuts[self._key(entry)]
        score, left = scorer(self.task, layer, found.how), found.ties
        flags = Buffer()
        for first, weight in self.task.runs(layer, (piece,), self._buffer, "write"):
            mask = flags.tensor(weight.numel(), torch.bool)
            keys = rank.keys_of(score(weight, first))
            for some, kept in zip(keys.split(rank.CHUNK), mask.split(rank.CHUNK), strict=True):
                kept[:], taken = rank.mask_of(some, found.key, left)
                left -= taken
            self._apply(layer, first, weight, mask)
            file.write(bytes_of(weight))

    def _apply(self, layer: Layer, first: int, weight: Tensor, mask: Tensor) -> None:
        """Zeroes what a mask drops (+0.0), and keeps the mask."""
        bits = weight.view(_INTEGER[weight.dtype])
        for some, kept in zip(bits.split(rank.CHUNK), mask.split(rank.CHUNK), strict=True):
            some.mul_(kept.view(torch.int8))  # of integers: 0 is +0.0, and 1 changes no bit
        if self.masks is not None:
            self.masks.write(layer.name, first, mask)

    def _others(self, files: Path) -> None:
        """Copies all files that are no shards."""
        for inner in self.folder.others():
            (files / inner).parent.mkdir(parents=True, exist_ok=True)
            with on_disk(files):
                shutil.copy2(self.folder.path / inner, files / inner)


_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def check_disk(folder: Folder, work: Work, masks: MaskFile | None) -> None:
    """Raises unless the disk has room for what is still to be written."""
    size = sum(shard.size for shard in folder.shards if shard.name not in work.facts["done"])
    size += sum((folder.path / inner).stat().st_size for inner in folder.others())
    if masks is not None and not masks.complete:
        size += masks.size
    check_room(work.place, size)
