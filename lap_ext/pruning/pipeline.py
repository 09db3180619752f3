# SPDX-License-Identifier: MIT
"""Computes the masks of a plan, in all rounds and orders, without changing the model.

A weight may be kept if the masks of an earlier pruning keep it. Without such masks, weights that
are zero count as pruned. Among the weights that may be kept, one that is zero is kept only where
no other is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lap_ext import allocation
from lap_ext.allocation import Sparsity
from lap_ext.criteria import Criterion
from lap_ext.criteria.context import Network, readable
from lap_ext.errors import callback, in_layer, warn
from lap_ext.masks import Masks
from lap_ext.ops.reference.common import require_finite
from lap_ext.progress import Progress, Step
from lap_ext.pruning import selection
from lap_ext.pruning.dense import ZERO
from lap_ext.pruning.patterns import by_name
from lap_ext.pruning.plan import Plan, check_prunable, check_sparsity, checked_masks
from lap_ext.pruning.result import LayerResult, PruneResult, row_of
from lap_ext.topology import Layer


def run(
    plan: Plan,
    sparsity: Sparsity,
    masks: Mapping[str, Tensor] | None,
    data: Iterable[Any] | None,
    on_progress: Callable[[Progress], Any] | None,
) -> PruneResult:
    """Computes the masks of a plan for a sparsity without changing the model."""
    given = checked_masks(plan.topology, masks)
    allocated = allocation.of(by_name(plan.topology, sparsity))
    shapes = {layer.name: layer.shape for layer in plan.layers}
    min_keep = plan.options.min_keep
    check_sparsity(allocated, shapes, plan.left_dense, min_keep)
    scoring = scoring_of(plan, given, data, on_progress)
    live = _live(plan.layers, given)
    asked = masks is not None and not masks  # {}: zeros count as weights
    zero = [] if asked else [x.name for x in plan.layers if _is_zero(x, live, masks or {})]
    budget = allocation.budget(allocated, shapes, min_keep, without=zero)
    layers = [layer for layer in plan.layers if layer.name in budget.keeps]
    check_prunable(layers)
    if plan.options.scope == "global":
        floors = {x.name: min(budget.floors[x.name], _unpruned(x, live)) for x in layers}
        allocation.check_floors(floors, budget.total)
        kept = _globally(scoring, layers, live, budget.total, floors)
    else:
        kept = _by_layer(scoring, layers, live, budget.keeps)
    scoring.warn_of_dead()
    nonzero = {name: int(mask.count_nonzero()) for name, mask in kept.items()}
    if masks is not None:
        may = {layer.name: _may(layer, given) for layer in layers}
        if plan.options.scope == "global":
            kept = _filled(kept, may, budget.total)
        else:
            for name, mask in kept.items():
                kept |= _filled({name: mask}, {name: may[name]}, budget.keeps[name])
    rows = [row_of(layer, kept[layer.name], nonzero[layer.name]) for layer in layers]
    return result_of(plan, Masks(kept), rows, plan.left_dense | dict.fromkeys(zero, ZERO))


def result_of(
    plan: Plan, masks: Masks, rows: Sequence[LayerResult], left_dense: Mapping[str, str]
) -> PruneResult:
    """Makes the result of a plan."""
    topology = plan.topology
    return PruneResult(
        masks,
        rows,
        plan.criterion.name,
        left_dense=left_dense,
        parameters=sum(x.numel() for x in topology.model.parameters()),
        unreached=topology.unreached,
    )


@dataclass(frozen=True)
class Scoring:
    """A plan, the network that computes its scores, and the progress listener.

    Attributes:
        masks: the masks of an earlier pruning.
        dead: names of layers whose scores are all 0.
    """

    plan: Plan
    network: Network
    masks: dict[str, Tensor]
    on_progress: Callable[[Progress], Any] | None
    dead: dict[str, None] = field(default_factory=dict)

    def measure(self, layers: Sequence[Layer]) -> None:
        """Measures the norms of all layers, unless there is nothing to score."""
        if not layers or not self.plan.criterion.reads_norms:
            return
        every = self.plan.topology.layers
        total = sum(every[role.layer].weight.nbytes for role in self.network.unmeasured())
        step = Step(self.on_progress, "measure", total)
        for role in self.network.take_norms():
            step.read(role.layer, every[role.layer].weight.nbytes)

    def step(self, name: str, layers: Sequence[Layer]) -> Step:
        """Begins a progress step that reads the weights of layers once."""
        return Step(self.on_progress, name, sum(layer.weight.nbytes for layer in layers))

    def criterion(self, layer: Layer) -> Criterion:
        """Returns the criterion to rank a layer by: magnitude where all scores are 0."""
        options = self.plan.options
        if not selection.scores_nothing(self.network, options.criterion, layer):
            return options.criterion
        if not bool(layer.weight.any()):  # nothing is left to rank
            return options.criterion
        self.dead[layer.name] = None
        return options.criterion if options.raw else Criterion()

    def warn_of_dead(self) -> None:
        """Warns of the layers whose scores are all 0."""
        if self.dead:
            warn(selection.dead_text(self.dead, self.plan.options.raw))


def scoring_of(
    plan: Plan,
    masks: dict[str, Tensor],
    data: Iterable[Any] | None,
    on_progress: Callable[[Progress], Any] | None,
) -> Scoring:
    """Prepares the network; criteria that need data read it here."""
    if data is not None:
        Step(on_progress, "data", 0).read("", 0)
        for layer in plan.topology.layers.values():  # else the error would blame the data
            with in_layer(layer.name):
                require_finite(readable(layer), "w")
    with callback():
        network = plan.criterion.prepare(plan.network(masks), data)
    return Scoring(plan, network, masks, on_progress)


def _live(layers: Sequence[Layer], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks the weights that may be kept, for layers that have others: pruned or zero ones."""
    live = {}
    for layer in layers:
        weight, mask = layer.weight.detach(), masks.get(layer.name)
        if int(weight.count_nonzero()) < weight.numel():
            live[layer.name] = weight != 0 if mask is None else (weight != 0) & mask
        elif mask is not None:
            live[layer.name] = mask
    return live


