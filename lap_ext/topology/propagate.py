# SPDX-License-Identifier: MIT
"""The lookahead norms of all roles at once, by two passes over the channel graph.

    up    F[c] = squared norm that arrives in channel c: the squared row norm for a role's output, 1
                 for the model's input, the sum of weight * scale^2 * F[parent] for a computed
                 channel
    down  B[c] = squared norm of what reads channel c, the sum of: squared column norms of roles, 1
                 where c leaves the network, F of the channels that c is multiplied with (q and k),
                 and weight * scale^2 * B[child]

    in_norm[i] = sqrt(sum of F over the channels that feed i), out_norm[o] = sqrt(B[o])

A position-independent weight may meet several channels, one at a time (after an unflatten, in a
token mixer): all of them count, as the positions of a flatten do.

A layer that only constants feed, or that nothing reads, counts as a first or last layer: 1. A
single channel that nothing reads counts 0. Everything is float64 on the CPU and is added in a fixed
order, so that the bits are always the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology.graph import Graph
from lap_ext.topology.roles import Role


class Propagation:
    """Propagates norms through a graph, with the factors of its edges computed once.

    Args:
        graph: of the network.
        tensors: the model's parameters and buffers by name.
        batch_norm: whether batch norms count.
    """

    def __init__(
        self, graph: Graph, tensors: Mapping[str, Tensor], batch_norm: bool = True
    ) -> None:
        self.graph = graph
        self.channels = graph.channels
        self._tensors = tensors
        self._known: dict[int, Any] = {}
        self._batch_norm = batch_norm
        self._edges = [
            (group, edges, edges.squared(self._tensors, self._known, batch_norm))
            for group in self.channels.groups
            for edges in group.edges
        ]

    def check(self) -> None:
        """Raises unless every scale on an edge is finite."""
        for _, edges, _ in self._edges:
            if edges.scale is not None and edges.entry is not None:
                if self._batch_norm or edges.scale.kind != "batch_norm":
                    edges.scale.check(self._tensors, self._known, edges.entry)

    def norm_scale(self, role: Role) -> Tensor | None:
        """Returns |gamma| / sqrt(running_var + eps) of the batch norm that alone follows.

        float64 [O]; None where there is no such batch norm.
        """
        norm = self.graph.norms.get(role)
        if norm is None:
            return None
        (edges,) = norm.edges
        assert edges.scale is not None and edges.entry is not None
        edges.scale.check(self._tensors, self._known, edges.entry)
        scale = torch.ones(role.out.size, dtype=torch.float64)
        entries = edges.scale.value(self._tensors, self._known)[edges.entry]
        scale[edges.parent - role.out.first] = entries.abs()
        return scale

    def arriving(self, out_squared_norm: Sequence[Tensor]) -> Tensor:
        """Computes F from the squared norms of every role's outputs, each float64 [O]."""
        squared_norm = torch.zeros(self.channels.size, dtype=torch.float64)
        for role, given in zip(self.graph.roles, out_squared_norm, strict=True):
            squared_norm[role.out.first : role.out.first + role.out.size] = given
        for group in self.channels.groups:
            if group.kind in ("input", "boundary"):
                squared_norm[group.first : group.first + group.size] = 1.0
        for group, edges, factor in self._edges:
            given = squared_norm[edges.parent]
            given = given if factor is None else given * factor
            squared_norm.index_add_(0, edges.child + group.first, given)
        return squared_norm

    def reading(self, in_squared_norm: Sequence[Tensor], arriving: Tensor) -> tuple[Tensor, Tensor]:
        """Computes B from the squared norms of every role's inputs, each [I]; and what is read."""
        squared_norm = torch.zeros(self.channels.size, dtype=torch.float64)
        read = torch.zeros(self.channels.size, dtype=torch.bool)
        for role, given in zip(self.graph.roles, in_squared_norm, strict=True):
            index, ids = role.inputs
            squared_norm.index_add_(0, ids, given[index])
            read[ids] = True
        for left, right in self.graph.couplings:
            for own, other in ((left, right), (right, left)):
                squared_norm.index_add_(0, own, arriving[other])
                read[own] = True
        for ids, _ in self.graph.ends:
            squared_norm[ids] += 1.0
            read[ids] = True
        for group, edges, factor in reversed(self._edges):
            given = squared_norm[edges.child + group.first]
            squared_norm.index_add_(0, edges.parent, given if factor is None else given * factor)
            read[edges.parent] |= read[edges.child + group.first]
        return squared_norm, read

    def norms(
        self, in_squared_norm: Sequence[Tensor], out_squared_norm: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Computes (in_norm [I], out_norm [O]) of every role, float64."""
        arriving = self.arriving(out_squared_norm)
        reading, read = self.reading(in_squared_norm, arriving)
        result = []
        for role in self.graph.roles:
            index, ids = role.inputs
            into = torch.zeros(role.part.channels[0], dtype=torch.float64)
            into.index_add_(0, index, arriving[ids])
            fed = torch.zeros(into.shape, dtype=torch.bool)
            fed[index] = True
            into[~fed] = 1.0  # by a constant
            own = slice(role.out.first, role.out.first + role.out.size)
            out = reading[own] if bool(read[own].any()) else torch.ones_like(reading[own])
            result.append((exact_sqrt(into), exact_sqrt(out)))
        return result
