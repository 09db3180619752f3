# SPDX-License-Identifier: MIT
"""The result of pruning a checkpoint: the table of `prune`, and masks that stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lap_ext.masks import BitMasks, Masks
from lap_ext.pruning.result import LayerResult, PruneResult
from lap_ext.report import Histogram


class StoredMasks(Masks):
    """Masks in a file of `Masks.save`, each read when it is requested.

    `Masks.load` of the same file has all of them in memory at once.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self._shapes = dict(shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        with BitMasks(self.path) as file:
            return file.mask(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass(frozen=True)
class CheckpointResult(PruneResult):
    """The result of `checkpoint.prune`: as that of `prune`, and where it is on the disk.

    Attributes:
        masks: read from masks_file one at a time; empty with save_masks=False.
        directory: the pruned checkpoint.
        masks_file: the masks beside the weights, as `Masks.load` reads them, or None.
        scores: layer name -> its scores, counted in bins; empty without count_scores=True.
    """

    directory: Path
    masks_file: Path | None
    scores: Mapping[str, Histogram] = field(default_factory=dict)


def result_of(
    directory: Path,
    rows: Sequence[LayerResult],
    criterion: str,
    masks_file: Path | None,
    scores: Mapping[str, Histogram],
) -> CheckpointResult:
    """Makes the result; the masks are in a file, or were not saved."""
    shapes = {row.name: row.shape for row in rows}
    masks = Masks({}) if masks_file is None else StoredMasks(masks_file, shapes)
    return CheckpointResult(masks, rows, criterion, directory, masks_file, scores)
