# SPDX-License-Identifier: MIT
"""Runs the pipeline on a model in memory, after an earlier pruning or on dense weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lap_ext._text import layer_name
from lap_ext.allocation import Sparsity
from lap_ext.masks import Masks
from lap_ext.places import Chunk, Memory
from lap_ext.progress import Progress
from lap_ext.pruning import pipeline, structured
from lap_ext.pruning.coupled import Units
from lap_ext.pruning.families import families_of, removed_by
from lap_ext.pruning.kept_axes import KeptAxes
from lap_ext.pruning.pipeline import Task
from lap_ext.pruning.plan import Plan, checked_masks
from lap_ext.pruning.result import LayerResult, PruneResult, row_of
from lap_ext.topology import Layer


def run(
    plan: Plan,
    sparsity: Sparsity | None,
    masks: Mapping[str, Tensor] | None,
    data: Any,
    on_progress: Callable[[Progress], Any] | None,
) -> PruneResult:
    """Computes the masks of a plan for a sparsity without changing the model."""
    given = checked_masks(plan.topology, masks)
    place = Memory(plan.topology, given)
    zero_layers = None if masks is not None and not masks else masks or ()  # {}: zeros are weights
    task = pipeline.begin(plan, place, sparsity, data, on_progress, zero_layers=zero_layers)
    pipeline.select(task)
    task.scoring.warn_of_dead()
    if task.units is not None:
        return _coupled(plan, task, task.units, place, masks)
    kept = {layer.name: place.masks[layer.name] for layer in task.layers}
    nonzero = {name: int(mask.count_nonzero()) for name, mask in kept.items()}
    if masks is not None:
        may = {layer.name: _may(layer, given) for layer in task.layers}
        if plan.options.structure is not None:
            kept = _filled_structure(task, kept, may)
        elif plan.options.scope == "global":
            kept = _filled(kept, may, task.budget.total)
        else:
            for name, mask in kept.items():
                kept |= _filled({name: mask}, {name: may[name]}, task.budget.keeps[name])
    structure = plan.options.structure
    known = {} if masks is not None else task.scoring.units  # zeros may be kept beside those
    rows = [
        row_of(x, kept[x.name], nonzero[x.name], structure, known.get(x.name)) for x in task.layers
    ]
    structure = task.pattern or structure
    return result_of(plan, Masks(kept, structure), rows, task.left_dense)


def _coupled(
    plan: Plan,
    task: Task,
    units: Units,
    place: Memory,
    given: Mapping[str, Tensor] | None,
) -> PruneResult:
    """Makes the result of units across layers; where masks are given, zeros are weights."""
    kept, rows = {}, []
    for layer in task.layers:
        mask = place.masks[layer.name]
        nonzero = 0 if layer.name in units.zero else int(mask.count_nonzero())
        if given is not None:
            mask, earlier = _axes_mask(units, layer), given.get(layer.name)
            mask = mask if earlier is None else mask & earlier.to(mask.device)
        kept[layer.name] = mask
        rows.append(row_of(layer, mask, nonzero))
    devices = {layer_name(name): x.device for name, x in plan.topology.tensors().items()}
    for name, own in units.vector_masks().items():
        mask, earlier = own.to(devices[name]), None if given is None else given.get(name)
        kept[name] = mask if earlier is None else mask & earlier.to(mask.device)
    result = result_of(plan, Masks(kept, plan.options.structure), rows, task.left_dense)
    return replace(result, families=units.families())


def _axes_mask(units: Units, layer: Layer) -> Tensor:
    """Masks the rows and columns of a layer that are kept."""
    return KeptAxes(units.groups.views(layer.parameter), units.removed).mask(
        Chunk(layer, layer.weight.detach())
    )


def result_of(
    plan: Plan, masks: Masks, rows: Sequence[LayerResult], left_dense: Mapping[str, str]
) -> PruneResult:
    """Makes the result of a plan; which units across layers are kept, the masks say."""
    topology, groups = plan.topology, plan.groups
    return PruneResult(
        masks,
        rows,
        plan.criterion.name,
        left_dense=left_dense,
        parameters=sum(x.numel() for x in topology.model.parameters()),
        unreached=topology.unreached,
        families=() if groups is None else families_of(groups, removed_by(groups, masks)),
        fixed=() if groups is None else groups.fixed,
    )


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


def _filled_structure(
    task: Task, kept: Mapping[str, Tensor], may: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Keeps zero weights too, as far as the structure has room for them."""
    layers, pattern, budget = task.layers, task.pattern, task.budget
    if pattern is not None:
        pairs = ((x, kept[x.name], may[x.name]) for x in layers)
        return {x.name: structured.filled_pattern(x, pattern, *masks) for x, *masks in pairs}
    least = {x.name: pipeline.least(task, x) for x in layers}
    together = task.scoring.plan.options.scope == "global"
    groups = [(layers, budget.total)] if together else [([x], budget.keeps[x.name]) for x in layers]
    filled: dict[str, Tensor] = {}
    for group, keep in groups:
        filled |= structured.filled_units(task.scoring, group, kept, may, keep, least)
    return filled


def _may(layer: Layer, masks: Mapping[str, Tensor]) -> Tensor:
    """Masks the weights that the earlier pruning has kept, zero ones too."""
    mask = masks.get(layer.name)
    return torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask
