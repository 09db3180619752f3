# SPDX-License-Identifier: MIT
"""Holds the result of pruning a checkpoint: the table of `prune` and masks that stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lap_ext.checkpoint.files import MASKS
from lap_ext.checkpoint.plan import Plan
from lap_ext.masks import BitMasks, Masks
from lap_ext.pruning.result import LayerResult, PruneResult
from lap_ext.report import Histogram


class StoredMasks(Masks):
    """Masks in a file that `Masks.save` wrote, each read when it is requested.

    `Masks.load` reads all masks of the same file into memory at once.
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
    """The result of `checkpoint.prune`: the same as that of `prune`, and where it is on disk.

    Attributes:
        masks: the masks, read from masks_file one at a time; empty with save_masks=False.
        directory: the pruned checkpoint.
        masks_file: the file of masks beside the weights, which `Masks.load` can read, or None.
        scores: layer name -> its scores, counted in bins; empty without count_scores=True.
    """

    directory: Path
    masks_file: Path | None
    scores: Mapping[str, Histogram] = field(default_factory=dict)


def result_of(
    plan: Plan,
    directory: Path,
    rows: Sequence[LayerResult],
    masks_saved: bool,
    scores: Mapping[str, Histogram],
) -> CheckpointResult:
    """Makes the result of a plan whose masks are in a file or were not saved."""
    masks_file = directory / MASKS if masks_saved else None
    shapes = {row.name: row.shape for row in rows}
    masks = Masks({}) if masks_file is None else StoredMasks(masks_file, shapes)
    model = plan.task.network.topology.model
    return CheckpointResult(
        masks,
        rows,
        plan.task.criterion.name,
        directory,
        masks_file,
        scores,
        left_dense=plan.left_dense,
        parameters=sum(x.numel() for x in model.parameters()),
    )
