# SPDX-License-Identifier: MIT
"""_Measures units of a traced model's weights by what their linear neighborhoods lose with them.

    worth^2 = sum over the roles of the weight of ||W_next (W * unit) W_prev||_F^2

The neighbors are those whose norms are in the scores, with the same factors along the paths, and
with their signs: the squared rows of W_prev are in_norm^2, the squared columns of W_next out_norm^2
(topology/propagate.py). Masks of the place count: weights that they prune are 0 in neighbors, too.

    lookahead      W_prev and W_next
    lookback       W_prev; W_next is an identity
    lookforward    W_next; W_prev is an identity
    magnitude      two identities: the root of the sum of squares

Inputs and outputs of the network are identities. A channel that meets several channels of a
neighbor (across a flatten, in grouped attention) does so at several positions or heads, which add
their squares. Otherwise all channels of a neighbor meet, also those of different heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from lap_ext.criteria.base import Criterion
from lap_ext.criteria.context import Network, scaled
from lap_ext.criteria.weights import Lookahead, Lookback, Lookforward
from lap_ext.errors import LapValueError, in_layer
from lap_ext.ops import check
from lap_ext.ops.exact import block_distortions, channel_distortions, group_distortions
from lap_ext.ops.factors import (
    Factor,
    by_channel,
    factors_of_pairs,
    neighbor_matrices,
    unit_factor,
)
from lap_ext.ops.reference.common import exact_sqrt, require_finite
from lap_ext.ops.reference.scale import times_power
from lap_ext.structures import Grid, Matrix
from lap_ext.topology import Layer
from lap_ext.topology.roles import Part, Role
from lap_ext.topology.walks import End, Walk, Walker, together

# Whether a criterion counts (producers, consumers).
_COUNTED: dict[type[Criterion], tuple[bool, bool]] = {
    Criterion: (False, False),
    Lookback: (True, False),
    Lookforward: (False, True),
    Lookahead: (True, True),
}

_Side: TypeAlias = list[Factor] | None  # None: an identity
_Sides: TypeAlias = tuple[_Side, _Side]  # (producers, consumers) of a role
_Measure: TypeAlias = Callable[[Tensor, Role, _Sides, Tensor | None], Tensor]


def worths(
    network: Network,
    criterion: Criterion,
    layer: Layer,
    weight: Tensor,
    units: Grid | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes the worth of every unit of a layer, ||W_next (W * unit) W_prev||_F.

    Args:
        network: the layers, their place and how batch norms count.
        criterion: lookahead, lookback, lookforward or magnitude.
        layer: the layer.
        weight: its weights, in its shape.
        units: blocks of the weight, or the number of each weight's group, int64, flat.
        mask: bool, like weight; weights marked False count as 0.

    Returns:
        Worths, float64: in the grid's shape, or one for each number up to the largest.

    Raises:
        ValueError: the criterion defines no neighborhood, the neighbors do not fit into the memory
            of the place, a weight of theirs is not finite, or squares leave float64's range.
    """
    roles: Sequence[Role] = layer.roles
    if not any(counted(criterion)):  # once, however often it is used
        one = roles[0]
        roles = [replace(one, part=replace(one.part, rows=None, cols=None))]

    def measure(weight: Tensor, role: Role, sides: _Sides, mask: Tensor | None) -> Tensor:
        return _measured(weight, units, role.part, sides, mask)

    return _summed(network, criterion, layer, weight, mask, roles, measure)


