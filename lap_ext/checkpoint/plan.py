# SPDX-License-Identifier: MIT
"""What a pruning of a checkpoint will do, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lap_ext import allocation, criteria
from lap_ext.allocation import Sparsity
from lap_ext.checkpoint import passes
from lap_ext.checkpoint.energies import FileNetwork
from lap_ext.checkpoint.files import FUNCTION, Copy, Folder, wrong
from lap_ext.checkpoint.memory import limits, parsed
from lap_ext.checkpoint.passes import Key, PieceCut, Task
from lap_ext.checkpoint.reading import Source, same
from lap_ext.checkpoint.structure import Structure
from lap_ext.criteria import Criterion, Lookahead, Lookback, Lookforward, MagnitudeBN, Random
from lap_ext.criteria.context import BN
from lap_ext.ops import check
from lap_ext.pruning import selection
from lap_ext.pruning.plan import SCOPES, chosen
from lap_ext.topology import Layer

DATA_FREE = (Lookahead, Lookforward, Lookback, Criterion, MagnitudeBN, Random)
MEASURED = (Lookahead, Lookforward, Lookback)  # whose factors are norms of neighbors


@dataclass
class Plan:
    """A task and how its layers are ranked.

    keeps: weights that each layer keeps where it is ranked by itself; keep: of all together (one
    ranking), or None.
    normalize: how scores of layers are made comparable for one ranking; "lamp" gives each layer its
    share (keeps), and then ranks it by itself.
    fused: layers that the fused mask takes in one piece; all others need cuts.
    """

    files: Folder
    task: Task
    keeps: dict[str, int]
    keep: int | None
    normalize: str
    fused: set[str]
    cuts: dict[Key, PieceCut] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether the first pass is needed."""
        return isinstance(self.task.criterion, MEASURED)

    def rankings(self) -> Iterator[tuple[list[Layer], int, str]]:
        """(layers ranked together, how many they keep, how they are scored) that need a cut."""
        if self.keep is not None and self.normalize != "lamp":
            if self.task.layers:
                yield self.task.layers, self.keep, "plain"
            return
        for layer in self.task.layers:
            if layer.name not in self.fused:
                how = "scaled" if used_once(self.task.criterion, layer) else "plain"
                how = "squared" if self.normalize == "lamp" else how
                yield [layer], self.keeps[layer.name], how

    def steps(self) -> dict[str, int]:
        """Layer name -> which weights the first pass samples, for the rankings."""
        steps: dict[str, int] = {}
        rankings = [layers for layers, _, _ in self.rankings()]
        for layers in rankings:  # all samples are held at a time
            limit = max(1, self.task.limits.sample // len(rankings))
            steps |= passes.sample_steps(layers, limit)
        return steps


def used_once(criterion: Criterion, layer: Layer) -> bool:
    """Whether all of a layer's weight has one score a weight, |w| times two factors."""
    return not criterion.by_role or (len(layer.roles) == 1 and layer.roles[0].part.whole)


def check_options(scope: str, criterion: Any, normalize: str, bn: str) -> Criterion:
    """The criterion, if it and the other options are among those for checkpoints."""
    check.one_of(FUNCTION, "scope", scope, SCOPES)
    check.one_of(FUNCTION, "bn", bn, BN)
    check.one_of(FUNCTION, "normalize", normalize, selection.NORMALIZATIONS)
    chosen = criteria.of(criterion, FUNCTION)
    if type(chosen) not in DATA_FREE:
        names = ", ".join(repr(kind.name) for kind in DATA_FREE)
        raise wrong(f"a criterion that reads weights only ({names})", repr(chosen.name))
    return chosen


def check_out(source: Path, target: Path) -> None:
    """The result gets a place of its own."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise wrong("out not to exist, or to be an empty folder", repr(str(target)))
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise wrong(f"out outside of {str(source)!r}, which is only read", repr(str(target)))


def plan_of(
    structure: Structure,
    files: Folder,
    criterion: Criterion,
    sparsity: Sparsity,
    scope: str,
    normalize: str,
    exclude: Sequence[str],
    bn: str,
    memory: int | str,
) -> Plan:
    """The plan; ValueError where options, files or the budget do not allow it."""
    topology, copies = structure.topology, structure.copies
    limit = limits(parsed(memory), topology, copies, criterion, bn)
    layers = chosen(FUNCTION, topology, exclude)
    shapes = {layer.name: layer.shape for layer in layers}
    given = allocation.of(sparsity, FUNCTION)
    keeps = given.keeps(shapes)
    layers = [layer for layer in layers if layer.name in keeps]
    source = Source(files.path)
    _check_copies(source, copies)
    task = Task(source, FileNetwork(topology, bn), criterion, layers, copies, limit)
    if scope == "global":
        if normalize == "none":
            _check_dtypes(task)
        keep = allocation.total(given, shapes)
        return Plan(files, task, keeps, keep, normalize, set())
    fused = {
        layer.name
        for layer in layers
        if layer.name in limit.masked_whole
        and all(len(copy) == 1 for copy in copies[layer.name])
        and used_once(criterion, layer)
    }
    return Plan(files, task, keeps, None, "none", fused)


def _check_copies(source: Source, copies: dict[str, list[Copy]]) -> None:
    """A tied weight that is stored twice is stored alike."""
    for name, (first, *others) in copies.items():
        for other in others:
            if not same(source, first, other):
                raise wrong(
                    f"{first[0].entry.name!r} and {other[0].entry.name!r} alike (they are one "
                    f"weight of the model, {name!r})",
                    "different ones",
                    "Untie them in model.",
                )


def _check_dtypes(task: Task) -> None:
    """Scores of one ranking have one dtype."""
    kinds = {str(task.dtype(layer)): layer.name for layer in task.layers}
    if len(kinds) > 1 and "torch.float64" in kinds:
        first, second = (f"{kind} in {name!r}" for kind, name in list(kinds.items())[:2])
        raise TypeError(
            f"{FUNCTION}: expected no float64 weights beside others with scope='global' (scores are "
            f"ranked in one dtype), got {first} and {second}. Convert them, or use scope='layer'."
        )
