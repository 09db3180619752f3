# SPDX-License-Identifier: MIT
"""Whole models: trace, score, allocate, select, apply.

Nothing of the model is changed before every mask is there. In parallel order each weight is read
twice: once for its norms, once for its mask.
Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020,
sections 3 and 4 (orders and rounds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lap_ext import allocation
from lap_ext.allocation import Sparsity
from lap_ext.criteria.context import Network
from lap_ext.masks import Masks
from lap_ext.progress import Progress, Step
from lap_ext.pruning import selection
from lap_ext.pruning.plan import Plan, checked_masks, options_of, plan_of, topology_of
from lap_ext.pruning.result import PruneResult, row_of
from lap_ext.topology import Layer


def scores(
    model: nn.Module,
    example_inputs: Any,
    criterion: Any = "lookahead",
    *,
    normalize: str = "none",
    exclude: Sequence[str] = (),
    bn: str = "paper",
    skip: str = "sum",
    data: Iterable[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    neighbors: Mapping[str, Any] | None = None,
    unknown: str = "error",
    masks: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[Progress], Any] | None = None,
) -> dict[str, Tensor]:
    """Scores of every weight of a model; the model is not changed.

    Args:
        model: as in `prune`.
        example_inputs: as in `prune`.
        criterion: as in `prune`.
        normalize: as in `prune`.
        exclude: as in `prune`.
        bn: as in `prune`.
        skip: as in `prune`.
        data: as in `prune`.
        kwargs: as in `prune`.
        neighbors: as in `prune`.
        unknown: as in `prune`.
        masks: as in `prune`: only these weights count as their layers' neighbors'.
        on_progress: as in `prune`.

    Returns:
        Layer name -> scores >= 0 of the weight's shape, on its device, float32 (float64 for float64
        weights, and where they are normalized).

    Raises:
        TopologyError, TypeError, ValueError: as `prune`.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> for layer, value in ((net[0], 3.), (net[2], -2.)):
        ...     _ = layer.weight.data.fill_(value)
        >>> lap_ext.scores(net, torch.ones(1, 1))       # |3| * 1 * |-2| and |-2| * |3| * 1
        {'0': tensor([[6.]]), '2': tensor([[6.]])}
    """
    options = options_of(
        "scores", criterion=criterion, normalize=normalize, exclude=exclude, bn=bn, skip=skip
    )
    topology = topology_of("scores", model, example_inputs, kwargs, neighbors, unknown)
    plan = plan_of("scores", topology, options)
    scoring = _scoring(plan, checked_masks("scores", topology, masks), data, on_progress)
    scoring.measure(plan.layers)
    step = scoring.step("score", plan.layers)
    found = {}
    for layer in plan.layers:
        mask = scoring.masks.get(layer.name)
        found[layer.name] = selection.comparable_scores(
            scoring.network, plan.criterion, layer, normalize, mask
        )
        step.read(layer.name, layer.weight.nbytes)
    return found


def prune(
    model: nn.Module,
    example_inputs: Any,
    sparsity: Sparsity,
    *,
    criterion: Any = "lookahead",
    scope: str = "layer",
    normalize: str = "none",
    order: str = "parallel",
    rounds: int = 1,
    exclude: Sequence[str] = (),
    bn: str = "paper",
    skip: str = "sum",
    data: Iterable[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    neighbors: Mapping[str, Any] | None = None,
    unknown: str = "error",
    masks: Mapping[str, Tensor] | None = None,
    apply: bool = True,
    on_progress: Callable[[Progress], Any] | None = None,
) -> PruneResult:
    """Prunes a model: keeps exactly the best weights of each layer, or of all, and zeroes the rest.

        score = |w| * ||W_prev[i]|| * ||W_next[:, o]||      criterion="lookahead"
        keep  = floor((1 - sparsity) * n + 1/2)             n: weights of the layer, or of all

    Args:
        model: any module that `trace` can follow. Its layers are the weights of linear layers,
            convolutions, embeddings and recurrent layers; biases and norms are left alone.
        example_inputs: a tensor or a tuple of positional arguments for the trace (small ones will
            do), or the `Topology` that an earlier `trace` of this model gave.
        sparsity: fraction of the weights to remove; a dict of name patterns and fractions (the
            first that matches counts, layers that match none stay dense); or an allocation such as
            `lap_ext.erk(0.9)`.
        criterion: "lookahead", "lookforward", "lookback", "magnitude", "magnitude_bn", "random", an
            instance of a class of `lap_ext.criteria`, or a function of a layer.
        scope: "layer" ranks each layer by itself, "global" all layers together (exactly: one
            ranking over the list of scores, ties to the earlier layer and lower index).
        normalize: of scores between layers: "none", "norm" (divided by the layer's L2 norm) or
            "lamp". Within a layer none of them changes the ranking.
        order: "parallel" scores all layers with their dense neighbors; "forward" from the first to
            the last, with the already pruned producers; "backward" with the pruned consumers.
        rounds: prunes in so many equal steps, scores computed anew in between.
        exclude: name patterns of layers that stay as they are.
        bn: batch norms count on the edge they lie on ("paper"), also behind the consumer ("fold"),
            or not at all ("off").
        skip: "sum" counts every producer and consumer of a channel; "ignore" only the layers just
            before and after in the network's order, excluded ones left out: the public code's
            reading of a residual net as a chain, for comparisons.
        data: batches for criteria that need activations or gradients.
        kwargs: named arguments of the model's forward, for the trace.
        neighbors: as in `trace`.
        unknown: as in `trace`.
        masks: of an earlier pruning: pruned weights never return.
        apply: set the pruned weights to zero. False leaves the model as it is.
        on_progress: called with a `lap_ext.progress.Progress` after each layer that is measured,
            scored or ranked; the trace comes before. An error that it raises ends the pruning, and
            the model is as it was.

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
        "prune",
        criterion=criterion,
        scope=scope,
        normalize=normalize,
        order=order,
        rounds=rounds,
        exclude=exclude,
        bn=bn,
        skip=skip,
    )
    topology = topology_of("prune", model, example_inputs, kwargs, neighbors, unknown)
    plan = plan_of("prune", topology, options)
    result = run(plan, sparsity, masks, data, on_progress)
    if apply:
        result.masks.apply(model)
    return result


