# SPDX-License-Identifier: MIT
"""Measures units across layers by how much the linear neighborhoods of their producers change.

    worth^2 = sum over the uses of layers that make channels of the unit of
              || sum over those channels c of W_next[:, c] W[c, :] W_prev ||_F^2

This is the change of W_next W W_prev when the rows of the unit go, and also when the columns of
its consumers go. exact.py says what the neighbors are, and which criterion counts which of them.
Layers whose outputs are added or multiplied (a residual sum, a gate) are independent inputs.

A channel that only becomes attention logits (queries, keys, biases of logits) counts where its
unit has no other: the worth of a head is that of its values. Of queries and keys, the queries then
count: both are the same logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lap_ext.criteria import exact
from lap_ext.criteria.base import Criterion
from lap_ext.criteria.context import Network
from lap_ext.errors import LapValueError
from lap_ext.topology import Layer
from lap_ext.topology.coupling import CoupledGroups
from lap_ext.topology.graph import Graph
from lap_ext.topology.roles import Part, Role

_BESIDE = 36  # bytes per weight beside a full layer


def group_worths(network: Network, criterion: Criterion, groups: CoupledGroups) -> Tensor:
    """Computes the worth of every group: what the neighborhoods of its producers lose with it.

    Args:
        network: the layers, their place and how batch norms count.
        criterion: lookahead, lookback, lookforward or magnitude.
        groups: channels, heads or units of the network's topology.

    Returns:
        Worths, float64 [len(groups)], on the CPU.

    Raises:
        ValueError: the groups are experts, or as for `exact.worths`; or a layer does not fit into
            the memory of the place.

    Example:
        >>> import lap_ext
        >>> from lap_ext.criteria import Lookahead
        >>> from lap_ext.places.memory import Memory
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3., 4.], [0., 1.]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[2., 7.]]))
        >>> topology = lap_ext.trace(net, torch.ones(1, 2))
        >>> group_worths(Network(Memory(topology)), Lookahead(), topology.groups("channel"))
        tensor([10.,  7.], dtype=torch.float64)
    """
    exact.counted(criterion)
    if groups.ids is None:
        raise LapValueError(
            "{structure='channel'}, {structure='head'} or {structure='unit'} for "
            "{aggregate='exact'}: data decides which tokens an expert sees",
            f"structure={groups.structure!r}",
            "Pass aggregate='energy', or criterion='reap'.",
        )
    number = _counted(network.topology.graph, groups.ids, len(groups))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    every = [x for x in network.topology.layers.values() if 0 not in x.shape]
    for layer in network.place.ordered(every):
        made = _made(layer.roles, number, any(exact.counted(criterion)))
        if made:
            found[layer.name] = _worths(network, criterion, layer, made)
    total = torch.zeros(len(groups), dtype=torch.float64)
    for layer in every:  # in this order, whatever the place's is
        if layer.name in found:
            own, worth = found[layer.name]
            total[own] = torch.hypot(total[own], worth)
    return total


def _worths(
    network: Network, criterion: Criterion, layer: Layer, made: Mapping[Role, Tensor]
) -> tuple[Tensor, Tensor]:
    """Computes (numbers of groups, worth of each) of the channels that a layer makes.

    made: the number of each output channel's group, or -1, by role.
    """
    own = torch.unique(torch.cat(list(made.values())))
    own = own[own >= 0]
    local = {
        role: torch.where(numbers >= 0, torch.searchsorted(own, numbers), -1)
        for role, numbers in made.items()
    }
    _require_room(network, layer)
    (chunk,) = network.place.chunks(layer, whole=True)
    mask = network.place.mask(chunk)
    worth = exact.channel_worths(network, criterion, layer, chunk.weight, local, mask)
    return own, worth.cpu()


def _require_room(network: Network, layer: Layer) -> None:
    """Raises unless a full layer fits into memory."""
    if not network.place.fits(layer, _BESIDE):
        raise LapValueError(
            "room for a full layer, which {aggregate='exact'} needs, in {argument}",
            f"a layer of {network.place.bytes(layer):,} bytes",
            "Raise it, or pass aggregate='energy'.",
            layer=layer.name,
            argument="memory",
        )


def _made(roles: Iterable[Role], number: Tensor, uses: bool) -> dict[Role, Tensor]:
    """Finds the group of each output channel, by role that makes some; -1 for none.

    Args:
        roles: of one layer.
        number: the group of each channel id that counts; -1 for none.
        uses: whether each use of a weight counts; else each weight counts once.
    """
    result: dict[Role, Tensor] = {}
    first: dict[Part, Role] = {}
    for role in roles:
        numbers = number[role.out.ids]
        if not bool((numbers >= 0).any()):
            continue
        one = role if uses else first.setdefault(role.part, role)
        result[one] = torch.maximum(numbers, result.get(one, numbers))
    return result


def _counted(graph: Graph, groups: Tensor, count: int) -> Tensor:
    """Returns the group of each channel whose producer counts, int64 [channels]; -1 for the others.

    Args:
        graph: of the network.
        groups: the group of each channel; -1 for none.
        count: how many groups there are.
    """
    logits = [name == "attention" for _, name in graph.ends]
    ended = [ids for ids, _ in graph.ends]
    queries = [left for left, _ in graph.couplings]
    keys = [right for _, right in graph.couplings]
    biases = [ids for ids, is_logit in zip(ended, logits, strict=True) if is_logit]
    others = [ids for ids, is_logit in zip(ended, logits, strict=True) if not is_logit]
    others += [role.inputs[1] for role in graph.roles]
    result = torch.full_like(groups, -1)
    known = torch.zeros(count + 1, dtype=torch.bool)
    known[-1] = True  # of channels in no group, -1
    made = torch.zeros_like(groups, dtype=torch.bool)
    for role in graph.roles:
        made[role.out.ids] = True
    for reads in (others, queries, [*keys, *biases]):
        own = made & _read(graph, reads) & ~known[groups]
        result[own] = groups[own]
        known[groups[own]] = True
    return result


def _read(graph: Graph, reads: Sequence[Tensor]) -> Tensor:
    """Marks the channels that some channels are, or are computed from with no weight between."""
    result = torch.zeros(graph.channels.size, dtype=torch.bool)
    for ids in reads:
        result[ids] = True
    for group in reversed(graph.channels.groups):
        for edges in reversed(group.edges):
            result[edges.parent[result[edges.child + group.first]]] = True
    return result
