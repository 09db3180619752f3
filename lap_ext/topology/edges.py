# SPDX-License-Identifier: MIT
"""Finds the edges between layers, one hop through the channel graph, for people and for tests.

Scores do not need edges, because propagate.py passes over the full graph at once; a test checks
that both agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology.channels import ChannelEdges, ChannelGroup, Trail
from lap_ext.topology.graph import Graph
from lap_ext.topology.roles import Role
from lap_ext.topology.value import merged

_SOURCES = ("role", "input", "boundary")


@dataclass(frozen=True, eq=False)
class Edge:
    """A neighbor of a layer and how their channels correspond.

    Attributes:
        name: the neighbor's layer name; "input", "output" or the operation where a trace stopped.
        kind: "layer", "input", "output", "boundary" or "coupled" (q and k of an attention).
        here: this layer's channel in each pair, int64 [n]; counted in the full weight where roles
            use parts of it.
        there: the neighbor's channel in each pair, int64 [n].
        scale: the factor along the path for each pair, float64 [n], from batch norms, norm weights
            and layer scales; where a mean gives squared weights, their root. None means ones.
        via: the operations along the path, each listed once; where paths meet, those of all
            paths.
    """

    name: str
    kind: str
    here: Tensor
    there: Tensor
    scale: Tensor | None
    via: Trail

    @property
    def how(self) -> str:
        """The channel map in parentheses, to follow a name; empty if one-to-one or all-to-all."""
        return "" if self.channel_map in ("same", "all") else f" ({self.channel_map})"

    @property
    def channel_map(self) -> str:
        """The channel map in short: "same", "offset +64", "repeat 4", "permuted", ..."""
        here, there = self.here, self.there
        if self.kind in ("input", "output", "boundary"):
            return "all"
        if torch.equal(here, there):
            return "same"
        shift = there - here
        if bool((shift == shift[0]).all()):
            return f"offset {int(shift[0]):+d}"
        for one, many in ((there, here), (here, there)):
            times = many.numel() // max(1, int(torch.unique(one).numel()))
            if times > 1 and torch.equal(one, (many - many.min()) // times + one.min()):
                return f"repeat {times}"
        n = here.numel()
        unique = torch.unique(here).numel() == n and torch.unique(there).numel() == n
        return "permuted" if unique else f"{n} pairs"


@dataclass(frozen=True)
class _Walk:
    """Pairs along a path: channel of the layer, channel id reached, squared factor, operations."""

    here: Tensor
    reached: Tensor
    factor: Tensor
    via: Trail

    def taken(self, index: Tensor) -> _Walk:
        """Returns some of the pairs, in a given order."""
        return _Walk(self.here[index], self.reached[index], self.factor[index], self.via)


class _Factors:
    """The factors of channel edges, computed from the model's weights as they are now."""

    def __init__(self, tensors: Mapping[str, Tensor], batch_norm: bool) -> None:
        self.tensors = tensors
        self.batch_norm = batch_norm
        self.known: dict[int, Any] = {}  # static values of this pass

    def squared(self, edges: ChannelEdges) -> Tensor:
        """Returns the squared factor of each edge, float64."""
        factor = edges.squared(self.tensors, self.known, self.batch_norm)
        return torch.ones(edges.child.shape, dtype=torch.float64) if factor is None else factor


def producers(
    graph: Graph, role: Role, tensors: Mapping[str, Tensor], batch_norm: bool = True
) -> list[Edge]:
    """Finds the edges to what feeds a role.

    Args:
        graph: of the network.
        role: one of its roles.
        tensors: the model's parameters and buffers by name, for the scales.
        batch_norm: whether batch norms are among the scales.
    """
    channel, ids = role.inputs
    here = channel + role.part.first[0]
    start = _Walk(here, ids, torch.ones(ids.shape).double(), role.trail)
    edges = [
        _edge(group.name, _kind(group), walk, graph.channel(group, walk.reached))
        for group, walk in _sources(graph, start, _Factors(tensors, batch_norm))
    ]
    return _merged(edges[::-1])


def consumers(
    graph: Graph, role: Role, tensors: Mapping[str, Tensor], batch_norm: bool = True
) -> list[Edge]:
    """Finds the edges to what reads a role.

    Args:
        graph: of the network.
        role: one of its roles.
        tensors: the model's parameters and buffers by name, for the scales.
        batch_norm: whether batch norms are among the scales.
    """
    ids = role.out.ids
    factors = _Factors(tensors, batch_norm)
    here = torch.arange(role.out.size) + role.part.first[1]
    start = _Walk(here, ids, torch.ones(ids.shape).double(), ())
    pending = list(_by_group(graph, start))
    edges: list[Edge] = []
    while pending:
        index = min(index for index, _ in pending)
        walk = _together([w for i, w in pending if i == index])
        pending = [(i, w) for i, w in pending if i != index]
        edges += _read(graph, index, walk, factors)
        for child, channel_edges in graph.children.get(index, []):
            step = _down(walk, graph.channels.groups[child], channel_edges, factors)
            pending += [(child, step)] if step.here.numel() else []
    return _merged(edges)


