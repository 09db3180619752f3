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
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lap_ext import allocation, criteria
from lap_ext.allocation import Sparsity
from lap_ext.criteria import Criterion
from lap_ext.criteria.context import BN, Network
from lap_ext.masks import Masks
from lap_ext.ops import check
from lap_ext.progress import Count, Progress
from lap_ext.pruning import selection
from lap_ext.pruning.result import PruneResult, row_of
from lap_ext.topology import Layer, Topology, trace

SCOPES, ORDERS = ("layer", "global"), ("parallel", "forward", "backward")
SKIPS = ("sum", "ignore")


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
    check.one_of("scores", "normalize", normalize, selection.NORMALIZATIONS)
    topology = _traced("scores", model, example_inputs, kwargs, neighbors, unknown)
    layers = chosen("scores", topology, exclude)
    plan = _plan("scores", topology, layers, criterion, bn, skip, data, masks, on_progress)
    plan.expect(layers, layers, 1, "parallel")
    return _scores(plan, layers, normalize, plan.masks)


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
    for name, value, known in (
        ("scope", scope, SCOPES),
        ("normalize", normalize, selection.NORMALIZATIONS),
        ("order", order, ORDERS),
    ):
        check.one_of("prune", name, value, known)
    check.positive("prune", "rounds", rounds)
    if scope == "global" and order != "parallel":
        raise ValueError(
            f'prune: expected order="parallel" with scope="global" (one ranking needs all scores '
            f"at once), got order={order!r}. Use rounds to score anew in between."
        )
    topology = _traced("prune", model, example_inputs, kwargs, neighbors, unknown)
    layers = chosen("prune", topology, exclude)
    plan = _plan("prune", topology, layers, criterion, bn, skip, data, masks, on_progress)
    shapes = {layer.name: layer.shape for layer in layers}
    given = allocation.of(sparsity)
    keeps = given.keeps(shapes)
    layers = [layer for layer in layers if layer.name in keeps]
    read = list(layers)
    if scope == "global":  # once more where scores are stored
        read += [x for x in layers if selection.stores_scores(plan.criterion, x, normalize)]
    plan.expect(layers, read, rounds, order)
    if scope == "global":
        kept = _globally(plan, layers, allocation.total(given, shapes), normalize, rounds)
    else:
        kept = _by_layer(plan, layers, keeps, order, rounds)
    result = PruneResult(
        Masks(kept), [row_of(layer, kept[layer.name]) for layer in layers], plan.criterion.name
    )
    if apply:
        result.masks.apply(model)
    return result


@dataclass
class _Plan:
    """What scoring needs."""

    network: Network
    criterion: Criterion
    masks: dict[str, Tensor]
    count: Count

    def expect(
        self, layers: Sequence[Layer], read: Sequence[Layer], rounds: int, order: str
    ) -> None:
        """Says how much will be read: what is scored in each round, and the layers' neighbors."""
        size = rounds * sum(layer.weight.nbytes for layer in read)
        if layers and self.criterion.reads_norms:
            every = self.network.topology.layers.values()
            size += sum(map(_measured, every))  # then those whose masks have changed
            size += (rounds - 1) * sum(map(_measured, layers))
            if order != "parallel":
                last = layers[0] if order == "backward" else layers[-1]
                size += sum(map(_measured, layers)) - _measured(last)
        self.count.expect(size)

    def measure(self) -> None:
        """Takes the norms that scoring asks for layer by layer, where it asks for all at once."""
        if not self.criterion.reads_norms:
            return
        for role in self.network.take_norms():
            size = self.network.topology.layers[role.layer].weight.nbytes
            self.count.read("measure", role.layer, size)


def _measured(layer: Layer) -> int:
    """Bytes that the norms of a layer read: its weight, once for each of its roles."""
    return len(layer.roles) * layer.weight.nbytes


def _traced(
    function: str, model: nn.Module, given: Any, kwargs: Any, neighbors: Any, unknown: str
) -> Topology:
    """The topology of a model, or the one that is given in place of example inputs."""
    if not isinstance(given, Topology):
        return trace(model, given, kwargs, neighbors=neighbors, unknown=unknown)
    if given.model is not model:
        raise ValueError(f"{function}: expected the topology of this model, got another's.")
    return given


