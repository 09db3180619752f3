# SPDX-License-Identifier: MIT
"""The last pass: every shard is read once more, masked and written.

A layer that fits is masked at once by the fused operator. For the others a threshold is known
(passes.py), and they are masked in chunks of rows. Tensors that are not layers are copied. A layer
or chunk is zeroed and written in the background while the next one is masked.
"""

from __future__ import annotations

import itertools
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lap_ext.checkpoint import inside, ranking
from lap_ext.checkpoint.files import Checkpoint, Copy, Entry, Shard, Slice
from lap_ext.checkpoint.layer_scores import LayerScores, in_chunk
from lap_ext.checkpoint.passes import Key, SliceThreshold, Task, scorer
from lap_ext.checkpoint.reading import Buffer, bytes_of
from lap_ext.checkpoint.state import Work, check_free, on_disk
from lap_ext.checkpoint.writing import MaskFile, ShardFile
from lap_ext.progress import Step
from lap_ext.pruning import selection
from lap_ext.report import Histogram
from lap_ext.topology import Layer

_COPIED = 1 << 20  # bytes copied at a time


class Background:
    """A thread that does one job at a time, while the caller works on the next; `with` ends it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._job: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def do(self, job: Callable[..., None], *args: Any) -> None:
        """Begins a job once the last one is done; raises the error of that one."""
        self.wait()
        self._job = self._pool.submit(job, *args)

    def wait(self) -> None:
        """Waits until the job is done; raises its error."""
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
    """The last pass.

    Attributes:
        task: the inputs of all passes.
        checkpoint: to prune.
        keeps: how many weights each layer keeps, of those that are masked at once.
        thresholds: of all slices of the others.
        masks: the file of masks, or None.
        counted: whether scores are counted in bins, for a report.
    """

    task: Task
    checkpoint: Checkpoint
    keeps: Mapping[str, int]
    thresholds: Mapping[Key, SliceThreshold]
    masks: MaskFile | None
    counted: bool = False

    def __post_init__(self) -> None:
        self._layers = stored_layers(self.task)
        self._buffer, self._other = Buffer(), Buffer()
        self._counts: dict[str, Histogram] = {}  # of the layers in the shard that is written
        self._checksum = 0  # of their masks
        self._kept: dict[str, int] = {}  # weights that their masks keep

    def run(self, work: Work) -> None:
        """Writes the shards that are not done, and the other files."""
        left = [shard for shard in self.checkpoint.shards if shard.name not in work.facts["done"]]
        size = sum(entry.size for shard in left for entry in shard.entries)
        self.task.step = Step(self.task.on_progress, "write", size)
        if self.masks is not None:
            self.masks.open()
        try:
            full = self.task.full(list(self._full(left)), self.task.limits.background)
            for shard in left:
                self._counts, self._checksum, self._kept = {}, 0, {}
                with ShardFile(work.files / shard.name) as file:
                    self._shard(shard, file, full)
                if self.masks is not None:
                    self.masks.sync()
                if self.counted:
                    counts = {name: x.to_json() for name, x in self._counts.items()}
                    work.facts.setdefault("scores", {})[shard.name] = counts
                work.facts.setdefault("kept", {})[shard.name] = self._kept
                work.facts["done"][shard.name] = [file.checksum, self._checksum]
                work.save()
            for _ in full:  # ends its thread
                pass
            if self.masks is not None:
                self.masks.seal()
        finally:
            if self.masks is not None:
                self.masks.close()
        self._others(work.files)

    def _full(self, shards: list[Shard]) -> Iterator[Copy]:
        """Lists what will be read at once, in order."""
        for entry in (entry for shard in shards for entry in shard.entries):
            if entry.name in self._layers and self._key(entry) not in self.thresholds:
                yield (self._layers[entry.name][1],)

    def _key(self, entry: Entry) -> Key:
        layer, stored = self._layers[entry.name]
        return layer.name, stored.begin

    def _shard(self, shard: Shard, file: ShardFile, full: Iterator[Tensor]) -> None:
        """Writes a shard from front to back."""
        file.write(self.task.source.head(shard))
        with Background() as background:
            for entry in shard.entries:
                if entry.name in self._layers and self._key(entry) not in self.thresholds:
                    weight = next(full)
                    background.do(self._finish, entry, 0, weight, self._fused(entry, weight), file)
                    if not self.task.limits.background:
                        background.wait()
                    self.task.step.read(entry.name, entry.size)
                    continue
                background.wait()  # the buffers of the others are free again
                if entry.name in self._layers:
                    self._in_chunks(entry, file, background)
                else:
                    self._copied(entry, file)

    def _copied(self, entry: Entry, file: ShardFile) -> None:
        """Copies a tensor that is not pruned."""
        for offset in range(0, entry.size, _COPIED):
            view = self._buffer.view(min(_COPIED, entry.size - offset))
            self.task.source.fill(entry, offset, view)
            file.write(view)
            self.task.step.read(entry.name, len(view))

    def _fused(self, entry: Entry, weight: Tensor) -> Tensor:
        """Masks a full layer with the fused operator, flat."""
        layer, _ = self._layers[entry.name]
        self.task.network.hold(layer, weight)
        keep, live, how = self.keeps[layer.name], None, self.task.criterion_of(layer)
        if (nonzero := int(weight.count_nonzero())) < weight.numel():
            keep, live = min(keep, nonzero), (weight != 0).view(layer.shape)
        with in_chunk(layer, 0, weight):
            mask = selection.layer_mask(self.task.network, how, layer, keep, live)
        kept = mask.flatten()
        if self._shown(entry):
            scores = LayerScores(self.task.network, how, layer)
            step = self.task.limits.chunk[layer.name]
            for first in range(0, weight.numel(), step):
                chunk = scores.of(weight[first : first + step], first)
                self._count(layer, chunk, kept[first : first + step])
        return kept

    def _in_chunks(self, entry: Entry, file: ShardFile, background: Background) -> None:
        """Masks a slice by its threshold in chunks: one is written while the next is scored."""
        layer, stored = self._layers[entry.name]
        threshold = self.thresholds[self._key(entry)]
        score, left = scorer(self.task, layer, threshold.how), threshold.ties
        buffers, flags = (self._buffer, self._other), itertools.cycle((Buffer(), Buffer()))
        shown, shows = self._shown(entry), score
        if shown and threshold.how != "plain":
            shows = LayerScores(self.task.network, self.task.criterion_of(layer), layer).of
        for first, weight in self.task.chunks(layer, (stored,), buffers):
            mask = next(flags).tensor(weight.numel(), torch.bool)
            scores = score(weight, first)
            keys = ranking.live_keys_of(scores, weight)
            pairs = zip(keys.split(ranking.CHUNK), mask.split(ranking.CHUNK), strict=True)
            for some_keys, kept in pairs:
                kept[:], taken = ranking.mask_of(some_keys, threshold.key, left)
                left -= taken
            if shown:
                self._count(layer, scores if shows is score else shows(weight, first), mask)
            background.do(self._finish, entry, first, weight, mask, file)

    def _shown(self, entry: Entry) -> bool:
        """Whether the scores of a tensor are counted: not of a second copy of a weight."""
        layer, stored = self._layers[entry.name]
        return self.counted and stored in self.task.copies[layer.name][0]

    def _count(self, layer: Layer, scores: Tensor, kept: Tensor) -> None:
        """Counts scores of a layer and which of them are kept."""
        self._counts.setdefault(layer.name, Histogram()).add(scores, kept)

    def _finish(
        self, entry: Entry, first: int, weight: Tensor, mask: Tensor, file: ShardFile
    ) -> None:
        """Sets the pruned weights to +0.0, and writes the weights and the mask."""
        bits = weight.view(_INTEGER[weight.dtype])
        for chunk, kept in zip(bits.split(ranking.CHUNK), mask.split(ranking.CHUNK), strict=True):
            chunk.mul_(kept.view(torch.int8))  # of integers: 0 is +0.0, and 1 changes no bit
        layer, stored = self._layers[entry.name]
        if stored in self.task.copies[layer.name][0]:  # a second copy has the same mask
            count = self._kept.get(layer.name, 0) + int(mask.count_nonzero())
            self._kept[layer.name] = count
        if self.masks is not None:
            self._checksum = zlib.crc32(bytes_of(mask), self._checksum)
            self.masks.write(layer.name, first, mask)
        file.write(bytes_of(weight))

    def _others(self, files: Path) -> None:
        """Copies all files that are no shards."""
        for inner in self.checkpoint.others():
            (files / inner).parent.mkdir(parents=True, exist_ok=True)
            with on_disk(files):
                _copy(inside.real(self.checkpoint.path, inner), files / inner)


def stored_layers(task: Task) -> dict[str, tuple[Layer, Slice]]:
    """Maps the name of each stored tensor of a layer to the layer, and to what is stored of it."""
    return {
        stored.entry.name: (layer, stored)
        for layer in task.layers
        for copy in task.copies[layer.name]
        for stored in copy
    }


def _copy(source: Path, target: Path) -> None:
    """Copies a file with its times and permissions, but not those to run as another user."""
    with inside.opened(source) as old, target.open("xb") as new:
        shutil.copyfileobj(old, new, _COPIED)
        new.flush()
        facts = os.fstat(old.fileno())
        os.fchmod(new.fileno(), facts.st_mode & 0o777)
        os.utime(new.fileno(), ns=(facts.st_atime_ns, facts.st_mtime_ns))


_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def check_disk(checkpoint: Checkpoint, work: Work, masks: MaskFile | None) -> None:
    """Raises unless what is still to be written fits on the disk."""
    size = sum(shard.size for shard in checkpoint.shards if shard.name not in work.facts["done"])
    size += sum((checkpoint.path / inner).stat().st_size for inner in checkpoint.others())
    if masks is not None and not masks.complete:
        size += masks.size
    check_free(work.directory, size)