def channel_worths(
    network: Network,
    criterion: Criterion,
    layer: Layer,
    weight: Tensor,
    numbers: Mapping[Role, Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """Computes the worth of groups of whole output channels of a layer.

    Args:
        network: the layers, their place and how batch norms count.
        criterion: lookahead, lookback, lookforward or magnitude.
        layer: the layer.
        weight: its weights, in its shape.
        numbers: the number of each output channel's group, int64, -1 for none; for each role that
            counts, one at least.
        mask: bool, like weight; weights marked False count as 0.

    Returns:
        Worths, float64, one for each number up to the largest.

    Raises:
        ValueError: as for `worths`.
    """
    count = max(map(_count, numbers.values()))

    def measure(weight: Tensor, role: Role, sides: _Sides, mask: Tensor | None) -> Tensor:
        part = role.part
        block, mask = part.of(weight), None if mask is None else part.of(mask)
        matrix = Matrix(tuple(block.shape), part.groups, part.transposed)
        found = channel_distortions(block, numbers[role], matrix, *sides, mask)
        return torch.cat([found, found.new_zeros(count - len(found))])

    return _summed(network, criterion, layer, weight, mask, list(numbers), measure)


def _summed(
    network: Network,
    criterion: Criterion,
    layer: Layer,
    weight: Tensor,
    mask: Tensor | None,
    roles: Sequence[Role],
    measure: _Measure,
) -> Tensor:
    """Computes the root of the sum over roles of the squares of what is measured of each."""
    counts, weight = any(counted(criterion)), weight.detach()
    if not network.place.held:  # what it has given is valid until the neighbors are read
        weight, mask = weight.clone(), None if mask is None else mask.clone()
    with in_layer(layer.name):
        if network.check_finite:
            require_finite(weight, "w")
        exponent = 0
        if weight.dtype == torch.float64 and weight.numel():  # its squares may leave the range
            exponent = math.frexp(float(weight.abs().max()))[1]
            weight = times_power(weight, -exponent)
        squared: Tensor | None = None
        for role in roles:
            sides = neighborhood(network, criterion, role) if counts else (None, None)
            worth = measure(weight, role, _moved(sides, weight.device), mask).square()
            squared = worth if squared is None else squared + worth
        assert squared is not None  # there is a role
        found = times_power(exact_sqrt(squared), exponent)
        if network.check_finite and not bool(found.isfinite().all()):
            raise check.lost_norm("w")
        return found


def neighborhood(network: Network, criterion: Criterion, role: Role) -> _Sides:
    """Finds the (producers, consumers) of a role, over the channels of its part of the weight.

    None stands for an identity.

    Args:
        network: the layers, their place and how batch norms count.
        criterion: lookahead, lookback, lookforward or magnitude.
        role: one use of a weight.

    Raises:
        ValueError: as for `worths`.
    """
    before, after = counted(criterion)
    if role.layer in network.topology.neighbors:
        into, out = _named(network, role)
        return into if before else None, out if after else None
    found = _Neighborhood(network, role)
    return found.producers() if before else None, found.consumers() if after else None


def counted(criterion: Criterion) -> tuple[bool, bool]:
    """Says whether a criterion counts (producers, consumers)."""
    if type(criterion) in _COUNTED:
        return _COUNTED[type(criterion)]
    known = ", ".join(repr(kind.name) for kind in reversed(_COUNTED))
    raise LapValueError(
        f"{{argument}} to be one of {known} for aggregate='exact': the others define no linear "
        "neighborhood, which a unit could change",
        repr(criterion.name),
        "Pass aggregate='energy'.",
        argument="criterion",
    )


def _named(network: Network, role: Role) -> _Sides:
    """Makes the factors of neighbors that the user has named."""
    prev, following = network.topology.neighbors[role.layer]
    part, layer = role.part, network.topology.layers[role.layer]
    return neighbor_matrices(
        network.as_neighbors(prev),
        part.of(network.full(layer)),
        network.as_neighbors(following),
        part.groups,
        part.transposed,
        network.check_finite,
    )


@dataclass(frozen=True)
class _Neighborhood:
    """What feeds a role and what reads it, one hop through the channel graph."""

    network: Network
    role: Role

    @cached_property
    def walker(self) -> Walker:
        """Walks with the factors that count in the norms."""
        topology = self.network.topology
        return Walker(topology.graph, topology.tensors(), self.network.batch_norm != "ignore")

    def producers(self) -> _Side:
        """Makes the factors of what feeds the role; input channels of constants count 1."""
        channel, ids = self.role.inputs
        channels = self.role.part.channels[0]
        ends = self._ends(self.walker.up(Walk.of_pairs(channel, ids)), before=True)
        if ends is None:
            return None
        factors = self._factors(ends, channels, outputs=True)
        unfed = torch.ones(channels, dtype=torch.float64)
        unfed[channel] = 0.0
        chained = self.network.chain is not None
        return [*factors, unit_factor(unfed)] if unfed.any() and not chained else factors

    def consumers(self) -> _Side:
        """Makes the factors of what reads the role; an identity where nothing does."""
        size = self.role.out.size
        walk = Walk.of_pairs(torch.arange(size), self.role.out.ids)
        ends = self._ends(self.walker.down(walk), before=False)
        return self._factors(ends, size, outputs=False) if ends else None

    def _ends(self, ends: Iterable[End], before: bool) -> list[End] | None:
        """Gathers the walks to each end; of a chain, to the layer next in it, or None."""
        if self.network.chain is not None:
            chain = self.network.chain
            near = {b: a for a, b in pairwise(chain)} if before else dict(pairwise(chain))
            name = near.get(self.role.layer)
            ends = [end for end in ends if end.kind == "layer" and end.name == name]
            first = self.network.topology.layers[name].roles[0] if name and ends else None
            ends = [end._replace(role=first) for end in ends]
        walks: dict[tuple[str, str, Role | None], list[Walk]] = {}
        for end in ends:
            walks.setdefault((end.name, end.kind, end.role), []).append(end.walk)
        found = [
            End(name, kind, together(walks), role) for (name, kind, role), walks in walks.items()
        ]
        return found if found or self.network.chain is None else None

    def _factors(self, ends: list[End], channels: int, outputs: bool) -> list[Factor]:
        """Makes the factors of ends; outputs: those channels of the neighbors meet the role's."""
        full = dict(self._weights(end.role for end in ends))
        result = []
        for end in ends:
            here, squared = end.walk.here, end.walk.factor
            assert squared is not None
            if end.role is None:
                total = torch.zeros(channels, dtype=torch.float64).index_add_(0, here, squared)
                result.append(unit_factor(exact_sqrt(total)))
                continue
            by_output = outputs or end.kind == "coupled"
            part = end.role.part
            block = part.of(full[end.role.layer])
            fold = None if by_output else self.network.row_weight(end.role)
            if fold is not None:
                block = scaled(block, fold, end.role)
            matrix, group = by_channel(block, part.groups, by_output != part.transposed)
            there = end.walk.reached - part.first[1 if by_output else 0]
            factor = exact_sqrt(squared)
            factor = factor if end.walk.sign is None else factor * end.walk.sign
            result += factors_of_pairs(matrix, group, here, there, factor, channels)
        return result

    def _weights(self, roles: Iterable[Role | None]) -> Iterator[tuple[str, Tensor]]:
        """Reads the weights of neighbors, each once, zero where masks have pruned them."""
        network = self.network
        names = dict.fromkeys(role.layer for role in roles if role is not None)
        layers = [network.topology.layers[name] for name in names]
        self._require_room(layers)
        for layer in network.place.ordered(layers):
            weight = network.full(layer, masked=True)
            if network.check_finite:
                with in_layer(layer.name):
                    require_finite(weight, "w")
            yield layer.name, weight

    def _require_room(self, layers: list[Layer]) -> None:
        """Raises unless all neighbors of a layer fit into memory beside it."""
        place, own = self.network.place, self.network.topology.layers[self.role.layer]
        total = sum(map(place.bytes, layers)) + place.bytes(own)
        for layer in layers:
            count = max(torch.Size(layer.shape).numel(), 1)
            others = -(-(total - place.bytes(layer)) // count)
            if not place.fits(layer, others):
                raise LapValueError(
                    "room for all neighbors of a layer at once, which aggregate='exact' needs, in "
                    "{argument}",
                    f"weights of {total:,} bytes",
                    "Raise it, or pass aggregate='energy'.",
                    layer=own.name,
                    argument="memory",
                )


def _measured(
    weight: Tensor,
    units: Grid | Tensor,
    part: Part,
    sides: _Sides,
    mask: Tensor | None,
) -> Tensor:
    """Computes the worths of one role of a weight."""
    if isinstance(units, Tensor):
        return _by_numbers(weight, units, _count(units), part, sides, mask)
    matrix = Matrix(part.shape, part.groups, part.transposed)
    alike = units.matrix.shape == matrix.shape and units.matrix.groups == matrix.groups
    if not alike or not (part.full or matrix.groups == 1):
        numbers = _numbers(units).to(weight.device)
        return _by_numbers(weight, numbers, units.count, part, sides, mask).view(units.shape)
    if not part.full:  # the rest of the weight counts as 0
        inside = torch.zeros(part.shape, dtype=torch.bool, device=weight.device)
        part.of(inside).fill_(True)
        mask = inside if mask is None else inside & mask.reshape(part.shape)
        sides = _placed(sides, matrix, part)
    mask = None if mask is None else mask.reshape(part.shape)
    return block_distortions(weight.reshape(part.shape), Grid(matrix, units.block), *sides, mask)


def _by_numbers(
    weight: Tensor,
    numbers: Tensor,
    count: int,
    part: Part,
    sides: _Sides,
    mask: Tensor | None,
) -> Tensor:
    """Computes the worths of numbered groups of one role's part of a weight."""
    block, given = part.of(weight), part.of(numbers)
    matrix = Matrix(tuple(block.shape), part.groups, part.transposed)
    found = group_distortions(block, given, matrix, *sides, None if mask is None else part.of(mask))
    return torch.cat([found, found.new_zeros(count - len(found))])


def _count(numbers: Tensor) -> int:
    """Counts groups, up to the largest number."""
    return int(numbers.max()) + 1 if numbers.numel() else 0


def _numbers(grid: Grid) -> Tensor:
    """Returns the number of each weight's block, flat."""
    down, across = grid.shape
    rows = torch.arange(down).repeat_interleave(torch.tensor(grid.heights()))
    cols = torch.arange(across).repeat_interleave(torch.tensor(grid.widths()))
    return (rows[:, None] * across + cols).flatten().repeat_interleave(grid.matrix.window)


def _placed(sides: _Sides, matrix: Matrix, part: Part) -> _Sides:
    """Sees factors over a part's channels as ones over those of the full weight, with zeros."""
    rows, cols = matrix.rows, matrix.cols
    sizes = (rows, cols) if matrix.transposed else (cols, rows)
    into, out = (
        None if factors is None else [x.placed(first, size) for x in factors]
        for factors, first, size in zip(sides, part.first, sizes, strict=True)
    )
    return into, out


def _moved(sides: _Sides, device: torch.device) -> _Sides:
    """Moves factors to the device of the weight."""
    into, out = (None if side is None else [x.to(device) for x in side] for side in sides)
    return into, out
