# SPDX-License-Identifier: MIT
"""Prunes models in five steps: trace, score, allocate, select and apply.

The model is not changed until every mask has been computed. In parallel order, each weight is read
twice: once for its norms and once for its mask.
Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020,
sections 3 and 4 (orders and rounds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lap_ext import allocation
from lap_ext._text import layer_name
from lap_ext.allocation import Sparsity
from lap_ext.criteria import CriterionLike
from lap_ext.criteria.context import Network
from lap_ext.errors import LapTypeError, LapValueError, callback, calling, in_layer
from lap_ext.masks import Masks
from lap_ext.ops.reference.common import require_finite
from lap_ext.options import (
    BatchNorm,
    Inputs,
    Normalize,
    OnUnsupported,
    Order,
    Patterns,
    Residual,
    Scope,
)
from lap_ext.progress import Progress, Step
from lap_ext.pruning import selection
from lap_ext.pruning.plan import Plan, checked_masks, options_of, plan_of, topology_of
from lap_ext.pruning.result import PruneResult, row_of
from lap_ext.topology import Layer, Topology


@calling("scores")
def scores(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    criterion: CriterionLike = "lookahead",
    *,
    topology: Topology | None = None,
    normalize: Normalize = "none",
    layers: Patterns | None = None,
    exclude: Patterns = (),
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    data: Iterable[Any] | None = None,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
    masks: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[Progress], Any] | None = None,
) -> dict[str, Tensor]:
    """Scores every weight of a model without changing the model.

    Args:
        model: as in `prune`.
        example_inputs: as in `prune`.
        criterion: as in `prune`.
        topology: as in `prune`.
        normalize: as in `prune`.
        layers: as in `prune`.
        exclude: as in `prune`.
        batch_norm: as in `prune`.
        residual: as in `prune`.
        data: as in `prune`.
        neighbors: as in `prune`.
        on_unsupported: as in `prune`.
        masks: as in `prune`; the weights that they prune do not count in the neighbor norms.
        on_progress: as in `prune`.

    Returns:
        Layer name -> scores >= 0, with the shape and device of the weight. Scores are float32, or
        float64 if the weights are float64 or the scores are normalized.

    Raises:
        TopologyError, TypeError, ValueError: as in `prune`.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> for layer, value in ((net[0], 3.), (net[2], -2.)):
        ...     _ = layer.weight.data.fill_(value)
        >>> lap_ext.scores(net, torch.ones(1, 1))       # |3| * 1 * |-2| and |-2| * |3| * 1
        {'0': tensor([[6.]]), '2': tensor([[6.]])}
    """
    options = options_of(
        criterion,
        normalize=normalize,
        batch_norm=batch_norm,
        residual=residual,
        layers=layers,
        exclude=exclude,
    )
    traced = topology_of(model, example_inputs, topology, neighbors, on_unsupported)
    plan = plan_of(traced, options)
    scoring = _scoring(plan, checked_masks(traced, masks), data, on_progress)
    scoring.measure(plan.layers)
    step = scoring.step("score", plan.layers)
    result = {}
    for layer in plan.layers:
        mask = scoring.masks.get(layer.name)
        result[layer.name] = selection.comparable_scores(
            scoring.network, plan.criterion, layer, normalize, mask
        )
        step.read(layer.name, layer.weight.nbytes)
    return result


@calling("prune")
def prune(
    model: nn.Module,
    example_inputs: Inputs | None,
    sparsity: Sparsity,
    *,
    topology: Topology | None = None,
    criterion: CriterionLike = "lookahead",
    scope: Scope = "layer",
    normalize: Normalize = "none",
    order: Order = "parallel",
    rounds: int = 1,
    layers: Patterns | None = None,
    exclude: Patterns = (),
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    data: Iterable[Any] | None = None,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
    masks: Mapping[str, Tensor] | None = None,
    apply: bool = True,
    on_progress: Callable[[Progress], Any] | None = None,
) -> PruneResult:
    """Prunes a model: keeps the `keep` weights with the highest scores and sets the rest to zero.

        score = |w| * ||W_prev[i]|| * ||W_next[:, o]||      criterion="lookahead"
        keep  = floor((1 - sparsity) * n + 1/2)             n: weights of the layer or model

    Args:
        model: any module that `trace` can follow. Its layers are the weights of linear layers,
            convolutions, embeddings and recurrent layers; biases and norms are not pruned.
        example_inputs: inputs of the model's forward, for the trace: a tensor, a tuple of
            positional arguments, or a dict of named arguments. Small inputs suffice. Pass None if
            topology is given.
        sparsity: the fraction of the weights to remove; or a dict from name pattern to fraction
            (the first match counts, and layers without a match stay dense); or an allocation such
            as `lap_ext.erk(0.9)`.
        topology: the result of an earlier `trace` of this model, instead of example_inputs.
        criterion: "lookahead", "lookforward", "lookback", "magnitude", "magnitude_bn", "random" or
            another name in `lap_ext.criteria`, an instance of one of its classes, or a function of
            a layer.
        scope: "layer" ranks the weights of each layer separately; "global" ranks the weights of all
            layers together, in one exact ranking. Of equal scores, the one in the earlier layer, or
            at the lower index in the same layer, ranks higher.
        normalize: how to make scores comparable between layers: "none", "norm" (divides them by the
            L2 norm of the layer's scores) or "lamp". None of these changes the ranking within
            a layer.
        order: "parallel" scores all layers with their dense neighbors; "forward" goes from the
            first layer to the last and scores each with its already pruned producers; "backward"
            goes from the last to the first and scores each with its already pruned consumers.
        rounds: the number of equal steps to prune in; the scores are recomputed before each.
        layers: name patterns of the layers to prune; None means all.
        exclude: name patterns of layers not to prune.
        batch_norm: "edge" counts a batch norm as a scale on the edge on which it lies; "fold" also
            counts the batch norm after a consumer, as if it were folded into that consumer's
            weight; "ignore" counts none.
        residual: "sum" counts every producer and consumer of a channel; "chain" counts only the
            layers just before and just after in the network's order, skipping excluded ones. The
            paper's public code treats residual networks like this; use it for comparisons.
        data: batches for criteria that need activations or gradients.
        neighbors: as in `trace`.
        on_unsupported: as in `trace`.
        masks: the masks of an earlier pruning; pruned weights stay pruned.
        apply: whether to set the pruned weights to zero. False leaves the model unchanged;
            `result.apply(model)` does it later.
        on_progress: called with a `lap_ext.progress.Progress` after each layer that is measured,
            scored or ranked, not during the trace. An error that it raises stops the pruning and
            leaves the model unchanged.

    Returns:
        The result: `.masks`, `.sparsity`, `.layers`; print it for a table.

    Raises:
        TopologyError: the model cannot be traced.
        ValueError: an option is not one of the above, a pattern names no layer, a weight is not
            finite.
        TypeError: an argument is of the wrong type.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
        >>> result = lap_ext.prune(net, torch.randn(1, 8), sparsity=0.5)
        >>> [(row.name, row.kept, row.total) for row in result.layers]
        [('0', 36, 72), ('2', 9, 18)]
        >>> int((net[0].weight != 0).sum())
        36
    """
    options = options_of(
        criterion,
        scope=scope,
        normalize=normalize,
        order=order,
        rounds=rounds,
        batch_norm=batch_norm,
        residual=residual,
        layers=layers,
        exclude=exclude,
    )
    traced = topology_of(model, example_inputs, topology, neighbors, on_unsupported)
    result = run(plan_of(traced, options), sparsity, masks, data, on_progress)
    if apply:
        result.apply(model)
    return result


@calling("sparsity")
def sparsity(model: nn.Module) -> float:
    """Measures the fraction of a model's weights that are zero (+0.0 or -0.0).

        sparsity = zeros / n        over all parameters of two dimensions or more, tied ones once

    Weights are counted as they are stored: a mask of torch.nn.utils.prune, or a parametrization,
    counts only once it is made permanent.

    Args:
        model: any module with its weights in memory.

    Returns:
        The fraction; 0.0 if no parameter has two dimensions or more.

    Raises:
        TypeError: model is not a module.
        ValueError: a parameter is on the meta device.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> result = lap_ext.prune(net, torch.ones(1, 4), 0.75)
        >>> lap_ext.sparsity(net)
        0.75
    """
    if not isinstance(model, nn.Module):
        raise LapTypeError(
            "{argument} to be a torch.nn.Module", type(model).__name__, argument="model"
        )
    zeros = total = 0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 and not is_lazy(weight):
            continue
        if is_lazy(weight) or weight.layout != torch.strided:
            got = "one that is not initialized" if is_lazy(weight) else f"layout {weight.layout}"
            raise LapValueError("dense weights with data", got, layer=layer_name(name))
        if weight.is_meta:
            raise LapValueError(
                "weights with data", "one on the meta device", layer=layer_name(name)
            )
        total += weight.numel()
        zeros += weight.numel() - int(weight.count_nonzero())
    return zeros / total if total else 0.0


def run(
    plan: Plan,
    sparsity: Sparsity,
    masks: Mapping[str, Tensor] | None,
    data: Iterable[Any] | None,
    on_progress: Callable[[Progress], Any] | None,
) -> PruneResult:
    """Computes the masks of a plan for a sparsity without changing the model."""
    given = checked_masks(plan.topology, masks)
    shapes = {layer.name: layer.shape for layer in plan.layers}
    allocated = allocation.of(sparsity)
    keeps = allocated.keeps(shapes)
    layers = [layer for layer in plan.layers if layer.name in keeps]
    scoring = _scoring(plan, given, data, on_progress)
    if plan.options.scope == "global":
        kept = _globally(scoring, layers, allocation.total(allocated, shapes))
    else:
        kept = _by_layer(scoring, layers, keeps)
    rows = [row_of(layer, kept[layer.name]) for layer in layers]
    return PruneResult(Masks(kept), rows, plan.criterion.name)


@dataclass(frozen=True)
class _Scoring:
    """A plan, the network that computes its scores, and the progress listener."""

    plan: Plan
    network: Network
    masks: dict[str, Tensor]
    on_progress: Callable[[Progress], Any] | None

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


def _scoring(
    plan: Plan,
    masks: dict[str, Tensor],
    data: Iterable[Any] | None,
    on_progress: Callable[[Progress], Any] | None,
) -> _Scoring:
    """Prepares the network; criteria that need data read it here."""
    if data is not None:
        Step(on_progress, "data", 0).read("", 0)
        for layer in plan.topology.layers.values():  # else the error would blame the data
            with in_layer(layer.name):
                require_finite(layer.weight.detach(), "w")
    with callback():
        network = plan.criterion.prepare(plan.network(masks), data)
    return _Scoring(plan, network, masks, on_progress)


def _globally(scoring: _Scoring, layers: list[Layer], keep: int) -> dict[str, Tensor]:
    """Computes the masks of one ranking over all layers, in all rounds."""
    network, criterion, options = scoring.network, scoring.plan.criterion, scoring.plan.options
    masks = _own_masks(scoring, layers)
    start = sum(_unpruned(layer, masks) for layer in layers)
    stored = [x for x in layers if selection.stores_scores(criterion, x)]
    for number in range(1, options.rounds + 1):
        scoring.measure(layers)
        step, rankables = scoring.step("score", stored), []
        for layer in layers:
            rankables.append(selection.rankable(network, criterion, layer, options.normalize))
            if selection.stores_scores(criterion, layer):
                step.read(layer.name, layer.weight.nbytes)
        target = _target(number, options.rounds, start, keep)
        step = scoring.step("rank", layers)
        masks = selection.global_masks(network, layers, rankables, target, masks)
        step.read("", step.total)
        if number < options.rounds:
            _set_masks(network, masks)
    return masks


def _by_layer(
    scoring: _Scoring, layers: list[Layer], keeps: Mapping[str, int]
) -> dict[str, Tensor]:
    """Computes the masks of layers that are ranked separately, in all rounds."""
    network, criterion, options = scoring.network, scoring.plan.criterion, scoring.plan.options
    masks = _own_masks(scoring, layers)
    start = {layer.name: _unpruned(layer, masks) for layer in layers}
    for number in range(1, options.rounds + 1):
        scoring.measure(layers)
        step = scoring.step("rank", layers)
        for layer in reversed(layers) if options.order == "backward" else layers:
            name = layer.name
            keep = _target(number, options.rounds, start[name], keeps[name])
            masks[name] = selection.layer_mask(network, criterion, layer, keep, masks.get(name))
            step.read(name, layer.weight.nbytes)
            if options.order != "parallel":
                network.set_mask(name, masks[name])
        if options.order == "parallel" and number < options.rounds:
            _set_masks(network, masks)
    return {layer.name: masks[layer.name] for layer in layers}


def _own_masks(scoring: _Scoring, layers: list[Layer]) -> dict[str, Tensor]:
    given = scoring.masks
    return {layer.name: given[layer.name] for layer in layers if layer.name in given}


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