def _plan(
    function: str,
    topology: Topology,
    layers: list[Layer],
    criterion: Any,
    bn: str,
    skip: str,
    data: Any,
    masks: Mapping[str, Tensor] | None,
    on_progress: Callable[[Progress], Any] | None,
) -> _Plan:
    """Everything that scoring needs, checked."""
    check.one_of(function, "bn", bn, BN)
    check.one_of(function, "skip", skip, SKIPS)
    chosen = criteria.of(criterion, function)
    given = _given_masks(function, topology, masks)
    chain = [layer.name for layer in layers] if skip == "ignore" else None
    network = Network(topology, bn, masks=given, chain=chain, function=function)
    count = Count(on_progress)
    if data is not None:
        count.read("data", "", 0)
    return _Plan(chosen.prepare(network, data), chosen, given, count)


def _given_masks(
    function: str, topology: Topology, masks: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    given = dict(masks or {})
    for name, mask in given.items():
        if name not in topology.layers:
            raise ValueError(
                f"{function}: expected masks of the model's layers, got one for {name!r}. The "
                f"layers are {', '.join(list(topology.layers)[:5])}, ..."
            )
        shape = topology.layers[name].shape
        check.mask_like(function, f"masks[{name!r}]", str(mask.dtype), tuple(mask.shape),
                        "weight", shape)  # fmt: skip
    return given


def chosen(function: str, topology: Topology, exclude: Sequence[str]) -> list[Layer]:
    """The layers that no pattern of exclude names; each pattern must name one."""
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in topology.layers):
            raise ValueError(
                f"{function}: expected exclude patterns that name a layer, got {pattern!r}. The "
                f"layers are {', '.join(list(topology.layers)[:5])}, ..."
            )
    return [
        layer
        for name, layer in topology.layers.items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _scores(
    plan: _Plan, layers: Sequence[Layer], normalize: str, masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scores of layers; masks: the weights that count where they are normalized."""
    found = {}
    for layer in layers:
        plan.measure()
        found[layer.name] = selection.comparable_scores(
            plan.network, plan.criterion, layer, normalize, masks.get(layer.name)
        )
        plan.count.read("score", layer.name, layer.weight.nbytes)
    return found


def _globally(
    plan: _Plan, layers: list[Layer], keep: int, normalize: str, rounds: int
) -> dict[str, Tensor]:
    """The masks of one ranking over all layers, after all rounds."""
    masks = _own_masks(plan, layers)
    left = sum(_left(layer, masks) for layer in layers)
    for step in range(1, rounds + 1):
        found = []
        for layer in layers:
            plan.measure()
            own = masks.get(layer.name)
            found.append(selection.ranked(plan.network, plan.criterion, layer, normalize, own))
            if selection.stores_scores(plan.criterion, layer, normalize):
                plan.count.read("score", layer.name, layer.weight.nbytes)
        after = _after(step, rounds, left, keep)
        masks = selection.global_masks(plan.network, layers, found, after, masks)
        plan.count.read("rank", "", sum(layer.weight.nbytes for layer in layers))
        _set_masks(plan, masks if step < rounds else {})
    return masks


def _by_layer(
    plan: _Plan, layers: list[Layer], keeps: Mapping[str, int], order: str, rounds: int
) -> dict[str, Tensor]:
    """The masks of layers that are ranked each by itself, after all rounds."""
    masks = _own_masks(plan, layers)
    left = {layer.name: _left(layer, masks) for layer in layers}
    for step in range(1, rounds + 1):
        for layer in reversed(layers) if order == "backward" else layers:
            name = layer.name
            keep = _after(step, rounds, left[name], keeps[name])
            plan.measure()
            masks[name] = selection.layer_mask(
                plan.network, plan.criterion, layer, keep, masks.get(name)
            )
            plan.count.read("rank", name, layer.weight.nbytes)
            if order != "parallel":
                plan.network.set_mask(name, masks[name])
        if order == "parallel" and step < rounds:
            _set_masks(plan, masks)
    return {layer.name: masks[layer.name] for layer in layers}


def _own_masks(plan: _Plan, layers: list[Layer]) -> dict[str, Tensor]:
    return {layer.name: plan.masks[layer.name] for layer in layers if layer.name in plan.masks}


def _left(layer: Layer, masks: Mapping[str, Tensor]) -> int:
    """Weights of a layer that a mask leaves."""
    mask = masks.get(layer.name)
    return layer.weight.numel() if mask is None else int(mask.count_nonzero())


def _after(step: int, rounds: int, left: int, keep: int) -> int:
    """Weights to keep after a round: each removes the same number."""
    return left - max(left - keep, 0) * step // rounds


def _set_masks(plan: _Plan, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        plan.network.set_mask(name, mask)
