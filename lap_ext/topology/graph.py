# SPDX-License-Identifier: MIT
"""Defines the graph of a traced network: channels, roles of weights, and what reads what.

It is pure data and knows neither the model nor the values of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.topology.channels import ChannelEdges, ChannelGroup, Channels
from lap_ext.topology.facts import Facts
from lap_ext.topology.roles import Role


class Graph:
    """The result of a trace, indexed by the channel groups that are read.

    Attributes:
        channels: all channels, and the channels that each one is computed from.
        roles: the uses of the weights, in the order of the network.
        couplings: pairs of channels that are each other's neighbors (q and k of an attention).
        ends: channels that leave the network, and the name of the end through which they leave.
        facts: what removal must respect beside the channels (facts.py).
        children: index of a group -> (index, edges) of the groups that are computed from it.
        readers: index of a group -> the roles that read it.
        coupled: index of a group -> (its channels, the channels that they are coupled with).
        ended: index of a group -> (channels, name) of what ends there.
        norms: role -> the batch norm that is the only reader of its outputs, where there is one.
    """

    def __init__(
        self,
        channels: Channels,
        roles: list[Role],
        couplings: list[tuple[Tensor, Tensor]],
        ends: list[tuple[Tensor, str]],
        facts: Facts,
    ) -> None:
        self.channels = channels
        self.roles = roles
        self.couplings = couplings
        self.ends = ends
        self.facts = facts
        self.children: dict[int, list[tuple[int, ChannelEdges]]] = {}
        for index, group in enumerate(channels.groups):
            for edges in group.edges:
                for parent in self._group_indices(edges.parent):
                    self.children.setdefault(parent, []).append((index, edges))
        self.readers: dict[int, list[Role]] = {}
        for role in roles:
            for index in self._group_indices(role.inputs[1]):
                self.readers.setdefault(index, []).append(role)
        self.coupled: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for left, right in couplings:
            for own, other in ((left, right), (right, left)):
                for index in self._group_indices(own):
                    self.coupled.setdefault(index, []).append((own, other))
        self.ended: dict[int, list[tuple[Tensor, str]]] = {}
        for ids, name in ends:
            for index in self._group_indices(ids):
                self.ended.setdefault(index, []).append((ids, name))
        self._by_output = {role.out.first: role for role in roles}
        norms = {role: self._only_norm(role) for role in roles}
        self.norms = {role: norm for role, norm in norms.items() if norm is not None}

    def channel(self, group: ChannelGroup, ids: Tensor) -> Tensor:
        """Returns a source's channels as its layer numbers them."""
        role = self.source(group)
        return ids - group.first + (0 if role is None else role.part.first[1])

    def source(self, group: ChannelGroup) -> Role | None:
        """Returns the role whose outputs are a group's channels, or None."""
        return self._by_output.get(group.first)

    def read_by(self, index: int) -> list[Role]:
        """Lists the roles that read a group's channels or channels that are computed from them."""
        roles: list[Role] = []
        seen, queue = set(), [index]
        while queue:
            at = queue.pop()
            if at not in seen:
                seen.add(at)
                roles += self.readers.get(at, [])
                queue += [child for child, _ in self.children.get(at, [])]
        return roles

    def _group_indices(self, ids: Tensor) -> list[int]:
        """Lists the indices of the groups that these channels belong to."""
        return torch.unique(self.channels.group_index(ids)).tolist()

    def _only_norm(self, role: Role) -> ChannelGroup | None:
        """Returns the batch norm that reads a role's channels if nothing else does; else None."""
        index = int(self.channels.group_index(role.out.ids[:1])) if role.out.size else -1
        children = self.children.get(index, [])
        read = index in self.readers or index in self.coupled or index in self.ended
        if len(children) != 1 or read:
            return None
        child, edges = children[0]
        group = self.channels.groups[child]
        reads_all = torch.equal(torch.unique(edges.parent), role.out.ids)
        return group if group.kind == "batch_norm" and reads_all else None
