# SPDX-License-Identifier: MIT
"""Numbers all channels of a network from 1 and notes which channels each is computed from.

A channel group holds channels that one operation creates: the outputs of a weighted layer, the
model's input, or the result of an operation that joins, scales or reduces channels. Channel edges
lead from each created channel to its parents, with the factor between them:

    squared norm of a channel = sum over edges of weight * scale^2 * squared norm of the parent

Parents are numbered before their children, so that one pass up or down the list is enough. A loop
can only close through a weighted layer, where one hop ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lap_ext.topology.static import Scale

Trail = tuple[str, ...]
_BASE = 1 << 40  # more than there are channel ids: (child, id) is one int64 key


class Step(NamedTuple):
    """Pairs of channels as a walk uses them: each once, sorted by where they start."""

    low: int  # the first channel at which a pair starts
    starts: Tensor  # int64: the pairs of channel low + i are starts[i] to starts[i + 1] - 1
    to: Tensor  # int64 [n]
    pair_of: Tensor | None  # which pair each given one has become; None: they are as given
    meets: bool  # whether several lead to one channel

    @classmethod
    def of(cls, at: Tensor, to: Tensor) -> Step:
        """Sorts pairs.

        Example:
            >>> step = Step.of(torch.tensor([2, 1, 2]), torch.tensor([5, 7, 5]))
            >>> step.starts.tolist(), step.to.tolist(), step.pair_of.tolist(), step.meets
            ([0, 1, 2], [7, 5], [1, 0, 1], False)
        """
        pair_of, keys = None, at * _BASE + to
        if not bool((keys[1:] > keys[:-1]).all()):
            keys, pair_of = torch.unique(keys, return_inverse=True)
            at, to = keys // _BASE, keys % _BASE
        low = int(at[0]) if at.numel() else 0
        ends = torch.bincount(at - low).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        return cls(low, starts, to, pair_of, torch.unique(to).numel() < to.numel())

    def found(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Finds all (index in ids, index of a pair) where the pair starts at that channel.

        Example:
            >>> step = Step.of(torch.tensor([1, 2, 2]), torch.tensor([7, 5, 6]))
            >>> [x.tolist() for x in step.found(torch.tensor([0, 2, 3]))]
            [[1, 1], [1, 2]]
        """
        place = ids - self.low
        inside = (place >= 0) & (place < self.starts.numel() - 1)
        place = torch.where(inside, place, 0)
        first = self.starts[place]
        count = (self.starts[(place + 1).clamp(max=self.starts.numel() - 1)] - first) * inside
        if int(count.amax() if count.numel() else 0) <= 1:
            left = count.nonzero().flatten()
            return left, first[left]
        left = torch.repeat_interleave(torch.arange(ids.numel()), count)
        start = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
        return left, start + torch.arange(left.numel())


@dataclass(frozen=True, eq=False)
class ChannelEdges:
    """The child, the parent and the factor between them for each pair of channels."""

    child: Tensor  # int64 [n], index within the group
    parent: Tensor  # int64 [n], channel id
    trail: Trail = ()  # operations between them
    scale: Scale | None = None
    entry: Tensor | None = None  # int64 [n]: entry of the flattened scale
    weight: Tensor | None = None  # float64 [n]; None: 1
    broadcast: bool = False  # whether a parent is one for several children, of size 1 there

    def __repr__(self) -> str:
        return f"ChannelEdges({self.child.numel()})"

    @cached_property
    def up(self) -> Step:
        """The pairs from child to parent."""
        return Step.of(self.child, self.parent)

    @cached_property
    def down(self) -> Step:
        """The pairs from parent to child."""
        return Step.of(self.parent, self.child)

    def squared(
        self, tensors: Mapping[str, Tensor], known: dict[int, Any], batch_norm: bool = True
    ) -> Tensor | None:
        """Returns weight * scale^2 of each edge, float64 [n]; None means ones.

        Args:
            tensors: the model's parameters and buffers by name.
            known: the static values computed so far in this pass.
            batch_norm: whether batch norms count.
        """
        if self.scale is None or self.entry is None:
            return self.weight
        if self.scale.kind == "batch_norm" and not batch_norm:
            return self.weight
        factor = self.scale.value(tensors, known)[self.entry].square()
        return factor if self.weight is None else factor * self.weight

    def sign(
        self, tensors: Mapping[str, Tensor], known: dict[int, Any], batch_norm: bool = True
    ) -> Tensor | None:
        """Returns 1 or -1 for each edge, the sign of its scale, float64 [n]; None means ones."""
        if self.scale is None or self.entry is None:
            return None
        if self.scale.kind == "batch_norm" and not batch_norm:
            return None
        negative = self.scale.value(tensors, known)[self.entry] < 0
        return torch.where(negative, -1.0, 1.0).double() if bool(negative.any()) else None


