# SPDX-License-Identifier: MIT
"""The graph of a traced network: its channels, the roles of its weights, and who reads what.

Pure data: it knows neither the model nor the values of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.topology.channels import Arcs, Channels, Space
from lap_ext.topology.roles import Role


class Graph:
    """What a trace has found, indexed by the spaces that are read.

    Attributes:
        channels: all channels, and from which ones each is made.
        roles: the uses of the weights, in the order of the network.
        couplings: channels that are each other's neighbors (q and k of an attention), pair by pair.
        ends: channels that leave the network, and the name of what they leave by.
        below: place of a space -> (place, arcs) of those that are made of it.
        readers: place of a space -> the roles that read it.
        coupled: place of a space -> (channels there, the channels that they are coupled with).
        ended: place of a space -> (channels, name) of what ends there.
        norms: role -> the batch norm that alone reads its outputs, where there is one.
    """

    def __init__(
        self,
        channels: Channels,
        roles: list[Role],
        couplings: list[tuple[Tensor, Tensor]],
        ends: list[tuple[Tensor, str]],
    ) -> None:
        self.channels = channels
        self.roles = roles
        self.couplings = couplings
        self.ends = ends
        self.below: dict[int, list[tuple[int, Arcs]]] = {}
        for place, space in enumerate(channels.spaces):
            for arcs in space.arcs:
                for above in self._places(arcs.parent):
                    self.below.setdefault(above, []).append((place, arcs))
        self.readers: dict[int, list[Role]] = {}
        for role in roles:
            for above in self._places(role.inputs[1]):
                self.readers.setdefault(above, []).append(role)
        self.coupled: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for left, right in couplings:
            for mine, other in ((left, right), (right, left)):
                for above in self._places(mine):
                    self.coupled.setdefault(above, []).append((mine, other))
        self.ended: dict[int, list[tuple[Tensor, str]]] = {}
        for labels, name in ends:
            for above in self._places(labels):
                self.ended.setdefault(above, []).append((labels, name))
        self._made = {role.out.first: role for role in roles}
        norms = {role: self._only_norm(role) for role in roles}
        self.norms = {role: norm for role, norm in norms.items() if norm is not None}

    def channel(self, space: Space, labels: Tensor) -> Tensor:
        """Channels of a source as its layer counts them."""
        role = self._made.get(space.first)
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

    def _places(self, labels: Tensor) -> list[int]:
        """The places of the spaces that these channels belong to."""
        return torch.unique(self.channels.place(labels)).tolist()

    def _only_norm(self, role: Role) -> Space | None:
        """The batch norm that reads a role's channels and that nothing else does; or None."""
        place = int(self.channels.place(role.out.labels[:1])) if role.out.size else -1
        below = self.below.get(place, [])
        read = place in self.readers or place in self.coupled or place in self.ended
        if len(below) != 1 or read:
            return None
        space = self.channels.spaces[below[0][0]]
        whole = torch.equal(torch.unique(below[0][1].parent), role.out.labels)
        return space if space.kind == "batch_norm" and whole else None
