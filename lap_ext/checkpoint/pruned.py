# SPDX-License-Identifier: MIT
"""What pruning a checkpoint gives back: the table of `prune`, the folder, masks that stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lap_ext import mask_file
from lap_ext.masks import Masks
from lap_ext.result import LayerResult, PruneResult


class StoredMasks(Masks):
    """Masks in a file of `Masks.save`, read one at a time when they are asked for.

    `Masks.load` of the same file has all of them in memory at once.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self._shapes = dict(shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        opener, _ = mask_file._safetensors("StoredMasks")
        with opener(self.path, framework="pt") as file:
            return mask_file._read(file, name, self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass(frozen=True)
class CheckpointResult(PruneResult):
    """The result of `checkpoint.prune`: as that of `prune`, and where it lies.

    Attributes:
        masks: read from masks_file one at a time; empty with save_masks=False.
        folder: the pruned checkpoint.
        masks_file: the masks beside the weights, as `Masks.load` reads them, or None.
    """

    folder: Path
    masks_file: Path | None


@dataclass(frozen=True)
class Progress:
    """How far a pruning is, for on_progress.

    Attributes:
        step: "measure" (energies), "rank" (the cut of a ranking over more than is in memory) or
            "write".
        name: the layer or tensor.
        done: bytes read so far, over all steps.
        total: bytes that will be read; grows if a ranking needs another pass.
    """

    step: str
    name: str
    done: int
    total: int


def result_of(
    folder: Path, rows: Sequence[LayerResult], criterion: str, masks_file: Path | None
) -> CheckpointResult:
    """The result whose masks are in a file, or nowhere."""
    shapes = {row.name: row.shape for row in rows}
    masks = Masks({}) if masks_file is None else StoredMasks(masks_file, shapes)
    return CheckpointResult(masks, rows, criterion, folder, masks_file)