@dataclass(frozen=True)
class ChannelGroup:
    """The channels first, first + 1, ... that one operation creates.

    The kind is one of: role (the output of a weighted layer), input, boundary, zero (padding),
    batch_norm, scale, number (multiplied by a scalar), position (multiplied by a constant that
    changes with the position), softmax, join, reduce, state (of a recurrent layer), or routed (by
    data, to experts).
    """

    first: int
    size: int
    kind: str
    name: str  # of the layer, the input or the operation
    edges: list[ChannelEdges] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"ChannelGroup({self.kind} {self.name!r}, {self.size} channels from {self.first})"

    @property
    def ids(self) -> Tensor:
        """The group's channels, int64 [size]."""
        return torch.arange(self.first, self.first + self.size)


class Channels:
    """The channel groups in the order in which they were created."""

    def __init__(self) -> None:
        self.size = 1  # id 0 is no channel
        self.groups: list[ChannelGroup] = []
        self._roots = torch.zeros(1024, dtype=torch.int64)  # of each id; doubled when full
        self._group_indices = torch.full((1024,), -1, dtype=torch.int64)
        self._members: dict[int, Tensor] = {}  # index of a "reduce" group -> keys of its edges

    def add(
        self,
        size: int,
        kind: str,
        name: str,
        edges: list[ChannelEdges] | None = None,
        roots: Tensor | None = None,
    ) -> ChannelGroup:
        """Creates a group; roots are the channels of which these are scalar multiples."""
        group = ChannelGroup(self.size, size, kind, name, edges or [])
        end = self.size + size
        while end > self._roots.numel():
            self._roots = torch.cat([self._roots, torch.zeros_like(self._roots)])
            missing = torch.full_like(self._group_indices, -1)
            self._group_indices = torch.cat([self._group_indices, missing])
        self._roots[self.size : end] = group.ids if roots is None else roots
        self._group_indices[self.size : end] = len(self.groups)
        self.groups.append(group)
        self.size = end
        return group

    def zero(self) -> int:
        """Returns the channel that is always zero."""
        for group in self.groups:
            if group.kind == "zero":
                return group.first
        return self.add(1, "zero", "zero").first

    def root(self, ids: Tensor) -> Tensor:
        """Returns the channel of which each is a scalar multiple: for most, the channel itself."""
        return self._roots[ids]

    def group_index(self, ids: Tensor) -> Tensor:
        """Returns the index of each channel's group in groups; -1 for channel 0."""
        return self._group_indices[ids]

    def of_kind(self, ids: Tensor, *kinds: str) -> Tensor:
        """Tells for each channel whether its group has one of these kinds."""
        indices = self.group_index(ids)
        result = torch.zeros(ids.shape, dtype=torch.bool)
        for index in torch.unique(indices).tolist():
            if index >= 0 and self.groups[index].kind in kinds:
                result |= indices == index
        return result

    def sum_of(self, child: Tensor, ids: Tensor) -> None:
        """Notes which channels the newest group sums, pair by pair, whatever its edges say."""
        self._members[len(self.groups) - 1] = child * _BASE + self.root(ids)

    def is_parent(self, ids: Tensor, of: Tensor) -> Tensor:
        """Tells for each pair whether the first is a parent of the second, of kind "reduce"."""
        result = torch.zeros(ids.shape, dtype=torch.bool)
        indices = self.group_index(of)
        for index in torch.unique(indices).tolist():
            group = self.groups[index]
            if index < 0 or group.kind != "reduce":
                continue
            if index not in self._members:
                members = [edges.child * _BASE + self.root(edges.parent) for edges in group.edges]
                self._members[index] = torch.cat(members)
            mask = indices == index
            keys = (of[mask] - group.first) * _BASE + self.root(ids[mask])
            result[mask] = torch.isin(keys, self._members[index])
        return result
