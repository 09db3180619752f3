# SPDX-License-Identifier: MIT
"""Walks through the channel graph from the channels of a role to the next layers, one hop.

A walk has pairs: a channel of the layer where it began, and a channel id that it has reached. No
pair is there twice: parallel channel edges, and paths that meet, become one pair with the sum of
their squared factors. Otherwise they would multiply at each step of a token mixer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lap_ext.topology.channels import ChannelEdges, Step, Trail
from lap_ext.topology.graph import Graph
from lap_ext.topology.value import merged

_SOURCES = ("role", "input", "boundary")


@dataclass(frozen=True)
class Walk:
    """Pairs along a path: a channel of the layer, and the channel id reached.

    The factor is the squared factor of each pair; None: none is wanted.
    """

    here: Tensor
    reached: Tensor
    factor: Tensor | None
    via: Trail

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
        factor = None if self.factor is None else self.factor[index]
        return Walk(self.here[index], self.reached[index], factor, self.via)

    def along(self, step: Step, squared: Tensor | None, via: Trail) -> Walk:
        """Moves the pairs that a step begins at, times its squared factors (None: ones)."""
        a, b = step.found(self.reached)
        moved = replace(self.taken(a), reached=step.to[b], via=via)
        if squared is not None and moved.factor is not None:
            moved = replace(moved, factor=moved.factor * squared[b])
        return moved.distinct() if step.meets else moved

    def distinct(self) -> Walk:
        """Returns each pair once, with the sum of its squared factors, in order."""
        if not self.here.numel():
            return self
        base = int(self.reached.max()) + 1
        keys, index = torch.unique(self.here * base + self.reached, return_inverse=True)
        factor = self.factor
        if factor is not None:
            factor = factor.new_zeros(keys.shape).index_add_(0, index, factor)
        return Walk(keys // base, keys % base, factor, self.via)


class End(NamedTuple):
    """Where a walk ended, with the neighbor's channels as what it has reached."""

    name: str
    kind: str  # as of an Edge
    walk: Walk


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
        self._squared: dict[ChannelEdges, Tensor | None] = {}  # as they are now

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
                yield End(group.name, kind, replace(walk, reached=there))
                continue
            walk = replace(walk, reached=walk.reached - group.first)
            for edges in group.edges:
                via = merged(edges.trail, (group.name,), walk.via)
                squared = self._factor(walk, edges, edges.up)
                pending += self._by_group(walk.along(edges.up, squared, via))

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
                moved = walk.along(edges.down, self._factor(walk, edges, edges.down), via)
                if moved.here.numel():
                    pending.append((child, replace(moved, reached=moved.reached + group.first)))

    def _factor(self, walk: Walk, edges: ChannelEdges, step: Step) -> Tensor | None:
        """Returns the squared factor of each pair of a step; None: ones, or the walk has none."""
        if walk.factor is None:
            return None
        if edges not in self._squared:
            self._squared[edges] = edges.squared(self._tensors, self._known, self._batch_norm)
        squared = self._squared[edges]
        if step.pair_of is None:
            return squared
        ones = torch.ones(step.pair_of.shape, dtype=torch.float64) if squared is None else squared
        return torch.zeros(step.to.shape, dtype=torch.float64).index_add_(0, step.pair_of, ones)

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
            met = walk.along(reader.reading, None, merged(walk.via, reader.trail))
            if met.here.numel():
                there = met.reached + reader.part.first[0]
                yield End(reader.layer, "layer", replace(met, reached=there))
        for own, other in self.graph.coupled.get(index, []):
            met = walk.along(Step.of(own, other), None, walk.via)
            yield from (end._replace(kind="coupled") for end in self.up(met))
        for ids, name in self.graph.ended.get(index, []):
            met = walk.along(Step.of(ids, ids), None, walk.via)
            if met.here.numel():
                kind = "output" if name == "output" else "boundary"
                yield End(name, kind, replace(met, reached=met.here))


def together(walks: Sequence[Walk]) -> Walk:
    """Joins walks that meet; equal pairs add their squared factors."""
    if len(walks) == 1:
        return walks[0]
    here, reached = (torch.cat([getattr(w, name) for w in walks]) for name in ("here", "reached"))
    factors = [w.factor for w in walks if w.factor is not None]
    factor = torch.cat(factors) if factors else None
    return Walk(here, reached, factor, merged(*(w.via for w in walks))).distinct()
