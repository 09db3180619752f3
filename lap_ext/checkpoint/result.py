# SPDX-License-Identifier: MIT
"""Holds the result of pruning a checkpoint: the table of `prune` and masks that stay on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.nn import Module

from lap_ext._text import layer_name
from lap_ext.checkpoint.files import MASKS
from lap_ext.errors import LapTypeError, calling
from lap_ext.masks import BitMasks, Masks
from lap_ext.options import Inputs, OnUnsupported
from lap_ext.pruning.pipeline import Task
from lap_ext.pruning.result import LayerResult, Original, PruneResult
from lap_ext.report import Histogram, write


class StoredMasks(Mapping[str, Tensor]):
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

    @calling("CheckpointResult.report")
    def report(
        self,
        path: str | os.PathLike[str],
        original: Original,
        example_inputs: Inputs | None = None,
        *,
        model: Module | None = None,
        on_unsupported: OnUnsupported = "raise",
    ) -> None:
        """Writes an HTML page about the pruning, with one pass over the original's files.

        Args:
            path: the page; a file of this name is replaced.
            original: the checkpoint directory that was pruned.
            example_inputs: as in `checkpoint.prune`.
            model: as in `checkpoint.prune`.
            on_unsupported: as in `checkpoint.prune`.

        Raises:
            ValueError: the masks were not saved; or as `checkpoint.prune`.
            TypeError, TopologyError: as `checkpoint.prune`.
        """
        from lap_ext.checkpoint.reporting import checkpoint_facts

        if not isinstance(original, (str, os.PathLike)):
            raise LapTypeError(
                "{argument} to be a checkpoint directory",
                type(original).__name__,
                argument="original",
            )
        facts = checkpoint_facts(
            original,
            self,
            example_inputs=example_inputs,
            model=model,
            on_unsupported=on_unsupported,
        )
        write(path, facts)


def result_of(
    task: Task,
    directory: Path,
    rows: Sequence[LayerResult],
    masks_saved: bool,
    scores: Mapping[str, Histogram],
) -> CheckpointResult:
    """Makes the result of a pruning whose masks are in a file or were not saved."""
    masks_file = directory / MASKS if masks_saved else None
    units = task.units
    shapes = {row.name: row.shape for row in rows}
    if units is not None:
        vectors = units.groups.vector_shapes()
        shapes |= {layer_name(name): shape for name, shape in vectors.items()}
    stored = {} if masks_file is None else StoredMasks(masks_file, shapes)
    structure = task.scoring.plan.options.structure
    masks = Masks.reading(stored, structure)
    topology = task.scoring.plan.topology
    return CheckpointResult(
        masks,
        rows,
        task.scoring.plan.criterion.name,
        directory,
        masks_file,
        scores,
        left_dense=task.left_dense,
        parameters=sum(x.numel() for x in topology.model.parameters()),
        unreached=topology.unreached,
        families=() if units is None else units.families(),
        fixed=() if units is None else units.groups.fixed,
    )