def run(
    plan: Plan,
    sparsity: Sparsity,
    masks: Mapping[str, Tensor] | None,
    data: Iterable[Any] | None,
    on_progress: Callable[[Progress], Any] | None,
) -> PruneResult:
    """Finds the masks that a plan and a sparsity ask for; the model is not changed."""
    given = checked_masks(plan.function, plan.topology, masks)
    shapes = {layer.name: layer.shape for layer in plan.layers}
    allocated = allocation.of(sparsity, plan.function)
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
    """A plan, the network that its scores are computed with, and the listener."""

    plan: Plan
    network: Network
    masks: dict[str, Tensor]
    on_progress: Callable[[Progress], Any] | None

    def measure(self, layers: Sequence[Layer]) -> None:
        """Takes the norms of the whole network, unless there is nothing to score."""
        if not layers or not self.plan.criterion.reads_norms:
            return
        every = self.plan.topology.layers
        total = sum(every[role.layer].weight.nbytes for role in self.network.unmeasured())
        step = Step(self.on_progress, "measure", total)
        for role in self.network.take_norms():
            step.read(role.layer, every[role.layer].weight.nbytes)

    def step(self, name: str, layers: Sequence[Layer]) -> Step:
        """Begins a step that reads the weights of layers once."""
        return Step(self.on_progress, name, sum(layer.weight.nbytes for layer in layers))


def _scoring(
    plan: Plan,
    masks: dict[str, Tensor],
    data: Iterable[Any] | None,
    on_progress: Callable[[Progress], Any] | None,
) -> _Scoring:
    """Prepares the network; here criteria look at data."""
    if data is not None:
        Step(on_progress, "data", 0).read("", 0)
    network = plan.criterion.prepare(plan.network(masks), data)
    return _Scoring(plan, network, masks, on_progress)


def _globally(scoring: _Scoring, layers: list[Layer], keep: int) -> dict[str, Tensor]:
    """The masks of one ranking over all layers, after all rounds."""
    network, criterion, options = scoring.network, scoring.plan.criterion, scoring.plan.options
    masks = _own_masks(scoring, layers)
    left = sum(_left(layer, masks) for layer in layers)
    stored = [x for x in layers if selection.stores_scores(criterion, x, options.normalize)]
    for number in range(1, options.rounds + 1):
        scoring.measure(layers)
        step, found = scoring.step("score", stored), []
        for layer in layers:
            own = masks.get(layer.name)
            found.append(selection.ranked(network, criterion, layer, options.normalize, own))
            if selection.stores_scores(criterion, layer, options.normalize):
                step.read(layer.name, layer.weight.nbytes)
        after = _after(number, options.rounds, left, keep)
        step = scoring.step("rank", layers)
        masks = selection.global_masks(network, layers, found, after, masks)
        step.read("", step.total)
        if number < options.rounds:
            _set_masks(network, masks)
    return masks


def _by_layer(
    scoring: _Scoring, layers: list[Layer], keeps: Mapping[str, int]
) -> dict[str, Tensor]:
    """The masks of layers that are ranked each by itself, after all rounds."""
    network, criterion, options = scoring.network, scoring.plan.criterion, scoring.plan.options
    masks = _own_masks(scoring, layers)
    left = {layer.name: _left(layer, masks) for layer in layers}
    for number in range(1, options.rounds + 1):
        scoring.measure(layers)
        step = scoring.step("rank", layers)
        for layer in reversed(layers) if options.order == "backward" else layers:
            name = layer.name
            keep = _after(number, options.rounds, left[name], keeps[name])
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


def _left(layer: Layer, masks: Mapping[str, Tensor]) -> int:
    """Weights of a layer that a mask leaves."""
    mask = masks.get(layer.name)
    return layer.weight.numel() if mask is None else int(mask.count_nonzero())


def _after(number: int, rounds: int, left: int, keep: int) -> int:
    """Weights to keep after a round: each removes the same number."""
    return left - max(left - keep, 0) * number // rounds


def _set_masks(network: Network, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        network.set_mask(name, mask)