def _is_zero(layer: Layer, live: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> bool:
    """Tells whether a layer has weights, all of them zero, and no mask of an earlier pruning."""
    candidate = layer.weight.numel() > 0 and layer.name in live and layer.name not in masks
    return candidate and not bool(live[layer.name].any())


def _globally(
    scoring: Scoring,
    layers: list[Layer],
    live: Mapping[str, Tensor],
    keep: int,
    floors: Mapping[str, int],
) -> dict[str, Tensor]:
    """Computes the masks of one ranking over all layers, in all rounds."""
    network, options = scoring.network, scoring.plan.options
    masks = dict(live)
    start = sum(_unpruned(layer, masks) for layer in layers)
    for number in range(1, options.rounds + 1):
        scoring.measure(layers)
        criteria = [scoring.criterion(layer) for layer in layers]
        pairs = list(zip(layers, criteria, strict=True))
        stored = [x for x, how in pairs if selection.stores_scores(how, x)]
        step, rankables = scoring.step("score", stored), []
        for layer, how in pairs:
            rankables.append(selection.rankable(network, how, layer, options.normalize))
            if layer in stored:
                step.read(layer.name, layer.weight.nbytes)
        target = _target(number, options.rounds, start, keep)
        step = scoring.step("rank", layers)
        masks = selection.floored_masks(layers, rankables, target, masks, floors)
        step.read("", step.total)
        if number < options.rounds:
            _set_masks(network, masks)
    return masks


def _by_layer(
    scoring: Scoring, layers: list[Layer], live: Mapping[str, Tensor], keeps: Mapping[str, int]
) -> dict[str, Tensor]:
    """Computes the masks of layers that are ranked separately, in all rounds."""
    network, options = scoring.network, scoring.plan.options
    masks = dict(live)
    start = {layer.name: _unpruned(layer, masks) for layer in layers}
    for number in range(1, options.rounds + 1):
        scoring.measure(layers)
        step = scoring.step("rank", layers)
        for layer in reversed(layers) if options.order == "backward" else layers:
            name = layer.name
            keep = _target(number, options.rounds, start[name], keeps[name])
            how = scoring.criterion(layer)
            masks[name] = selection.layer_mask(network, how, layer, keep, masks.get(name))
            step.read(name, layer.weight.nbytes)
            if options.order != "parallel":
                network.set_mask(name, masks[name])
        if options.order == "parallel" and number < options.rounds:
            _set_masks(network, masks)
    return {layer.name: masks[layer.name] for layer in layers}


def _filled(kept: Mapping[str, Tensor], may: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Keeps zero weights too, the first ones, where fewer than keep others may be kept."""
    counts = (int(mask.count_nonzero()) for mask in may.values())
    missing = min(keep, sum(counts)) - sum(int(mask.count_nonzero()) for mask in kept.values())
    filled = dict(kept)
    for name, mask in kept.items():
        if missing <= 0:
            break
        free = (may[name] & ~mask).flatten().nonzero().flatten()[:missing]
        filled[name] = mask.flatten().index_fill(0, free, True).reshape(mask.shape)
        missing -= free.numel()
    return filled


def _may(layer: Layer, masks: Mapping[str, Tensor]) -> Tensor:
    """Masks the weights that the earlier pruning has kept, zero ones too."""
    mask = masks.get(layer.name)
    return torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask


def _unpruned(layer: Layer, masks: Mapping[str, Tensor]) -> int:
    """Counts the weights of a layer that its mask keeps."""
    mask = masks.get(layer.name)
    return layer.weight.numel() if mask is None else int(mask.count_nonzero())


def _target(number: int, rounds: int, start: int, keep: int) -> int:
    """Returns how many weights to keep after a round; each round removes the same number."""
    return start - max(start - keep, 0) * number // rounds


def _set_masks(network: Network, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        network.set_mask(name, mask)
