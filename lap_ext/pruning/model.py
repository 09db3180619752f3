# SPDX-License-Identifier: MIT
"""Prunes models in five steps: trace, score, allocate, select and apply.

The model is not changed until every mask has been computed. In parallel order, each weight is read
three times: for zeros, for its norms and for its mask.
Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020,
sections 3 and 4 (orders and rounds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lap_ext._text import layer_name
from lap_ext.allocation import Sparsity, check_given
from lap_ext.computed import references, sources, value
from lap_ext.criteria import CriterionLike
from lap_ext.errors import LapTypeError, LapValueError, calling
from lap_ext.ops.memory import memory_key
from lap_ext.options import (
    BYS,
    BatchNorm,
    By,
    Cost,
    Data,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Order,
    Patterns,
    Residual,
    Scope,
    one_of,
)
from lap_ext.places import Memory
from lap_ext.progress import Progress
from lap_ext.pruning import pipeline
from lap_ext.pruning.in_memory import run
from lap_ext.pruning.plan import checked_masks, options_of, plan_of, topology_of
from lap_ext.pruning.result import PruneResult
from lap_ext.structures import Aggregate, StructureLike
from lap_ext.topology import Topology


@calling("scores")
def scores(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    criterion: CriterionLike = "lookahead",
    *,
    topology: Topology | None = None,
    normalize: Normalize = "auto",
    layers: Patterns | None = None,
    exclude: Patterns = (),
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    data: Data | None = None,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
    masks: Mapping[str, Tensor] | None = None,
    by: By = "layer",
    on_progress: Callable[[Progress], Any] | None = None,
) -> dict[str, Tensor]:
    """Scores the weights of the layers that `prune` prunes, without changing the model.

    Args:
        model: as in `prune`.
        example_inputs: as in `prune`.
        criterion: as in `prune`.
        topology: as in `prune`.
        normalize: as in `prune`; "auto" is "none" here.
        layers: as in `prune`.
        exclude: as in `prune`.
        batch_norm: as in `prune`.
        residual: as in `prune`.
        data: as in `prune`.
        neighbors: as in `prune`.
        on_unsupported: as in `prune`.
        masks: as in `prune`; the weights that they prune do not count in the neighbor norms.
        by: whose names are the keys: "layer", as in the results and masks of `prune` ("fc1",
            "attn.in_proj_weight"), or "parameter", as in `model.named_parameters()` and
            `model.state_dict()` ("fc1.weight", "attn.in_proj_weight").
        on_progress: as in `prune`.

    Returns:
        Layer name (or parameter name) -> scores >= 0, with the shape and device of the weight.
        Scores are float32, or float64 if the weights are float64 or the scores are normalized.

    Raises:
        TopologyError, TypeError, ValueError: as in `prune`.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> for layer, value in ((net[0], 3.), (net[2], -2.)):
        ...     _ = layer.weight.data.fill_(value)
        >>> lap_ext.scores(net, torch.ones(1, 1))       # |3| * 1 * |-2| and |-2| * |3| * 1
        {'0': tensor([[6.]]), '2': tensor([[6.]])}
        >>> list(lap_ext.scores(net, torch.ones(1, 1), by="parameter"))
        ['0.weight', '2.weight']
    """
    one_of("by", by, BYS)
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
    place = Memory(traced, checked_masks(traced, masks))
    scoring = pipeline.scoring_of(plan, place, data, on_progress, raw=True)
    scoring.measure("scores")
    step = scoring.step("score", plan.layers)
    names = {x.name: x.parameter if by == "parameter" else x.name for x in plan.layers}
    return {names[layer.name]: scoring.full(layer, step) for layer in plan.layers}


@calling("prune")
def prune(
    model: nn.Module,
    example_inputs: Inputs | None,
    sparsity: Sparsity | None = None,
    *,
    topology: Topology | None = None,
    criterion: CriterionLike = "lookahead",
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    multiple_of: int = 1,
    strict: bool = False,
    cost: Cost | None = None,
    uniform: bool = False,
    scope: Scope = "layer",
    normalize: Normalize = "auto",
    order: Order = "parallel",
    rounds: int = 1,
    layers: Patterns | None = None,
    exclude: Patterns = (),
    min_keep: MinKeep = None,
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    data: Data | None = None,
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
            (the first match counts, and layers without a match stay dense), whose keys may also be
            modules, types and parameters, as in exclude; or an allocation such as
            `lap_ext.erk(0.9)`. None for an N:M structure, which itself says how many are kept.
        topology: the result of an earlier `trace` of this model, instead of example_inputs.
        criterion: "lookahead", "lookforward", "lookback", "magnitude", "magnitude_bn", "random" or
            another name in `lap_ext.criteria`, an instance of one of its classes, or a function of
            a layer.
        structure: what is removed together, from `lap_ext.structures` or as a text: "2:4" keeps 2
            of every 4 consecutive inputs; "16x16" removes blocks of 16 outputs by 16 inputs; "row"
            and "column" remove outputs and inputs of a layer. None removes single weights. Units
            (blocks, rows, columns, groups) count with all of their weights, zero or not; the best
            ones are kept as long as their weights fit, so that the sparsity may be a little higher
            than asked for. Criteria that rank within output channels rank units of the full layer.
            "channel", "head", "expert" and "unit" remove what goes together through the network:
            rows of the layers that make it, their biases, norm weights and biases, and columns of
            the layers that read it. sparsity is then the fraction of such units that is removed
            (with scope="layer", of those of the same layers), or `lap_ext.allocation.flops` or
            `params`, what remains of the model; layers= and exclude= choose the layers that make
            channels; biases and norms are in the masks too. What cannot be removed is in
            `result.fixed`, with the reason; see `lap_ext.structures.groups`.
        aggregate: what a unit is worth, given the scores s of its weights: "energy" is
            sqrt(sum of s^2); "mean" is the mean of s, for units of different size; "exact" is
            ||W_next (W * unit) W_prev||_F, how much the linear neighborhood changes when the unit
            goes, for the criteria "lookahead", "lookforward", "lookback" and "magnitude".
        multiple_of: each layer keeps a multiple of so many units, or all; rounded down.
        strict: whether a layer that a structure does not fit (4 does not divide its inputs) is an
            error. Otherwise it stays dense, with a warning, in `result.left_dense`.
        cost: what a unit across layers costs where sparsity is a fraction: "weights", how many it
            has, or "flops", how much less the model computes without it. Units are ranked by
            worth^2 / cost, and those that are kept cost (1 - sparsity) of all at most. None counts
            each as 1.
        uniform: whether all layers of a kind (the same names but for their numbers, and as many
            units) lose the same number of units across layers, as serving engines need it.
        scope: "layer" ranks the weights of each layer separately; "global" ranks the weights of all
            layers together, in one exact ranking. Of equal scores, the one in the earlier layer, or
            at the lower index in the same layer, ranks higher.
        normalize: how to make scores comparable between layers: "none", "norm" (divides them by the
            L2 norm of the layer's scores) or "lamp" (divides each squared score by the sum of those
            in its layer that are not smaller). None of these changes the ranking within a layer.
            "auto" is "lamp" with scope="global" and "none" otherwise: one ranking of raw scores can
            take all weights of a layer.
        order: "parallel" scores all layers with their dense neighbors; "forward" goes from the
            first layer to the last and scores each with its already pruned producers; "backward"
            goes from the last to the first and scores each with its already pruned consumers.
        rounds: the number of equal steps to prune in; the scores are recomputed before each.
        layers: the layers to prune: name patterns ("*" means all), modules of the model (all layers
            in them), types of modules, or parameters; one or a list of them. None means all but
            embeddings, weights tied to them, and output heads (a linear layer that no layer reads,
            with one output per entry of an embedding); `result.left_dense` lists these.
        exclude: layers not to prune, in the same forms, as in exclude=[nn.Embedding, model.head].
        min_keep: the number (an integer) or the fraction (a float) of weights that every layer
            keeps at least. With scope="global", the other layers keep fewer. None is no floor, with
            a warning if a layer keeps nothing, and an error if sparsity is 1. Units are rounded up
            to it, and None is one unit of each layer, even where the sparsity leaves room for less.
        batch_norm: "edge" counts a batch norm as a scale on the edge on which it lies; "fold" also
            counts the batch norm after a consumer, as if it were folded into that consumer's
            weight; "ignore" counts none.
        residual: "sum" counts every producer and consumer of a channel; "chain" counts only the
            layers just before and just after in the network's order, skipping excluded ones. The
            paper's public code treats residual networks like this; use it for comparisons.
        data: batches for criteria that need activations or gradients, or the path of a safetensors
            file of statistics that `lap_ext.criteria.measure` has computed.
        neighbors: as in `trace`.
        on_unsupported: as in `trace`.
        masks: the masks of an earlier pruning; pruned weights stay pruned. None takes weights that
            are zero for pruned ones, except in layers that are all zero: these stay as they are,
            in `result.left_dense`. {} takes no weight for pruned. In any case, a zero weight is
            kept only where no other is left.
        apply: whether to set the pruned weights to zero. False leaves the model unchanged;
            `result.apply(model)` does it later.
        on_progress: called with a `lap_ext.progress.Progress` after each layer that is measured,
            scored or ranked, not during the trace. An error that it raises stops the pruning and
            leaves the model unchanged.

    Returns:
        The result: `.masks`, `.sparsity`, `.layers`, `.empty_layers`, `.left_dense`; print it for a
        table.

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
        >>> result = lap_ext.prune(net, torch.randn(1, 8), 0.5, structure="row", masks={})
        >>> [(row.name, row.units) for row in result.layers]     # of 9 and 2 rows
        [('0', (4, 9)), ('2', (1, 2))]
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
        min_keep=min_keep,
        structure=structure,
        aggregate=aggregate,
        multiple_of=multiple_of,
        strict=strict,
        cost=cost,
        uniform=uniform,
    )
    check_given(sparsity, options.structure)
    traced = topology_of(model, example_inputs, topology, neighbors, on_unsupported)
    result = run(plan_of(traced, options), sparsity, masks, data, on_progress)
    if min_keep is None:
        result.warn_if_empty()
    if apply:
        result.apply(model)
    return result


@calling("sparsity")
def sparsity(model: nn.Module) -> float:
    """Measures the fraction of a model's weights that are zero (+0.0 or -0.0).

        sparsity = zeros / n        over all parameters of two dimensions or more, tied ones once

    Weights are counted as they are stored: a mask of torch.nn.utils.prune counts only once it is
    made permanent. What a module computes itself (a parametrization, weight or spectral norm) is
    counted as it is computed, and not what it is computed from.

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
    for name, weight in _weights(model):
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


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters, with computed tensors in place of those that they are computed from."""
    inner = sources(model)
    plain = ((name, p) for name, p in model.named_parameters() if name not in inner)
    yield from {memory_key(p): (name, p) for name, p in plain}.values()
    made = {reference: name for name, reference in reversed(references(model).items())}
    yield from ((name, value(*reference)) for reference, name in made.items())
