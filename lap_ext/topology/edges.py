# SPDX-License-Identifier: MIT
"""Edges between layers, for people and for tests: found by walking the channel graph one hop.

Scores do not need them (propagate.py sweeps the graph at once); that both agree is tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology.channels import Arcs, Space, Trail
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
        here: channel of this layer, pair by pair, int64 [n]; of the whole weight where roles use
            parts of it.
        there: channel of the neighbor, pair by pair, int64 [n].
        scale: factor on the way, pair by pair, float64 [n] (batch norm, norm weight, layer scale;
            with the squared weights of a mean it is their root); None: ones.
        via: operations passed on the way, each once; where ways have met, those of all of them.
    """

    name: str
    kind: str
    here: Tensor
    there: Tensor
    scale: Tensor | None
    via: Trail

    @property
    def how(self) -> str:
        """How channels correspond, in parentheses behind a name; empty if one to one or all to all."""
        return "" if self.channel_map in ("same", "all") else f" ({self.channel_map})"

    @property
    def channel_map(self) -> str:
        """How channels correspond, in a word: "same", "offset 64", "repeat 4", "permuted", ..."""
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
    """Pairs on their way: channel of the layer, label reached, squared factor, operations."""

    here: Tensor
    label: Tensor
    factor: Tensor
    via: Trail


class _Facts:
    """The model's weights of now, for the factors of arcs."""

    def __init__(self, tensors: Mapping[str, Tensor], batch_norm: bool) -> None:
        self.tensors = tensors
        self.batch_norm = batch_norm
        self.known: dict[int, Any] = {}  # static values of this pass

    def squared(self, arcs: Arcs) -> Tensor:
        """The squared factor of each arc, float64."""
        found = arcs.squared(self.tensors, self.known, self.batch_norm)
        return torch.ones(arcs.child.shape, dtype=torch.float64) if found is None else found


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
    index, labels = role.inputs
    facts = _Facts(tensors, batch_norm)
    here = index + role.part.first[0]
    start = _Walk(here, labels, torch.ones(index.shape).double(), role.trail)
    pending = list(_by_place(graph, start))
    found = []
    while pending:
        place = max(place for place, _ in pending)
        walk = _together([w for p, w in pending if p == place])
        pending = [(p, w) for p, w in pending if p != place]
        space = graph.channels.spaces[place]
        if space.kind in _SOURCES:
            there = graph.channel(space, walk.label)
            found.append(_edge(space.name, _kind(space), walk, there))
            continue
        for arcs in space.arcs:
            step = _up(walk, space, arcs, facts)
            pending += _by_place(graph, step)
    return _merged(found[::-1])


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
    labels = role.out.labels
    facts = _Facts(tensors, batch_norm)
    here = torch.arange(role.out.size) + role.part.first[1]
    start = _Walk(here, labels, torch.ones(labels.shape).double(), ())
    pending = list(_by_place(graph, start))
    found: list[Edge] = []
    while pending:
        place = min(place for place, _ in pending)
        walk = _together([w for p, w in pending if p == place])
        pending = [(p, w) for p, w in pending if p != place]
        found += _read(graph, place, walk, facts)
        for child_place, arcs in graph.below.get(place, []):
            step = _down(walk, graph.channels.spaces[child_place], arcs, facts)
            pending += [(child_place, step)] if step.here.numel() else []
    return _merged(found)


def _merged(found: list[Edge]) -> list[Edge]:
    """One edge a neighbor and kind, though its channels were born in different places."""
    groups: dict[tuple[str, str], list[Edge]] = {}
    for edge in found:
        groups.setdefault((edge.name, edge.kind), []).append(edge)
    result = []
    for (name, kind), parts in groups.items():
        scale = None
        if any(edge.scale is not None for edge in parts):
            ones = [e.here.new_ones(e.here.shape, dtype=torch.float64) for e in parts]
            scale = torch.cat([one if e.scale is None else e.scale
                               for e, one in zip(parts, ones, strict=True)])  # fmt: skip
        here, there = torch.cat([e.here for e in parts]), torch.cat([e.there for e in parts])
        here, there, scale = _distinct(here, there, scale)
        result.append(Edge(name, kind, here, there, scale, merged(*(e.via for e in parts))))
    return result


