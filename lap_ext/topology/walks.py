# SPDX-License-Identifier: MIT
"""Walks through the channel graph from the channels of a role to the next layers, one hop.

A walk has pairs: a channel of the layer where it began, and a channel id that it has reached. No
pair is there twice: parallel channel edges, and paths that meet, become one pair with the sum of
their squared factors, and the sign of the sum of their factors. Otherwise they would multiply at
each step of a token mixer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology.channels import ChannelEdges, Step, Trail
from lap_ext.topology.graph import Graph
from lap_ext.topology.roles import Role
from lap_ext.topology.value import merged

_SOURCES = ("role", "input", "boundary")


class Factors(NamedTuple):
    """The factors of pairs; None stands for ones."""

    squared: Tensor | None = None
    sign: Tensor | None = None  # 1 or -1

    def added(self, index: Tensor, size: int) -> Factors:
        """Adds the factors of pairs that meet: their squares, and the sign of their sum.

        Example:
            >>> squared, sign = torch.tensor([4., 1., 1.]), torch.tensor([-1., 1., 1.])
            >>> Factors(squared, sign).added(torch.tensor([0, 0, 1]), 2)
            Factors(squared=tensor([5., 1.]), sign=tensor([-1.,  1.]))
        """
        if self.squared is None:
            return self
        squared = self.squared.new_zeros(size).index_add_(0, index, self.squared)
        if self.sign is None:
            return Factors(squared)
        factor = self.sign * exact_sqrt(self.squared)
        total = factor.new_zeros(size).index_add_(0, index, factor)
        return Factors(squared, torch.where(total < 0, -1.0, 1.0).to(total.dtype))


@dataclass(frozen=True)
class Walk:
    """Pairs along a path: a channel of the layer, and the channel id reached.

    Attributes:
        here: channel of the layer in each pair.
        reached: channel id in each pair.
        factor: the squared factor of each pair; None: none is wanted.
        via: the operations along the path.
        sign: 1 or -1, the sign of each pair's factor, float64; None: 1.
    """

    here: Tensor
    reached: Tensor
    factor: Tensor | None
    via: Trail
    sign: Tensor | None = None

    @classmethod
    def of_pairs(cls, here: Tensor, ids: Tensor, via: Trail = ()) -> Walk:
        """Starts at channels of a layer, each at its channel id."""
        return cls(here, ids, torch.ones(ids.shape, dtype=torch.float64), via)

    @classmethod
    def of_set(cls, ids: Tensor, via: Trail = ()) -> Walk:
        """Starts at channel ids as if they were of one channel: to learn which layers are met."""
        ids = torch.unique(ids)
        return cls(torch.zeros_like(ids), ids, None, via)

    def taken(self, index: Tensor) -> Walk:
        """Returns some of the pairs, in a given order."""
        factor, sign = (None if x is None else x[index] for x in (self.factor, self.sign))
        return Walk(self.here[index], self.reached[index], factor, self.via, sign)

    def along(self, step: Step, factors: Factors, via: Trail) -> Walk:
        """Moves the pairs that a step begins at, times its factors."""
        a, b = step.found(self.reached)
        moved = replace(self.taken(a), reached=step.to[b], via=via)
        if factors.squared is not None and moved.factor is not None:
            moved = replace(moved, factor=moved.factor * factors.squared[b])
        if factors.sign is not None and moved.factor is not None:
            sign = factors.sign[b]
            moved = replace(moved, sign=sign if moved.sign is None else moved.sign * sign)
        return moved.distinct() if step.meets else moved

    def distinct(self) -> Walk:
        """Returns each pair once, with the sum of its squared factors, in order."""
        if not self.here.numel():
            return self
        base = int(self.reached.max()) + 1
        keys, index = torch.unique(self.here * base + self.reached, return_inverse=True)
        squared, sign = Factors(self.factor, self.sign).added(index, keys.numel())
        return Walk(keys // base, keys % base, squared, self.via, sign)


class End(NamedTuple):
    """Where a walk ended, with the neighbor's channels as what it has reached."""

    name: str
    kind: str  # as of an Edge
    walk: Walk
    role: Role | None = None  # None where it is no layer


