# SPDX-License-Identifier: MIT
"""All channels of a network, numbered from 1, and from which channels each one is made.

A space is a run of channels that were born together: the outputs of a weighted layer, the model's
input, or the result of an operation that joins, scales or reduces channels. Arcs lead from each
channel of a made space to its parents, with the factor on the way:

    energy of a channel = sum over arcs of weight * scale^2 * energy of the parent

Parents are numbered before their children, so one sweep up or down the list settles everything;
a loop can only close through a weighted layer, where one hop ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lap_ext.topology.static import Scale

Trail = tuple[str, ...]
_BASE = 1 << 40  # more than there are labels: (child, label) is one int64 key


@dataclass(frozen=True)
class Arcs:
    """Children and parents, pair by pair, and the factor between them."""

    child: Tensor  # int64 [n], place within the space
    parent: Tensor  # int64 [n], label
    trail: Trail = ()  # operations passed between them
    scale: Scale | None = None
    entry: Tensor | None = None  # int64 [n]: entry of the flattened scale
    weight: Tensor | None = None  # float64 [n]; None: 1

    def squared(
        self, tensors: Mapping[str, Tensor], known: dict[int, Any], batch_norm: bool = True
    ) -> Tensor | None:
        """Weight * scale^2 of each arc, float64 [n]; None: ones.

        Args:
            tensors: the model's parameters and buffers by name.
            known: static values that have been computed in this pass.
            batch_norm: whether batch norms count.
        """
        if self.scale is None or self.entry is None:
            return self.weight
        if self.scale.kind == "batch_norm" and not batch_norm:
            return self.weight
        factor = self.scale.value(tensors, known)[self.entry].square()
        return factor if self.weight is None else factor * self.weight


@dataclass(frozen=True)
class Space:
    """Channels first, first + 1, ... of one origin.

    kind: role (a weighted layer's output), input, boundary, zero (padded), batch_norm, scale,
    number (a scalar multiple), position (times a constant that changes with the position), softmax,
    join, reduce, state (of a recurrent layer), routed (of experts that data chooses).
    """

    first: int
    size: int
    kind: str
    name: str  # of the layer, the input or the operation
    arcs: list[Arcs] = field(default_factory=list)

    @property
    def labels(self) -> Tensor:
        """Its channels, int64 [size]."""
        return torch.arange(self.first, self.first + self.size)


class Channels:
    """The spaces in order of birth."""

    def __init__(self) -> None:
        self.size = 1  # label 0 is no channel
        self.spaces: list[Space] = []
        self._roots = torch.zeros(1024, dtype=torch.int64)  # of each label; doubled when full
        self._places = torch.full((1024,), -1, dtype=torch.int64)
        self._members: dict[int, Tensor] = {}  # place of a "reduce" space -> keys of its arcs

    def add(
        self,
        size: int,
        kind: str,
        name: str,
        arcs: list[Arcs] | None = None,
        roots: Tensor | None = None,
    ) -> Space:
        """A new space; roots: the channels that these are multiples of by a number."""
        space = Space(self.size, size, kind, name, arcs or [])
        end = self.size + size
        while end > self._roots.numel():
            self._roots = torch.cat([self._roots, torch.zeros_like(self._roots)])
            self._places = torch.cat([self._places, torch.full_like(self._places, -1)])
        self._roots[self.size : end] = space.labels if roots is None else roots
        self._places[self.size : end] = len(self.spaces)
        self.spaces.append(space)
        self.size = end
        return space

    def zero(self) -> int:
        """The channel that is always zero."""
        for space in self.spaces:
            if space.kind == "zero":
                return space.first
        return self.add(1, "zero", "zero").first

    def root(self, labels: Tensor) -> Tensor:
        """The channel that each one is a multiple of by a number: itself for most."""
        return self._roots[labels]

    def place(self, labels: Tensor) -> Tensor:
        """The place in spaces of each label; -1 for label 0."""
        return self._places[labels]

    def of_kind(self, labels: Tensor, *kinds: str) -> Tensor:
        """Whether each label was born in a space of one of these kinds."""
        places = self.place(labels)
        result = torch.zeros(labels.shape, dtype=torch.bool)
        for place in torch.unique(places).tolist():
            if place >= 0 and self.spaces[place].kind in kinds:
                result |= places == place
        return result

    def sum_of(self, child: Tensor, labels: Tensor) -> None:
        """The space born last sums these channels, pair by pair, though its arcs are to others."""
        self._members[len(self.spaces) - 1] = child * _BASE + self.root(labels)

    def is_parent(self, labels: Tensor, of: Tensor) -> Tensor:
        """Pair by pair, whether a label is among the parents of a channel of kind "reduce"."""
        result = torch.zeros(labels.shape, dtype=torch.bool)
        places = self.place(of)
        for place in torch.unique(places).tolist():
            space = self.spaces[place]
            if place < 0 or space.kind != "reduce":
                continue
            if place not in self._members:
                keys = [arcs.child * _BASE + self.root(arcs.parent) for arcs in space.arcs]
                self._members[place] = torch.cat(keys)
            here = places == place
            keys_here = (of[here] - space.first) * _BASE + self.root(labels[here])
            result[here] = torch.isin(keys_here, self._members[place])
        return result
