# SPDX-License-Identifier: MIT
"""The last pass: every shard is read once more, masked and written.

A layer that fits goes through the fused mask in one piece. The others have their cut (passes.py) and
go by in runs of rows. What is no layer is copied. One piece is zeroed and written while the mask of
the next is found.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lap_ext.checkpoint import ranking
from lap_ext.checkpoint.files import Copy, Entry, Folder, Piece, Shard
from lap_ext.checkpoint.layer_scores import LayerScores, of_layer
from lap_ext.checkpoint.passes import Key, PieceCut, Task, scorer
from lap_ext.checkpoint.reading import Buffer, bytes_of
from lap_ext.checkpoint.state import Work, check_room, on_disk
from lap_ext.checkpoint.writing import MaskFile, ShardFile
from lap_ext.progress import Step
from lap_ext.pruning import selection
from lap_ext.report import Histogram
from lap_ext.topology import Layer

_COPIED = 1 << 23  # bytes copied at a time


class Behind:
    """A thread that does one job at a time, while the caller works on the next; `with` ends it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._job: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def do(self, job: Callable[..., None], *args: Any) -> None:
        """Begins a job once the last one is done; raises what that one has raised."""
        self.wait()
        self._job = self._pool.submit(job, *args)

    def wait(self) -> None:
        """Until the job is done; raises what it has raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()


@dataclass
class Writer:
    """Everything that the last pass needs.

    keeps: how many weights each layer keeps, of those that the fused mask takes.
    cuts: of all pieces of the others.
    masks: the file of masks, or None.
    counted: whether scores are counted in bins, for a report.
    """

    task: Task
    folder: Folder
    keeps: Mapping[str, int]
    cuts: Mapping[Key, PieceCut]
    masks: MaskFile | None
    counted: bool = False

    def __post_init__(self) -> None:
        self._layers: dict[str, tuple[Layer, Piece]] = {
            piece.entry.name: (layer, piece)
            for layer in self.task.layers
            for copy in self.task.copies[layer.name]
            for piece in copy
        }
        self._buffer, self._other = Buffer(), Buffer()
        self._counts: dict[str, Histogram] = {}  # of the layers in the shard that is written

    def run(self, work: Work) -> None:
        """Writes the shards that are not done, and the other files."""
        left = [shard for shard in self.folder.shards if shard.name not in work.facts["done"]]
        size = sum(entry.size for shard in left for entry in shard.entries)
        self.task.step = Step(self.task.on_progress, "write", size)
        if self.masks is not None:
            self.masks.open()
        try:
            whole = self.task.whole(list(self._whole(left)), self.task.limits.behind)
            for shard in left:
                self._counts = {}
                with ShardFile(work.files / shard.name) as file:
                    self._shard(shard, file, whole)
                if self.masks is not None:
                    self.masks.sync()
                if self.counted:
                    found = {name: x.to_json() for name, x in self._counts.items()}
                    work.facts.setdefault("scores", {})[shard.name] = found
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
        with Behind() as behind:
            for entry in shard.entries:
                if entry.name in self._layers and self._key(entry) not in self.cuts:
                    weight = next(whole)
                    behind.do(self._finish, entry, 0, weight, self._fused(entry, weight), file)
                    if not self.task.limits.behind:
                        behind.wait()
                    self.task.step.read(entry.name, entry.size)
                    continue
                behind.wait()  # the buffers of the others are free again
                if entry.name in self._layers:
                    self._cut(entry, file, behind)
                else:
                    self._copied(entry, file)

    def _copied(self, entry: Entry, file: ShardFile) -> None:
        for offset in range(0, entry.size, _COPIED):
            view = self._buffer.view(min(_COPIED, entry.size - offset))
            self.task.source.fill(entry, offset, view)
            file.write(view)
            self.task.step.read(entry.name, len(view))

    def _fused(self, entry: Entry, weight: Tensor) -> Tensor:
        """The fused mask of a whole layer, flat."""
        layer, _ = self._layers[entry.name]
        self.task.network.hold(layer, weight)
        keep = self.keeps[layer.name]
        with of_layer(layer, 0, weight):
            mask = selection.layer_mask(self.task.network, self.task.criterion, layer, keep, None)
        kept = mask.flatten()
        if self._shown(entry):
            scores = LayerScores(self.task.network, self.task.criterion, layer)
            step = self.task.limits.run[layer.name]
            for first in range(0, weight.numel(), step):
                some = scores.of(weight[first : first + step], first)
                self._count(layer, some, kept[first : first + step])
        return kept

    def _cut(self, entry: Entry, file: ShardFile, behind: Behind) -> None:
        """Writes a piece whose cut is known, in runs: one is written while the next is scored."""
        layer, piece = self._layers[entry.name]
        found = self.cuts[self._key(entry)]
        score, left = scorer(self.task, layer, found.how), found.ties
        buffers, flags = (self._buffer, self._other), itertools.cycle((Buffer(), Buffer()))
        shown, shows = self._shown(entry), score
        if shown and found.how != "plain":
            shows = LayerScores(self.task.network, self.task.criterion, layer).of
        for first, weight in self.task.runs(layer, (piece,), buffers):
            mask = next(flags).tensor(weight.numel(), torch.bool)
            scores = score(weight, first)
            keys = ranking.keys_of(scores)
            for some, kept in zip(
                keys.split(ranking.CHUNK), mask.split(ranking.CHUNK), strict=True
            ):
                kept[:], taken = ranking.mask_of(some, found.key, left)
                left -= taken
            if shown:
                self._count(layer, scores if shows is score else shows(weight, first), mask)
            behind.do(self._finish, entry, first, weight, mask, file)

    def _shown(self, entry: Entry) -> bool:
        """Whether the scores of a tensor are counted: not of a second copy of a weight."""
        layer, piece = self._layers[entry.name]
        return self.counted and piece in self.task.copies[layer.name][0]

    def _count(self, layer: Layer, scores: Tensor, kept: Tensor) -> None:
        """Counts scores of a layer and which of them are kept."""
        self._counts.setdefault(layer.name, Histogram()).add(scores, kept)

    def _finish(
        self, entry: Entry, first: int, weight: Tensor, mask: Tensor, file: ShardFile
    ) -> None:
        """Zeroes what a mask drops (+0.0), and writes the weights and the mask."""
        bits = weight.view(_INTEGER[weight.dtype])
        for some, kept in zip(bits.split(ranking.CHUNK), mask.split(ranking.CHUNK), strict=True):
            some.mul_(kept.view(torch.int8))  # of integers: 0 is +0.0, and 1 changes no bit
        if self.masks is not None:
            self.masks.write(self._layers[entry.name][0].name, first, mask)
        file.write(bytes_of(weight))

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