class Walker:
    """Walks through a graph, with the factors of its edges as the model's weights are now.

    Args:
        graph: of the network.
        tensors: the model's parameters and buffers by name, for the factors.
        batch_norm: whether batch norms count.
    """

    def __init__(
        self, graph: Graph, tensors: Mapping[str, Tensor], batch_norm: bool = True
    ) -> None:
        self.graph = graph
        self._tensors = tensors
        self._batch_norm = batch_norm
        self._known: dict[int, Any] = {}  # static values
        self._factors: dict[ChannelEdges, Factors] = {}  # as they are now

    def up(self, start: Walk) -> Iterator[End]:
        """Walks to the layers, inputs and boundaries that channels come from, newest first."""
        pending = list(self._by_group(start))
        while pending:
            index = max(index for index, _ in pending)
            walk = together([w for i, w in pending if i == index])
            pending = [(i, w) for i, w in pending if i != index]
            group = self.graph.channels.groups[index]
            if group.kind in _SOURCES:
                kind = "layer" if group.kind == "role" else group.kind
                there = self.graph.channel(group, walk.reached)
                yield End(group.name, kind, replace(walk, reached=there), self.graph.source(group))
                continue
            walk = replace(walk, reached=walk.reached - group.first)
            for edges in group.edges:
                via = merged(edges.trail, (group.name,), walk.via)
                factors = self._of_step(walk, edges, edges.up)
                pending += self._by_group(walk.along(edges.up, factors, via))

    def down(self, start: Walk) -> Iterator[End]:
        """Walks to the layers, couplings and ends that read channels."""
        pending = list(self._by_group(start))
        while pending:
            index = min(index for index, _ in pending)
            walk = together([w for i, w in pending if i == index])
            pending = [(i, w) for i, w in pending if i != index]
            yield from self._read(index, walk)
            for child, edges in self.graph.children.get(index, []):
                group = self.graph.channels.groups[child]
                via = merged(walk.via, edges.trail, (group.name,))
                moved = walk.along(edges.down, self._of_step(walk, edges, edges.down), via)
                if moved.here.numel():
                    pending.append((child, replace(moved, reached=moved.reached + group.first)))

    def _of_step(self, walk: Walk, edges: ChannelEdges, step: Step) -> Factors:
        """Returns the factors of the pairs of a step; None for each where the walk has none."""
        if walk.factor is None:
            return Factors()
        if edges not in self._factors:
            given = self._tensors, self._known, self._batch_norm
            self._factors[edges] = Factors(edges.squared(*given), edges.sign(*given))
        factors = self._factors[edges]
        if step.pair_of is None:
            return factors
        if factors.squared is None:
            ones = torch.ones(step.pair_of.shape, dtype=torch.float64)
            factors = factors._replace(squared=ones)
        return factors.added(step.pair_of, step.to.numel())

    def _by_group(self, walk: Walk) -> Iterator[tuple[int, Walk]]:
        """Splits a walk by the channel groups that it has reached."""
        if not walk.reached.numel():
            return
        indices = self.graph.channels.group_index(walk.reached)
        low, high = map(int, indices.aminmax())
        if low == high:
            yield low, walk
            return
        for index in torch.unique(indices).tolist():
            yield index, walk.taken(indices == index)

    def _read(self, index: int, walk: Walk) -> Iterator[End]:
        """Finds the layers, couplings and ends that the channels of a walk reach in this group."""
        for reader in self.graph.readers.get(index, []):
            met = walk.along(reader.reading, Factors(), merged(walk.via, reader.trail))
            if met.here.numel():
                there = met.reached + reader.part.first[0]
                yield End(reader.layer, "layer", replace(met, reached=there), reader)
        for own, other in self.graph.coupled.get(index, []):
            met = walk.along(Step.of(own, other), Factors(), walk.via)
            yield from (end._replace(kind="coupled") for end in self.up(met))
        for ids, name in self.graph.ended.get(index, []):
            met = walk.along(Step.of(ids, ids), Factors(), walk.via)
            if met.here.numel():
                kind = "output" if name == "output" else "boundary"
                yield End(name, kind, replace(met, reached=met.here))


def together(walks: Sequence[Walk]) -> Walk:
    """Joins walks that meet; equal pairs add their factors, as `Factors.added` does."""
    if len(walks) == 1:
        return walks[0]
    here, reached = (torch.cat([getattr(w, name) for w in walks]) for name in ("here", "reached"))
    factors = [w.factor for w in walks if w.factor is not None]
    factor = torch.cat(factors) if factors else None
    sign = None
    if factor is not None and any(w.sign is not None for w in walks):
        signs = [torch.ones(w.here.shape).double() if w.sign is None else w.sign for w in walks]
        sign = torch.cat(signs)
    return Walk(here, reached, factor, merged(*(w.via for w in walks)), sign).distinct()
