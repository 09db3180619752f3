# SPDX-License-Identifier: MIT
"""Prunes the layers of a place: allocates, scores and selects, in all rounds and orders.

Nothing here knows where weights live (lap_ext/places). The weights are not changed: what comes out
says how each layer is masked.

A weight may be kept if the masks of an earlier pruning keep it. Without such masks, weights that
are zero count as pruned. Among the weights that may be kept, one that is zero is kept only where
no other is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lap_ext import allocation
from lap_ext.allocation import Sparsity
from lap_ext.criteria.context import Network, check_finite
from lap_ext.errors import callback
from lap_ext.ops import check
from lap_ext.ops.reference.common import score_dtype
from lap_ext.places import Place
from lap_ext.progress import Progress, Step
from lap_ext.pruning import coupled, selection, structured
from lap_ext.pruning.coupled import Units
from lap_ext.pruning.dense import ZERO
from lap_ext.pruning.patterns import by_name
from lap_ext.pruning.plan import Plan, check_prunable, check_sparsity, pattern_at
from lap_ext.pruning.scoring import Scoring
from lap_ext.pruning.selection import Selection
from lap_ext.structures import NM
from lap_ext.topology import Layer


@dataclass(frozen=True)
class Task:
    """A pruning whose options fit its weights.

    Attributes:
        scoring: computes the scores.
        layers: the layers to prune, in the network's order.
        budget: how many weights are kept.
        live: how many weights of each layer may be kept; where that was not counted, all.
        left_dense: layers that stay dense by default -> the reason.
        pattern: the pattern of all layers, or None.
        units: what is pruned in units across layers, or None.
    """

    scoring: Scoring
    layers: list[Layer]
    budget: allocation.Budget
    live: Mapping[str, int]
    left_dense: dict[str, str]
    pattern: NM | None = None
    units: Units | None = None


def begin(
    plan: Plan,
    place: Place,
    sparsity: Sparsity | None,
    data: Any,
    on_progress: Callable[[Progress], Any] | None,
    *,
    zero_layers: Collection[str] | None = (),
) -> Task:
    """Checks what depends on the weights, and allocates.

    Args:
        plan: the layers and options.
        place: where the weights live.
        sparsity: as in `prune`. A pattern of its own sparsity may be given a lower one, which it
            reaches in part.
        data: as in `prune`.
        on_progress: as in `prune`.
        zero_layers: names of layers that are pruned like others even where they are all zero; None
            means all.
    """
    options = plan.options
    if plan.groups is not None:
        units = coupled.units_of(plan, sparsity)
        units.zeros = zero_layers is None or bool(zero_layers)  # masks are given
        scoring = scoring_of(plan, place, data, on_progress)
        check_prunable(plan.layers)
        nothing = allocation.Budget(dict.fromkeys((x.name for x in plan.layers), 0), 0, {})
        return Task(scoring, plan.layers, nothing, {}, {}, units=units)
    pattern = pattern_at(options.structure, sparsity)
    if sparsity is None:
        assert pattern is not None  # check_given
        sparsity = pattern.sparsity
    allocated = allocation.of(by_name(plan.topology, sparsity))
    shapes = {layer.name: layer.shape for layer in plan.layers}
    check_sparsity(allocated, shapes, plan.left_dense, options.min_keep)
    if options.scope == "global" and options.normalize == "none":
        names = [f"layer {layer.name!r}" for layer in plan.layers]
        kinds = [str(score_dtype(place.dtype(layer))) for layer in plan.layers]
        check.one_of_a_kind("dtype", kinds, names)
    scoring = scoring_of(plan, place, data, on_progress)
    live = _live_counts(scoring)
    zero = [name for name, count in live.items() if not count and 0 not in shapes[name]]
    zero = [] if zero_layers is None else [name for name in zero if name not in zero_layers]
    budget = allocation.budget(allocated, shapes, options.min_keep, without=zero)
    layers = [layer for layer in plan.layers if layer.name in budget.keeps]
    check_prunable(layers)
    if options.scope == "global":
        floors = {x.name: min(budget.floors[x.name], live[x.name]) for x in layers}
        allocation.check_floors(floors, budget.total)
        budget = allocation.Budget(budget.keeps, budget.total, floors)
    left_dense = plan.left_dense | dict.fromkeys(zero, ZERO)
    return Task(scoring, layers, budget, live, left_dense, pattern)


def scoring_of(
    plan: Plan,
    place: Place,
    data: Any,
    on_progress: Callable[[Progress], Any] | None,
    *,
    raw: bool | None = None,
) -> Scoring:
    """Prepares the network; criteria that need data read it here.

    raw: whether scores that are all 0 stay, in place of magnitudes; None: as the options say.
    """
    options = plan.options
    if data is not None:
        Step(on_progress, "data", 0).read("", 0)
        for layer in plan.topology.layers.values() if place.held else ():
            check_finite(layer)  # else the error would blame the data
    chain = [layer.name for layer in plan.layers] if options.residual == "chain" else None
    network = Network(place, options.batch_norm, chain=chain)
    with callback():
        plan.criterion.prepare(network, data)
    return Scoring(plan, network, on_progress, options.raw if raw is None else raw)


def before_rounds(task: Task, data: Any) -> Scoring:
    """Returns what scores the weights as they are before any is pruned; call it before `select`.

    data: as in `prune`.
    """
    options, scoring = task.scoring.plan.options, task.scoring
    if options.rounds == 1 and options.order == "parallel":
        return scoring  # its masks are set after the last score
    first = scoring_of(scoring.plan, scoring.place, data, scoring.on_progress)
    first.measure(_name(1))
    for layer in task.layers:
        first.criterion(layer)
    if options.scope == "global" and task.units is None:  # units have sizes of their own
        selection.find_sizes(first, task.layers, _name(1))
    return first


def _live_counts(scoring: Scoring) -> dict[str, int]:
    """Counts the weights of each layer that may be kept, as far as that is needed.

    Where only one that is not zero is looked for, the first chunk that has one ends a layer.
    """
    options, place = scoring.plan.options, scoring.place
    floored = options.scope == "global" and bool(options.min_keep)
    exact = place.held or floored or options.rounds > 1
    by_units = options.structure is not None and not isinstance(options.structure, NM)
    live = {}
    for layer in scoring.plan.layers:
        if by_units and exact:
            live[layer.name] = structured.live_weights(scoring, layer)
            continue
        count = 0
        for chunk in place.chunks(layer):
            mask = place.live(chunk)
            count += chunk.weight.numel() if mask is None else int(mask.count_nonzero())
            if count and not exact:
                count = math.prod(layer.shape)
                break
        live[layer.name] = count
    return live


def select(task: Task) -> dict[str, Selection]:
    """Selects in all rounds and orders, and says how each layer is masked in the last one."""
    options, scoring = task.scoring.plan.options, task.scoring
    if task.units is not None:
        found = coupled.select(scoring, task.units, partial(_store, task))
        step = scoring.step("rank", ())
        return {x.name: selection.settled(scoring, x, found[x.name], step) for x in task.layers}
    for number in range(1, options.rounds + 1):
        if options.order == "parallel" and number == options.rounds:
            selections = _selected(task, number)
            step = scoring.step("rank", task.layers)
            return {
                layer.name: selection.settled(scoring, layer, selections[layer.name], step)
                for layer in task.layers
            }
        scoring.place.round(number, partial(_round, task, number))
    return {layer.name: selection.Stored() for layer in task.layers}


def _store(task: Task, selections: Mapping[str, Selection]) -> None:
    """Gives the place the masks of all layers after a round."""
    step = task.scoring.step("rank", ())
    for layer in task.layers:
        selection.store(task.scoring, layer, selections[layer.name], step)


def _round(task: Task, number: int) -> None:
    """Selects in one round and gives the place the masks."""
    scoring, order = task.scoring, task.scoring.plan.options.order
    if order == "parallel":
        selections, step = _selected(task, number), scoring.step("rank", task.layers)
        for layer in task.layers:
            selection.store(scoring, layer, selections[layer.name], step)
        scoring.forget(task.layers)
        return
    scoring.measure(_name(number))
    step = scoring.step("rank", task.layers)
    for layer in reversed(task.layers) if order == "backward" else task.layers:
        how = _of_layer(task, number, layer)
        selection.store(scoring, layer, how, step)
        scoring.forget([layer])


def _selected(task: Task, number: int) -> dict[str, Selection]:
    """Selects in one round with the norms that all layers have before it."""
    scoring, layers, budget, name = task.scoring, task.layers, task.budget, _name(number)
    scoring.measure(name)
    if scoring.plan.options.scope == "layer":
        return {layer.name: _of_layer(task, number, layer) for layer in layers}
    keep = _target(task, number, layers, budget.total)
    if scoring.plan.options.structure is None:
        return selection.of_all(scoring, layers, keep, budget.floors, name)
    every = {layer.name: least(task, layer) for layer in layers}
    return {**structured.of_all(scoring, layers, keep, every, name)}


def _of_layer(task: Task, number: int, layer: Layer) -> Selection:
    """Selects in one round in a layer that is ranked by itself."""
    options = task.scoring.plan.options
    if task.pattern is not None:
        dropped = (task.pattern.of - task.pattern.keep) * number // options.rounds
        pattern = replace(task.pattern, keep=task.pattern.of - dropped)
        return structured.of_pattern(task.scoring, layer, pattern)
    keep = _target(task, number, [layer], task.budget.keeps[layer.name])
    if options.structure is not None:
        return structured.of_layer(task.scoring, layer, keep, least(task, layer))
    return selection.of_layer(task.scoring, layer, keep, _name(number))


def least(task: Task, layer: Layer) -> int:
    """Returns how many weights a layer keeps at least, in whole units; by default, one unit."""
    default = task.scoring.plan.options.min_keep is None
    return max(task.budget.floors[layer.name], int(default))


def _name(number: int) -> str:
    """Names what the place notes of a round."""
    return f"round {number}"


def _target(task: Task, number: int, layers: Sequence[Layer], keep: int) -> int:
    """Returns how many weights to keep after a round; each round removes the same number."""
    start = sum(task.live[layer.name] for layer in layers)
    return start - max(start - keep, 0) * number // task.scoring.plan.options.rounds
