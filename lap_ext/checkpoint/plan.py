# SPDX-License-Identifier: MIT
"""What a pruning or scoring of a checkpoint will do, checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lap_ext.checkpoint.files import Checkpoint, Copy
from lap_ext.checkpoint.memory import held_by_scores, limits
from lap_ext.checkpoint.reading import Source, same
from lap_ext.checkpoint.state import occupied
from lap_ext.checkpoint.structure import Structure
from lap_ext.checkpoint.weights import Files
from lap_ext.errors import LapValueError
from lap_ext.options import Normalize
from lap_ext.pruning.matrices import rows_together
from lap_ext.pruning.plan import Options, Plan, chosen


def check_out(source: Path, target: Path) -> None:
    """Raises unless target can become a new directory outside of source."""
    if occupied(target):
        raise LapValueError(
            "{argument} not to exist, or to be an empty directory",
            repr(str(target)),
            argument="out",
        )
    inner, outer = (Path(os.path.realpath(path)) for path in (target, source))
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise LapValueError(
            f"{{argument}} outside of {str(source)!r}, which is only read",
            repr(str(target)),
            argument="out",
        )


def plan_of(
    structure: Structure,
    files: Checkpoint,
    options: Options,
    memory: int,
    scored: Normalize | None = None,
) -> tuple[Plan, Files]:
    """Chooses the layers, and makes the place of their weights.

    scored: says that the caller holds scores, and how they are normalized.

    Raises:
        LapValueError: options, files or the memory do not allow it.
    """
    topology, copies = structure.topology, structure.copies
    layers, left_dense = chosen(topology, options)
    held = 0 if scored is None else held_by_scores(layers, copies, scored)
    rows = rows_together(layers, options.structure)
    limit = limits(memory, topology, copies, options.criterion, options.batch_norm, held, rows)
    source = Source(files)
    _check_copies(source, copies.values())
    plan = Plan(topology, layers, options, left_dense)
    return plan, Files(structure, source, limit)


def _check_copies(source: Source, every: Iterable[list[Copy]]) -> None:
    """Raises unless the copies of a tied weight are stored alike."""
    for first, *others in every:
        for other in others:
            if not same(source, first, other):
                raise LapValueError(
                    f"{first[0].entry.name!r} and {other[0].entry.name!r} alike (they are one "
                    "weight of the model)",
                    "different ones",
                    "Untie them in model.",
                )