def _sources(graph: Graph, start: _Walk, factors: _Factors) -> Iterator[tuple[ChannelGroup, _Walk]]:
    """Walks up to the layers, inputs and boundaries that channels come from, the newest first."""
    pending = list(_by_group(graph, start))
    while pending:
        index = max(index for index, _ in pending)
        walk = _together([w for i, w in pending if i == index])
        pending = [(i, w) for i, w in pending if i != index]
        group = graph.channels.groups[index]
        if group.kind in _SOURCES:
            yield group, walk
            continue
        for edges in group.edges:
            pending += _by_group(graph, _up(walk, group, edges, factors))


def _merged(edges: list[Edge]) -> list[Edge]:
    """Merges the edges to the same neighbor and kind, whichever groups their channels are of."""
    groups: dict[tuple[str, str], list[Edge]] = {}
    for edge in edges:
        groups.setdefault((edge.name, edge.kind), []).append(edge)
    result = []
    for (name, kind), group in groups.items():
        scale = None
        if any(edge.scale is not None for edge in group):
            ones = [e.here.new_ones(e.here.shape, dtype=torch.float64) for e in group]
            scale = torch.cat(
                [one if e.scale is None else e.scale for e, one in zip(group, ones, strict=True)]
            )
        here, there = torch.cat([e.here for e in group]), torch.cat([e.there for e in group])
        here, there, scale = _distinct(here, there, scale)
        result.append(Edge(name, kind, here, there, scale, merged(*(e.via for e in group))))
    return result


def _distinct(
    here: Tensor, there: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keeps each pair once; adds the squared scales of pairs that occur several times."""
    base = int(there.max()) + 1
    keys, index = torch.unique(here * base + there, return_inverse=True)
    if keys.numel() == here.numel():
        return here, there, scale
    squares = torch.ones(here.shape).double() if scale is None else scale.square()
    total = torch.zeros(keys.shape, dtype=torch.float64).index_add_(0, index, squares)
    return keys // base, keys % base, exact_sqrt(total)


def _read(graph: Graph, index: int, walk: _Walk, factors: _Factors) -> Iterator[Edge]:
    """Finds the layers, couplings and ends that the channels of a walk reach in this group."""
    for reader in graph.readers.get(index, []):
        a, b = _matches(walk.reached, reader.inputs[1])
        if a.numel():
            met = replace(walk.taken(a), via=merged(walk.via, reader.trail))
            there = reader.inputs[0][b] + reader.part.first[0]
            yield _edge(reader.layer, "layer", met, there)
    for own, other in graph.coupled.get(index, []):
        a, b = _matches(walk.reached, own)
        if a.numel():
            met = replace(walk.taken(a), reached=other[b])
            for group, source in _sources(graph, met, factors):
                there = graph.channel(group, source.reached)
                yield _edge(group.name, "coupled", source, there)
    for ids, name in graph.ended.get(index, []):
        a, _ = _matches(walk.reached, ids)
        if a.numel():
            met = walk.taken(a)
            yield _edge(name, "output" if name == "output" else "boundary", met, met.here)


def _up(walk: _Walk, group: ChannelGroup, edges: ChannelEdges, factors: _Factors) -> _Walk:
    a, b = _matches(walk.reached - group.first, edges.child)
    factor = walk.factor[a] * factors.squared(edges)[b]
    return _Walk(
        walk.here[a], edges.parent[b], factor, merged(edges.trail, (group.name,), walk.via)
    )


def _down(walk: _Walk, group: ChannelGroup, edges: ChannelEdges, factors: _Factors) -> _Walk:
    a, b = _matches(walk.reached, edges.parent)
    factor = walk.factor[a] * factors.squared(edges)[b]
    via = merged(walk.via, edges.trail, (group.name,))
    return _Walk(walk.here[a], edges.child[b] + group.first, factor, via)


def _by_group(graph: Graph, walk: _Walk) -> Iterator[tuple[int, _Walk]]:
    """Splits a walk by the channel groups that it has reached."""
    indices = graph.channels.group_index(walk.reached)
    for index in torch.unique(indices).tolist():
        yield index, walk.taken(indices == index)


def _together(walks: list[_Walk]) -> _Walk:
    """Joins walks that meet; equal pairs add their squared factors."""
    if len(walks) == 1:
        return walks[0]
    here, reached = torch.cat([w.here for w in walks]), torch.cat([w.reached for w in walks])
    base = int(reached.max()) + 1
    keys, index = torch.unique(here * base + reached, return_inverse=True)
    factor = torch.zeros(keys.shape, dtype=torch.float64)
    factor.index_add_(0, index, torch.cat([w.factor for w in walks]))
    return _Walk(keys // base, keys % base, factor, merged(*(w.via for w in walks)))


def _matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Finds all (index in a, index in b) with equal values."""
    order = torch.argsort(b, stable=True)
    sorted_b = b[order].contiguous()
    first = torch.searchsorted(sorted_b, a.contiguous())
    count = torch.searchsorted(sorted_b, a.contiguous(), right=True) - first
    left = torch.repeat_interleave(torch.arange(a.numel()), count)
    start = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
    return left, order[start + torch.arange(left.numel())]


def _kind(group: ChannelGroup) -> str:
    return "layer" if group.kind == "role" else group.kind


def _edge(name: str, kind: str, walk: _Walk, there: Tensor) -> Edge:
    plain = bool((walk.factor == 1).all())
    return Edge(name, kind, walk.here, there, None if plain else exact_sqrt(walk.factor), walk.via)
