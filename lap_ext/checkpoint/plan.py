# SPDX-License-Identifier: MIT
"""What a pruning or scoring of a checkpoint will do, checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lap_ext._text import layer_name
from lap_ext.checkpoint.files import Checkpoint, Copy
from lap_ext.checkpoint.memory import held_by_scores, held_by_units, limits
from lap_ext.checkpoint.reading import Source, same
from lap_ext.checkpoint.state import occupied
from lap_ext.checkpoint.structure import Structure
from lap_ext.checkpoint.weights import Files
from lap_ext.errors import LapValueError
from lap_ext.options import Normalize
from lap_ext.pruning.matrices import rows_together
from lap_ext.pruning.plan import Options, Plan, planned


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
    plan = planned(topology, options)
    held = 0 if scored is None else held_by_scores(plan.layers, copies, scored)
    rows = rows_together(plan.layers, options.structure)
    sums = 0 if plan.groups is None else held_by_units(plan.groups)
    limit = limits(
        memory, topology, copies, options.criterion, options.batch_norm, held, rows, sums
    )
    source = Source(files)
    names = () if plan.groups is None else plan.groups.vector_shapes()
    vectors = {layer_name(name): structure.find(name) for name in names}
    _check_copies(source, [*copies.values(), *vectors.values()])
    return plan, Files(structure, source, limit, vectors)


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
