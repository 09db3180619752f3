# SPDX-License-Identifier: MIT
"""Edges between layers, for people and for tests: found by walking the channel graph one hop.

Scores do not need them (energy.py sweeps the graph at once); that both agree is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lap_ext.topology.channels import Arcs, Space, Trail
from lap_ext.topology.roles import Role
from lap_ext.topology.value import merged

if TYPE_CHECKING:
    from lap_ext.topology.graph import Topology

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


class Links:
    """The channel graph indexed downwards: who is made of, reads or ends each space."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        channels = topology.channels
        self.below: dict[int, list[tuple[int, Arcs]]] = {}
        for place, space in enumerate(channels.spaces):
            for arcs in space.arcs:
                for above in torch.unique(channels.place(arcs.parent)).tolist():
                    self.below.setdefault(above, []).append((place, arcs))
        self.made = {role.out.first: role for role in topology.roles}
        self.readers: dict[int, list[Role]] = {}
        for role in topology.roles:
            for above in torch.unique(channels.place(role.inputs[1])).tolist():
                self.readers.setdefault(above, []).append(role)
        self.coupled: dict[int, list[tuple[Tensor, Tensor]]] = {}  # (channels there, the others)
        for left, right in topology.couplings:
            for mine, other in ((left, right), (right, left)):
                for above in torch.unique(channels.place(mine)).tolist():
                    self.coupled.setdefault(above, []).append((mine, other))
        self.ended: dict[int, list[tuple[Tensor, str]]] = {}
        for labels, name in topology.ends:
            for above in torch.unique(channels.place(labels)).tolist():
                self.ended.setdefault(above, []).append((labels, name))

    def channel(self, space: Space, labels: Tensor) -> Tensor:
        """Channels of a source as its layer counts them."""
        role = self.made.get(space.first)
        return labels - space.first + (0 if role is None else role.part.first[1])

    def read_by(self, place: int) -> list[Role]:
        """The roles that read channels made of those of a space, itself included."""
        found, seen, queue = [], set(), [place]
        while queue:
            at = queue.pop()
            if at not in seen:
                seen.add(at)
                found += self.readers.get(at, [])
                queue += [below for below, _ in self.below.get(at, [])]
        return found

    def only_norm(self, role: Role) -> Space | None:
        """The batch norm that reads a role's channels and that nothing else does; or None."""
        channels = self.topology.channels
        place = int(channels.place(role.out.labels[:1])) if role.out.size else -1
        below = self.below.get(place, [])
        if len(below) != 1 or place in {**self.readers, **self.coupled, **self.ended}:
            return None
        space = channels.spaces[below[0][0]]
        whole = torch.equal(torch.unique(below[0][1].parent), role.out.labels)
        return space if space.kind == "batch_norm" and whole else None


class _Facts:
    """The model's weights of now, for the factors of arcs."""

    def __init__(self, topology: Topology, batch_norm: bool) -> None:
        self.tensors = topology.tensors()
        self.batch_norm = batch_norm
        self.known: dict[int, Any] = {}  # static values of this pass

    def squared(self, arcs: Arcs) -> Tensor:
        """The squared factor of each arc, float64."""
        found = arcs.squared(self.tensors, self.known, self.batch_norm)
        return torch.ones(arcs.child.shape, dtype=torch.float64) if found is None else found


def producers(topology: Topology, role: Role, batch_norm: bool = True) -> list[Edge]:
    """The edges to what feeds a role; batch_norm: whether batch norms are among the scales."""
    index, labels = role.inputs
    facts = _Facts(topology, batch_norm)
    here = index + role.part.first[0]
    start = _Walk(here, labels, torch.ones(index.shape).double(), role.trail)
    pending = list(_by_place(topology, start))
    found = []
    while pending:
        place = max(place for place, _ in pending)
        walk = _together([w for p, w in pending if p == place])
        pending = [(p, w) for p, w in pending if p != place]
        space = topology.channels.spaces[place]
        if space.kind in _SOURCES:
            there = topology.links.channel(space, walk.label)
            found.append(_edge(space.name, _kind(space), walk, there))
            continue
        for arcs in space.arcs:
            step = _up(walk, space, arcs, facts)
            pending += _by_place(topology, step)
    return _merged(found[::-1])


