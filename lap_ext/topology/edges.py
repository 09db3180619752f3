# SPDX-License-Identifier: MIT
"""Finds the edges between layers, one hop through the channel graph, for people and for tests.

Which layers an edge joins is found with sets of channels. The pairs of channels are found when an
edge is first asked for them: a token mixer has one for each channel and position. Scores do not
need edges, because propagate.py passes over the full graph at once; a test checks that both agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology.channels import Trail
from lap_ext.topology.roles import Role
from lap_ext.topology.value import merged
from lap_ext.topology.walks import End, Walk, Walker, together

_Key = tuple[str, str]  # name and kind of an edge


class Pairs(NamedTuple):
    """The channels that an edge joins, pair by pair; the scale is None where all are 1."""

    here: Tensor
    there: Tensor
    scale: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class Edge:
    """A neighbor of a layer and how their channels correspond.

    Attributes:
        name: the neighbor's layer name; "input", "output" or the operation where a trace stopped.
        kind: "layer", "input", "output", "boundary" or "coupled" (q and k of an attention).
        via: the operations along the path, each listed once; where paths meet, those of all
            paths.
        find: finds the pairs of channels; called once, when they are first read.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3))
        >>> (edge,) = lap_ext.trace(net, torch.ones(1, 4)).layers["0"].next
        >>> edge, edge.channel_map, edge.here.tolist(), edge.there.tolist()
        (Edge(layer '2'), 'same', [0, 1], [0, 1])
    """

    name: str
    kind: str
    via: Trail
    find: Callable[[], Pairs]

    def __repr__(self) -> str:
        return f"Edge({self.kind} {self.name!r})"

    @cached_property
    def _pairs(self) -> Pairs:
        return self.find()

    @property
    def here(self) -> Tensor:
        """This layer's channel in each pair, int64 [n].

        It is counted in the full weight where roles use parts of it.
        """
        return self._pairs.here

    @property
    def there(self) -> Tensor:
        """The neighbor's channel in each pair, int64 [n]."""
        return self._pairs.there

    @property
    def scale(self) -> Tensor | None:
        """The factor along the path for each pair, float64 [n]; None means ones.

        It comes from batch norms, norm weights and layer scales, as they are when pairs are first
        read; where a mean gives squared weights, it is their root.
        """
        return self._pairs.scale

    @property
    def how(self) -> str:
        """The channel map in parentheses, to follow a name; empty if one-to-one or all-to-all."""
        return "" if self.channel_map in ("same", "all") else f" ({self.channel_map})"

    @property
    def channel_map(self) -> str:
        """The channel map in short: "same", "offset +64", "repeat 4", "permuted", ..."""
        if self.kind in ("input", "output", "boundary"):
            return "all"
        here, there = self.here, self.there
        if torch.equal(here, there):
            return "same"
        shift = there - here
        if bool((shift == shift[0]).all()):
            return f"offset {int(shift[0]):+d}"
        for one, many in ((there, here), (here, there)):
            times = many.numel() // max(1, _different(one))
            if times > 1 and torch.equal(one, (many - many.min()) // times + one.min()):
                return f"repeat {times}"
        n = here.numel()
        unique = _different(here) == _different(there) == n
        return "permuted" if unique else f"{n} pairs"


class _Neighborhood:
    """The edges of one side of a role; all their pairs are found at once, when one is needed."""

    def __init__(self, start: Walk, follow: Callable[[Walk], Iterable[End]]) -> None:
        self._start, self._follow = start, follow

    def edges(self) -> list[Edge]:
        """Finds the edges, one a neighbor and kind, whatever groups their channels are of."""
        found = _by_key(self._follow(Walk.of_set(self._start.reached, self._start.via)))
        return [
            Edge(*key, merged(*(walk.via for walk in walks)), partial(self._pairs_of, key))
            for key, walks in found.items()
        ]

    def _pairs_of(self, key: _Key) -> Pairs:
        return self._pairs[key]

    @cached_property
    def _pairs(self) -> dict[_Key, Pairs]:
        found = _by_key(self._follow(self._start))
        return {key: _joined(walks) for key, walks in found.items()}


def _different(channels: Tensor) -> int:
    """Counts the channels, each once."""
    return int(torch.bincount(channels).count_nonzero())


def producers(walker: Walker, roles: Iterable[Role]) -> list[Edge]:
    """Finds the edges to what feeds each role, in the order of the network."""
    result = []
    for role in roles:
        channel, ids = role.inputs
        start = Walk.of_pairs(channel + role.part.first[0], ids, role.trail)
        result += _Neighborhood(start, lambda walk: reversed(list(walker.up(walk)))).edges()
    return result


def consumers(walker: Walker, roles: Iterable[Role]) -> list[Edge]:
    """Finds the edges to what reads each role, in the order of the network."""
    result = []
    for role in roles:
        here = torch.arange(role.out.size) + role.part.first[1]
        result += _Neighborhood(Walk.of_pairs(here, role.out.ids), walker.down).edges()
    return result


def _by_key(ends: Iterable[End]) -> dict[_Key, list[Walk]]:
    """Gathers the walks to each end."""
    walks: dict[_Key, list[Walk]] = {}
    for end in ends:
        walks.setdefault((end.name, end.kind), []).append(end.walk)
    return walks


def _joined(walks: Sequence[Walk]) -> Pairs:
    """Makes the pairs of an edge of those of its walks."""
    walk = together(walks)
    assert walk.factor is not None
    plain = bool((walk.factor == 1).all())
    return Pairs(walk.here, walk.reached, None if plain else exact_sqrt(walk.factor))