def _distinct(
    here: Tensor, there: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pairs that occur several times once, their squared scales added."""
    base = int(there.max()) + 1
    keys, place = torch.unique(here * base + there, return_inverse=True)
    if keys.numel() == here.numel():
        return here, there, scale
    squares = torch.ones(here.shape).double() if scale is None else scale.square()
    total = torch.zeros(keys.shape, dtype=torch.float64).index_add_(0, place, squares)
    return keys // base, keys % base, exact_sqrt(total)


def _read(graph: Graph, place: int, walk: _Walk, facts: _Facts) -> Iterator[Edge]:
    """The layers, couplings and ends that the channels of a walk reach here."""
    for reader in graph.readers.get(place, []):
        a, b = _matches(walk.label, reader.inputs[1])
        if a.numel():
            met = _Walk(walk.here[a], walk.label[a], walk.factor[a], merged(walk.via, reader.trail))
            there = reader.inputs[0][b] + reader.part.first[0]
            yield _edge(reader.layer, "layer", met, there)
    for mine, other in graph.coupled.get(place, []):
        a, b = _matches(walk.label, mine)
        if a.numel():
            met = _Walk(walk.here[a], other[b], walk.factor[a], walk.via)
            yield from _coupled(graph, met, facts)
    for labels, name in graph.ended.get(place, []):
        a, _ = _matches(walk.label, labels)
        if a.numel():
            met = _Walk(walk.here[a], walk.label[a], walk.factor[a], walk.via)
            yield _edge(name, "output" if name == "output" else "boundary", met, walk.here[a])


def _coupled(graph: Graph, walk: _Walk, facts: _Facts) -> Iterator[Edge]:
    """What the channels that those of a walk are multiplied with come from."""
    pending = list(_by_place(graph, walk))
    while pending:
        place = max(place for place, _ in pending)
        part = _together([w for p, w in pending if p == place])
        pending = [(p, w) for p, w in pending if p != place]
        space = graph.channels.spaces[place]
        if space.kind in _SOURCES:
            there = graph.channel(space, part.label)
            yield _edge(space.name, "coupled", part, there)
            continue
        for arcs in space.arcs:
            pending += _by_place(graph, _up(part, space, arcs, facts))


def _up(walk: _Walk, space: Space, arcs: Arcs, facts: _Facts) -> _Walk:
    a, b = _matches(walk.label - space.first, arcs.child)
    factor = walk.factor[a] * facts.squared(arcs)[b]
    return _Walk(walk.here[a], arcs.parent[b], factor, merged(arcs.trail, (space.name,), walk.via))


def _down(walk: _Walk, space: Space, arcs: Arcs, facts: _Facts) -> _Walk:
    a, b = _matches(walk.label, arcs.parent)
    factor = walk.factor[a] * facts.squared(arcs)[b]
    via = merged(walk.via, arcs.trail, (space.name,))
    return _Walk(walk.here[a], arcs.child[b] + space.first, factor, via)


def _by_place(graph: Graph, walk: _Walk) -> Iterator[tuple[int, _Walk]]:
    places = graph.channels.place(walk.label)
    for place in torch.unique(places).tolist():
        here = places == place
        yield place, _Walk(walk.here[here], walk.label[here], walk.factor[here], walk.via)


def _together(walks: list[_Walk]) -> _Walk:
    """Walks that have met; equal pairs add their squared factors."""
    if len(walks) == 1:
        return walks[0]
    here, label = torch.cat([w.here for w in walks]), torch.cat([w.label for w in walks])
    base = int(label.max()) + 1
    keys, place = torch.unique(here * base + label, return_inverse=True)
    factor = torch.zeros(keys.shape, dtype=torch.float64)
    factor.index_add_(0, place, torch.cat([w.factor for w in walks]))
    return _Walk(keys // base, keys % base, factor, merged(*(w.via for w in walks)))


def _matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """All (place in a, place in b) with equal values."""
    order = torch.argsort(b, stable=True)
    sorted_b = b[order].contiguous()
    first = torch.searchsorted(sorted_b, a.contiguous())
    count = torch.searchsorted(sorted_b, a.contiguous(), right=True) - first
    left = torch.repeat_interleave(torch.arange(a.numel()), count)
    start = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
    return left, order[start + torch.arange(left.numel())]


def _kind(space: Space) -> str:
    return "layer" if space.kind == "role" else space.kind


def _edge(name: str, kind: str, walk: _Walk, there: Tensor) -> Edge:
    plain = bool((walk.factor == 1).all())
    return Edge(name, kind, walk.here, there, None if plain else exact_sqrt(walk.factor), walk.via)