def consumers(topology: Topology, role: Role, batch_norm: bool = True) -> list[Edge]:
    """The edges to what reads a role; batch_norm: whether batch norms are among the scales."""
    labels = role.out.labels
    facts = _Facts(topology, batch_norm)
    here = torch.arange(role.out.size) + role.part.first[1]
    start = _Walk(here, labels, torch.ones(labels.shape).double(), ())
    pending = list(_by_place(topology, start))
    found: list[Edge] = []
    while pending:
        place = min(place for place, _ in pending)
        walk = _together([w for p, w in pending if p == place])
        pending = [(p, w) for p, w in pending if p != place]
        found += _read(topology, place, walk, facts)
        for child_place, arcs in topology.links.below.get(place, []):
            step = _down(walk, topology.channels.spaces[child_place], arcs, facts)
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
    return keys // base, keys % base, total.sqrt()


def _read(topology: Topology, place: int, walk: _Walk, facts: _Facts) -> Iterator[Edge]:
    """The layers, couplings and ends that the channels of a walk reach here."""
    for reader in topology.links.readers.get(place, []):
        a, b = _matches(walk.label, reader.inputs[1])
        if a.numel():
            met = _Walk(walk.here[a], walk.label[a], walk.factor[a], merged(walk.via, reader.trail))
            there = reader.inputs[0][b] + reader.part.first[0]
            yield _edge(reader.layer, "layer", met, there)
    for mine, other in topology.links.coupled.get(place, []):
        a, b = _matches(walk.label, mine)
        if a.numel():
            met = _Walk(walk.here[a], other[b], walk.factor[a], walk.via)
            yield from _coupled(topology, met, facts)
    for labels, name in topology.links.ended.get(place, []):
        a, _ = _matches(walk.label, labels)
        if a.numel():
            met = _Walk(walk.here[a], walk.label[a], walk.factor[a], walk.via)
            yield _edge(name, "output" if name == "output" else "boundary", met, walk.here[a])


def _coupled(topology: Topology, walk: _Walk, facts: _Facts) -> Iterator[Edge]:
    """What the channels that those of a walk are multiplied with come from."""
    pending = list(_by_place(topology, walk))
    while pending:
        place = max(place for place, _ in pending)
        part = _together([w for p, w in pending if p == place])
        pending = [(p, w) for p, w in pending if p != place]
        space = topology.channels.spaces[place]
        if space.kind in _SOURCES:
            there = topology.links.channel(space, part.label)
            yield _edge(space.name, "coupled", part, there)
            continue
        for arcs in space.arcs:
            pending += _by_place(topology, _up(part, space, arcs, facts))


def _up(walk: _Walk, space: Space, arcs: Arcs, facts: _Facts) -> _Walk:
    a, b = _matches(walk.label - space.first, arcs.child)
    factor = walk.factor[a] * facts.squared(arcs)[b]
    return _Walk(walk.here[a], arcs.parent[b], factor, merged(arcs.trail, (space.name,), walk.via))


def _down(walk: _Walk, space: Space, arcs: Arcs, facts: _Facts) -> _Walk:
    a, b = _matches(walk.label, arcs.parent)
    factor = walk.factor[a] * facts.squared(arcs)[b]
    via = merged(walk.via, arcs.trail, (space.name,))
    return _Walk(walk.here[a], arcs.child[b] + space.first, factor, via)


def _by_place(topology: Topology, walk: _Walk) -> Iterator[tuple[int, _Walk]]:
    places = topology.channels.place(walk.label)
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
    return Edge(name, kind, walk.here, there, None if plain else walk.factor.sqrt(), walk.via)
