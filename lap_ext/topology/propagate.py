# SPDX-License-Identifier: MIT
"""Lookahead factors of all roles at once, by two sweeps over the channel graph.

    up    F[c] = energy that arrives in channel c: of a role's output its squared row norm, of the
                 model's input 1, of a made channel the sum of weight * scale^2 * F[parent]
    down  B[c] = energy of what reads channel c: squared column norms of the roles, 1 where it
                 leaves the network, F of the channel it is multiplied with (q and k), and
                 weight * scale^2 * B[child]

    in_norm[i] = sqrt(sum of F over the channels that feed i), out_norm[o] = sqrt(B[o])

A position-independent weight may meet several channels, one at a time (behind an unflatten, in a
mixer of tokens): all of them count, as the positions of a flatten do.

A layer that nothing but constants feeds, or that nothing reads, counts as a first or last one: 1.
A single channel that nothing reads counts 0. All is in float64 on the CPU and added in a fixed
order: the bits are always the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology.graph import Graph
from lap_ext.topology.roles import Role


class Sweeps:
    """A graph with the factors of its arcs evaluated once.

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
        self._arcs = [
            (space, arcs, arcs.squared(self._tensors, self._known, batch_norm))
            for space in self.channels.spaces
            for arcs in space.arcs
        ]

    def norm_scale(self, role: Role) -> Tensor | None:
        """|gamma| / sqrt(running_var + eps) of the batch norm that alone follows, float64 [O]."""
        norm = self.graph.norms.get(role)
        if norm is None:
            return None
        (arcs,) = norm.arcs
        assert arcs.scale is not None and arcs.entry is not None
        scale = torch.ones(role.out.size, dtype=torch.float64)
        entries = arcs.scale.value(self._tensors, self._known)[arcs.entry]
        scale[arcs.parent - role.out.first] = entries.abs()
        return scale

    def arriving(self, out_energy: Sequence[Tensor]) -> Tensor:
        """F for the squared norms of every role's outputs, each float64 [O]."""
        energy = torch.zeros(self.channels.size, dtype=torch.float64)
        for role, given in zip(self.graph.roles, out_energy, strict=True):
            energy[role.out.first : role.out.first + role.out.size] = given
        for space in self.channels.spaces:
            if space.kind in ("input", "boundary"):
                energy[space.first : space.first + space.size] = 1.0
        for space, arcs, factor in self._arcs:
            given = energy[arcs.parent]
            given = given if factor is None else given * factor
            energy.index_add_(0, arcs.child + space.first, given)
        return energy

    def reading(self, in_energy: Sequence[Tensor], arriving: Tensor) -> tuple[Tensor, Tensor]:
        """B for the squared norms of every role's inputs, each [I]; and which channels are read."""
        energy = torch.zeros(self.channels.size, dtype=torch.float64)
        read = torch.zeros(self.channels.size, dtype=torch.bool)
        for role, given in zip(self.graph.roles, in_energy, strict=True):
            index, labels = role.inputs
            energy.index_add_(0, labels, given[index])
            read[labels] = True
        for left, right in self.graph.couplings:
            for mine, other in ((left, right), (right, left)):
                energy.index_add_(0, mine, arriving[other])
                read[mine] = True
        for labels, _ in self.graph.ends:
            energy[labels] += 1.0
            read[labels] = True
        for space, arcs, factor in reversed(self._arcs):
            given = energy[arcs.child + space.first]
            energy.index_add_(0, arcs.parent, given if factor is None else given * factor)
            read[arcs.parent] |= read[arcs.child + space.first]
        return energy, read

    def factors(
        self, in_energy: Sequence[Tensor], out_energy: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """(in_norm [I], out_norm [O]) of every role, float64."""
        arriving = self.arriving(out_energy)
        reading, read = self.reading(in_energy, arriving)
        result = []
        for role in self.graph.roles:
            index, labels = role.inputs
            into = torch.zeros(role.part.channels[0], dtype=torch.float64)
            into.index_add_(0, index, arriving[labels])
            fed = torch.zeros(into.shape, dtype=torch.bool)
            fed[index] = True
            into[~fed] = 1.0  # by a constant
            own = slice(role.out.first, role.out.first + role.out.size)
            out = reading[own] if bool(read[own].any()) else torch.ones_like(reading[own])
            result.append((exact_sqrt(into), exact_sqrt(out)))
        return result
