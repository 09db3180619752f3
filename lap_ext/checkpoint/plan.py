# SPDX-License-Identifier: MIT
"""What a pruning of a checkpoint will do, checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lap_ext import allocation, criteria
from lap_ext.allocation import Sparsity
from lap_ext.checkpoint import passes
from lap_ext.checkpoint.files import Checkpoint, Copy
from lap_ext.checkpoint.memory import held_by_scores, limits
from lap_ext.checkpoint.norms import FileNetwork
from lap_ext.checkpoint.passes import Key, SliceThreshold, Task
from lap_ext.checkpoint.reading import Source, same
from lap_ext.checkpoint.state import occupied
from lap_ext.checkpoint.structure import Structure
from lap_ext.criteria import (
    Criterion,
    CriterionLike,
    Lookahead,
    Lookback,
    Lookforward,
    MagnitudeBN,
    Random,
)
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.options import (
    BATCH_NORMS,
    SCOPES,
    BatchNorm,
    MinKeep,
    Normalize,
    Patterns,
    Scope,
    normalize_for,
    one_of,
)
from lap_ext.pruning.dense import ZERO
from lap_ext.pruning.patterns import by_name
from lap_ext.pruning.plan import check_sparsity, chosen
from lap_ext.pruning.selection import stores_scores
from lap_ext.topology import Layer

DATA_FREE = (Lookahead, Lookforward, Lookback, Criterion, MagnitudeBN, Random)
MEASURED = (Lookahead, Lookforward, Lookback)  # whose norms are norms of neighbors


@dataclass
class Plan:
    """A task and how its layers are ranked.

    Attributes:
        files: the checkpoint to prune.
        task: the inputs of all passes.
        keeps: weights that each layer keeps where it is ranked by itself.
        keep: weights that all layers keep together (one ranking), or None.
        normalize: how scores of layers are made comparable for one ranking; "lamp" first finds how
            many weights each layer keeps, and then ranks it by itself.
        fused: layers that the fused operator masks at once; all others need thresholds.
        floors: weights that each layer keeps at least.
        left_dense: layers that stay dense by default -> the reason.
        thresholds: those that are known so far.
    """

    files: Checkpoint
    task: Task
    keeps: dict[str, int]
    keep: int | None
    normalize: Normalize
    fused: set[str]
    floors: dict[str, int]
    left_dense: dict[str, str]
    thresholds: dict[Key, SliceThreshold] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether the first pass is needed."""
        return isinstance(self.task.criterion, MEASURED)

    def rankings(self) -> Iterator[tuple[list[Layer], int, str]]:
        """Gives (layers ranked together, how many they keep, how they are scored) to threshold."""
        if self.keep is not None and self.normalize != "lamp":
            if self.task.layers:
                yield self.task.layers, self.keep, "plain"
            return
        for layer in self.task.layers:
            if layer.name not in self.fused:
                once = not stores_scores(self.task.criterion, layer)
                how = "scaled" if once and self.normalize != "lamp" else "plain"
                yield [layer], self.keeps[layer.name], how

    def steps(self) -> dict[str, int]:
        """Computes the distance between the weights that the first pass samples of each layer."""
        steps: dict[str, int] = {}
        rankings = [layers for layers, _, _ in self.rankings()]
        for layers in rankings:  # all samples are held together
            limit = max(1, self.task.limits.sample // len(rankings))
            steps |= passes.sample_steps(layers, limit)
        return steps


def check_options(
    scope: Scope, criterion: CriterionLike, normalize: Normalize, batch_norm: BatchNorm
) -> Criterion:
    """Returns the criterion, if it and the other options can be used for checkpoints."""
    one_of("scope", scope, SCOPES)
    one_of("batch_norm", batch_norm, BATCH_NORMS)
    normalize_for(normalize, scope)  # checks it
    checked = criteria.of(criterion)
    if type(checked) not in DATA_FREE:
        names = ", ".join(repr(kind.name) for kind in DATA_FREE)
        raise LapValueError(f"a criterion that reads weights only ({names})", repr(checked.name))
    return checked


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
    criterion: Criterion,
    sparsity: Sparsity,
    *,
    scope: Scope,
    normalize: Normalize,
    layers: Patterns | None,
    exclude: Patterns,
    batch_norm: BatchNorm,
    memory: int,
    min_keep: MinKeep = None,
    scored: Normalize | None = None,
) -> Plan:
    """Makes the plan; scored says that the caller holds scores, and how they are normalized.

    Raises:
        LapValueError: options, files or the memory do not allow it.
        LapTypeError: weights of one ranking have float64 scores beside others.
    """
    topology, copies = structure.topology, structure.copies
    pruned, left_dense = chosen(topology, layers, exclude)
    held = 0 if scored is None else held_by_scores(pruned, copies, scored)
    limit = limits(memory, topology, copies, criterion, batch_norm, held)
    shapes = {layer.name: layer.shape for layer in pruned}
    allocated = allocation.of(by_name(topology, sparsity))
    check_sparsity(allocated, shapes, left_dense, min_keep)
    source = Source(files)
    _check_copies(source, copies)
    task = Task(source, FileNetwork(topology, batch_norm), criterion, pruned, copies, limit)
    floored = scope == "global" and bool(min_keep)
    live = passes.live_counts(task, exact=floored) if scored is None else {}
    zero = [name for name, count in live.items() if not count and 0 not in shapes[name]]
    left_dense |= dict.fromkeys(zero, ZERO)
    budget = allocation.budget(allocated, shapes, min_keep, without=zero)
    task.layers = [layer for layer in pruned if layer.name in budget.keeps]
    task.raw = scored is not None or (scope == "global" and normalize == "none")
    keeps, floors = budget.keeps, budget.floors
    if floored:
        floors = {name: min(floor, live[name]) for name, floor in floors.items()}
    if scope == "global":
        if normalize == "none":
            _check_dtypes(task)
        allocation.check_floors(floors, budget.total)
        return Plan(files, task, keeps, budget.total, normalize, set(), floors, left_dense)
    fused = {
        layer.name
        for layer in task.layers
        if layer.name in limit.masked_full
        and all(len(copy) == 1 for copy in copies[layer.name])
        and not stores_scores(criterion, layer)
    }
    return Plan(files, task, keeps, None, "none", fused, floors, left_dense)


def _check_copies(source: Source, copies: dict[str, list[Copy]]) -> None:
    """Raises unless the copies of a tied weight are stored alike."""
    for name, (first, *others) in copies.items():
        for other in others:
            if not same(source, first, other):
                raise LapValueError(
                    f"{first[0].entry.name!r} and {other[0].entry.name!r} alike (they are one "
                    f"weight of the model, {name!r})",
                    "different ones",
                    "Untie them in model.",
                )


def _check_dtypes(task: Task) -> None:
    """Raises unless the scores of one ranking have one dtype."""
    kinds = {str(task.dtype(layer)): layer.name for layer in task.layers}
    if len(kinds) > 1 and "torch.float64" in kinds:
        first, second = (f"{kind} in {name!r}" for kind, name in list(kinds.items())[:2])
        raise LapTypeError(
            "no float64 weights beside others with {scope='global'} (scores are ranked in one "
            "dtype)",
            f"{first} and {second}",
            "Convert them, or use {scope='layer'}.",
        )
