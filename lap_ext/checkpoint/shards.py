# SPDX-License-Identifier: MIT
"""The last pass: every shard is read once more, masked and written.

How each layer is masked is selected before (lap_ext/pruning/selection.py): one that fits at once by
the fused operator, others in chunks of rows. With units across layers, biases and norms are masked
too. All other tensors are copied. A layer or chunk is zeroed and written in the background while
the next one is masked.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from lap_ext.checkpoint import inside
from lap_ext.checkpoint.files import DTYPES, Checkpoint, Entry, Shard
from lap_ext.checkpoint.reading import Buffer, bytes_of
from lap_ext.checkpoint.state import Work, check_free, on_disk
from lap_ext.checkpoint.weights import Files
from lap_ext.checkpoint.writing import MaskFile, ShardFile
from lap_ext.ops import schema
from lap_ext.places import Chunk
from lap_ext.progress import Step
from lap_ext.pruning import normalization
from lap_ext.pruning.pipeline import Task
from lap_ext.pruning.scoring import Scoring
from lap_ext.pruning.selection import Selection, Stored, beside, is_full, masked
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


class Writer:
    """The last pass.

    Args:
        task: the pruning.
        place: where its weights are.
        checkpoint: to prune.
        masks: the file of masks, or None.
        shown: computes the scores that are counted in bins, for a report; None: none are.
    """

    def __init__(
        self,
        task: Task,
        place: Files,
        checkpoint: Checkpoint,
        masks: MaskFile | None,
        shown: Scoring | None = None,
    ) -> None:
        self.task, self.place, self.checkpoint = task, place, checkpoint
        self.masks, self.shown = masks, shown
        self.layers = {
            stored.entry.name: (layer, stored)
            for layer in task.layers
            for copy in place.copies[layer.name]
            for stored in copy
        }
        self.vectors = {
            stored.entry.name: (name, stored)
            for name, copies in place.vectors.items()
            for copy in copies
            for stored in copy
        }
        self._selections: dict[str, Selection] = {}
        self._vector_masks: dict[str, Tensor] = {}
        self._buffer = Buffer()
        self._counts: dict[str, Histogram] = {}  # of the layers in the shard that is written
        self._checksum = 0  # of their masks
        self._kept: dict[str, int] = {}  # weights that their masks keep

    def run(self, selections: Mapping[str, Selection], work: Work) -> None:
        """Writes the shards that are not done, and the other files; selections: of all layers."""
        self._selections = dict(selections)
        units = self.task.units
        self._vector_masks = {} if units is None else units.vector_masks()
        left = [shard for shard in self.checkpoint.shards if shard.name not in work.facts["done"]]
        size = sum(entry.size for shard in left for entry in shard.entries)
        self._step = Step(self.task.scoring.on_progress, "write", size)
        if self.masks is not None:
            self.masks.open()
        try:
            self._shards(left, work)
            if self.masks is not None:
                self.masks.seal()
        finally:
            if self.masks is not None:
                self.masks.close()
        self._others(work.files)

    def _shards(self, shards: Sequence[Shard], work: Work) -> None:
        """Writes shards, each of which then counts as done."""
        full = [
            (layer, (stored,))
            for shard in shards
            for entry in shard.entries
            if entry.name in self.layers
            for layer, stored in [self.layers[entry.name]]
            if self._is_full(layer)
        ]
        layers = [layer for layer, _ in full]
        most = max((beside(self.task.scoring, layer) for layer in layers), default=1)
        _, self._background = self.place.in_turn(layers, most)
        chunks = self.place.full(full, most, background=self._background)
        for shard in shards:
            self._counts, self._checksum, self._kept = {}, 0, {}
            with ShardFile(work.files / shard.name) as file:
                self._shard(shard, file, chunks)
            if self.masks is not None:
                self.masks.sync()
            if self.shown is not None:
                counts = {name: x.to_json() for name, x in self._counts.items()}
                work.facts.setdefault("scores", {})[shard.name] = counts
            work.facts.setdefault("kept", {})[shard.name] = self._kept
            work.facts["done"][shard.name] = [file.checksum, self._checksum]
            work.save()
        for _ in chunks:  # ends its thread
            pass

    def _is_full(self, layer: Layer) -> bool:
        """Whether a layer is read as one chunk to be masked."""
        selection = self._selections[layer.name]
        return is_full(self.task.scoring, layer, selection)

    def _shard(self, shard: Shard, file: ShardFile, full: Iterator[Chunk]) -> None:
        """Writes a shard from front to back."""
        file.write(self.place.source.head(shard))
        with Background() as background:
            for entry in shard.entries:
                if entry.name not in self.layers:
                    background.wait()
                    copy = self._vector if entry.name in self.vectors else self._copied
                    copy(entry, file)
                    continue
                layer, stored = self.layers[entry.name]
                if self._is_full(layer):
                    self._masked(entry, iter([next(full)]), file, background)
                    if not self._background:
                        background.wait()
                else:
                    background.wait()  # the buffers of the others are free again
                    chunks = self.place.slices(layer, (stored,))
                    self._masked(entry, chunks, file, background)
                    background.wait()  # before its buffers are used for another

    def _copied(self, entry: Entry, file: ShardFile) -> None:
        """Copies a tensor that is not pruned."""
        for offset in range(0, entry.size, _COPIED):
            view = self._buffer.view(min(_COPIED, entry.size - offset))
            self.place.source.fill(entry, offset, view)
            file.write(view)
            self._step.read(entry.name, len(view))

    def _vector(self, entry: Entry, file: ShardFile) -> None:
        """Masks a stored bias, norm or the like: all of it at once."""
        name, stored = self.vectors[entry.name]
        mask = self._vector_masks[name].flatten()[stored.begin : stored.begin + entry.numel]
        mask = mask.contiguous()
        self.place.source.fill(entry, 0, self._buffer.view(entry.size))
        values = self._buffer.tensor(entry.numel, DTYPES[entry.dtype])
        schema.call(schema.masked_zero_, values, mask)
        self._write_mask(name, stored.begin, mask)
        file.write(bytes_of(values))
        self._step.read(entry.name, entry.size)

    def _write_mask(self, name: str, first: int, mask: Tensor) -> None:
        """Writes a flat mask of some weights, if masks are written."""
        if self.masks is not None:
            self._checksum = zlib.crc32(bytes_of(mask), self._checksum)
            self.masks.write(name, first, mask)

    def _masked(
        self, entry: Entry, chunks: Iterator[Chunk], file: ShardFile, background: Background
    ) -> None:
        """Masks a stored tensor: one chunk is written while the next is scored."""
        layer, stored = self.layers[entry.name]
        scoring, selection = self.task.scoring, self._selections[layer.name]
        first = stored in self.place.copies[layer.name][0]  # not a second copy
        for chunk, mask in masked(scoring, layer, selection, chunks):
            if first and self.shown is not None:
                self._count(chunk, mask.flatten())
            background.do(self._finish, entry, chunk, mask.flatten(), file)
            self._step.read(entry.name, chunk.weight.nbytes)

    def _count(self, chunk: Chunk, mask: Tensor) -> None:
        """Counts the scores of a chunk in bins."""
        shown, layer = self.shown, chunk.layer
        assert shown is not None
        scorer, size = shown.scorer(layer), shown.sizes.get(layer.name)
        if scorer.criterion.needs_full and not chunk.whole:
            if chunk.first:  # counted with the first chunk
                return
            (chunk,) = shown.chunks(layer)
            mask = next(iter(masked(shown, layer, Stored(), [chunk])))[1].flatten()
        counts = self._counts.setdefault(layer.name, Histogram())
        most = chunk.weight.numel()
        if not scorer.criterion.needs_full:
            most = self.place.limits.chunk[layer.name]
        for part in chunk.split(most):
            for piece, scores in shown.scored_pieces(scorer, part):
                values = scores.flatten()
                values = values if size is None else normalization.over(values, size)
                begin = piece.first - chunk.first
                counts.add(values, mask[begin : begin + values.numel()])

    def _finish(self, entry: Entry, chunk: Chunk, mask: Tensor, file: ShardFile) -> None:
        """Sets the pruned weights to +0.0, and writes the weights and the mask."""
        weight = chunk.weight.view(-1)
        schema.call(schema.masked_zero_, weight, mask)
        layer, stored = self.layers[entry.name]
        if stored in self.place.copies[layer.name][0]:  # a second copy has the same mask
            count = self._kept.get(layer.name, 0) + int(mask.count_nonzero())
            self._kept[layer.name] = count
        self._write_mask(layer.name, chunk.first, mask)
        file.write(bytes_of(weight))

    def _others(self, files: Path) -> None:
        """Copies all files that are no shards."""
        for inner in self.checkpoint.others():
            (files / inner).parent.mkdir(parents=True, exist_ok=True)
            with on_disk(files):
                _copy(inside.real(self.checkpoint.path, inner), files / inner)


def _copy(source: Path, target: Path) -> None:
    """Copies a file with its times and permissions, but not those to run as another user."""
    with inside.opened(source) as old, target.open("xb") as new:
        shutil.copyfileobj(old, new, _COPIED)
        new.flush()
        facts = os.fstat(old.fileno())
        os.fchmod(new.fileno(), facts.st_mode & 0o777)
        os.utime(new.fileno(), ns=(facts.st_atime_ns, facts.st_mtime_ns))


def check_disk(writer: Writer, work: Work) -> None:
    """Raises unless what is still to be written fits on the disk."""
    checkpoint, masks, plan = writer.checkpoint, writer.masks, writer.task.scoring.plan
    size = sum(shard.size for shard in checkpoint.shards if shard.name not in work.facts["done"])
    size += sum((checkpoint.path / inner).stat().st_size for inner in checkpoint.others())
    if masks is not None and not masks.complete:
        size += masks.size
    if plan.options.rounds > 1 or plan.options.order != "parallel":  # masks of two rounds
        size += sum(2 * (math.prod(layer.shape) // 8 + 1) for layer in writer.task.layers)
    check_free(work.directory, size)
