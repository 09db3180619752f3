# SPDX-License-Identifier: MIT
"""Chooses which units across layers go: pools of units, budgets, floors and multiples.

A pool is what is ranked and counted together: the groups of a family, where one of each class goes
at a time; with uniform=True, those of all families of a kind, so that these stay equal. A pool's
units are ordered from the one of least worth: the k-th of the classes go together.

    fraction       each pool, or all together, keeps floor((1 - sparsity) n + 1/2) units
    cost           the cost of the units that are kept is at most (1 - sparsity) of all cost
    flops, params  units go one after the other until the model has at most so many

Units that cost something are ordered by worth^2 / cost; the values of normalize="lamp" are squares
already. With scope="layer", the order of units in a budget of a model is that of their ranks in
their pools (the first tenth of each goes first); with scope="global", that of their worth.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.ops.check import keep_count
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.options import MinKeep
from lap_ext.pruning import normalization
from lap_ext.pruning.plan import Options
from lap_ext.pruning.unit_worth import Worth
from lap_ext.topology.coupling import CoupledGroups, Family


@dataclass(frozen=True, eq=False)
class Pool:
    """Units that are counted together, from the one of least worth.

    Attributes:
        name: of its first family.
        layers: that make its channels.
        units: the groups of each unit, int64 [n, groups of a unit].
        worth: of each unit, float64 [n], normalized.
        squared: whether these are squares.
        alive: which are not removed yet, bool [n]; those that are come first.
        floor: how many `min_keep` asks for.
        least: how many are kept at least: the first number from the floor on that fits.
        fits: how many may be kept, bool [n + 1].
    """

    name: str
    layers: tuple[str, ...]
    units: Tensor
    worth: Tensor
    squared: bool
    alive: Tensor
    floor: int
    least: int
    fits: Tensor

    @property
    def size(self) -> int:
        """The number of units."""
        return self.units.shape[0]

    def rounded(self, keep: int) -> int:
        """Returns the largest number up to keep that fits and is not below the floor."""
        fitting = self.fits[: keep + 1].nonzero().flatten()
        return int(fitting[-1]) if fitting.numel() and int(fitting[-1]) >= self.least else keep


def pools_of(
    groups: CoupledGroups, measured: Worth, options: Options, cost: Tensor | None = None
) -> list[Pool]:
    """Makes the pools of all families; cost: of each group, float64 [n]; None: each counts as 1."""
    kinds: dict[object, list[tuple[Family, Tensor]]] = {}
    for family in groups.families:
        units = _bundled(family, measured, cost)
        key: object = family.name
        if options.uniform:
            key = (tuple(re.sub(r"\d+", "*", x) for x in family.layers), *units.shape)
        kinds.setdefault(key, []).append((family, units))
    return [_pool(groups, members, measured, options) for members in kinds.values()]


def _pool(
    groups: CoupledGroups,
    members: Sequence[tuple[Family, Tensor]],
    measured: Worth,
    options: Options,
) -> Pool:
    """Makes a pool of families with their units."""
    units = torch.cat([own for _, own in members], 1)
    worth, alive = _joined(measured, units, options)
    if not bool(alive.any()):  # layers that are all zero
        alive = torch.ones_like(alive)
    worth = normalization.normalized(worth.unsqueeze(0), options.normalize, alive.unsqueeze(0))
    fits = torch.ones(units.shape[0] + 1, dtype=torch.bool)
    for _, own in members:
        fits &= _fitting(groups, own, options.multiple_of)
    more = f" and {len(members) - 1} like it" if len(members) > 1 else ""
    layers = tuple(x for family, _ in members for x in family.layers)
    floor = floor_of(options.min_keep, units.shape[0])
    return Pool(
        members[0][0].name + more,
        layers,
        units,
        worth[0],
        options.normalize == "lamp",
        alive,
        floor,
        floor + int(fits[floor:].nonzero()[0]),
        fits,
    )


def floor_of(min_keep: MinKeep, count: int) -> int:
    """Returns how many of so many units are kept at least; by default, one.

    Example:
        >>> floor_of(None, 8), floor_of(3, 8), floor_of(0.3, 8), floor_of(0, 8), floor_of(9, 8)
        (1, 3, 3, 0, 8)
    """
    if min_keep is None:
        return min(1, count)
    if isinstance(min_keep, float):
        return math.ceil(Fraction(repr(min_keep)) * count)
    return min(min_keep, count)


def _bundled(family: Family, measured: Worth, cost: Tensor | None) -> Tensor:
    """Orders the groups of each class from the one of least worth, side by side, [n, classes].

    Of equal worth, the one with the higher number goes first; removed ones come before all.
    """
    worth = measured.worth if cost is None else _per(measured.worth.square(), cost)
    columns = []
    for kind in torch.unique(family.classes).tolist():
        own = family.groups[family.classes == kind].flip(0)
        own = own[torch.argsort(worth[own], stable=True)]
        columns.append(own[torch.argsort(measured.alive[own].to(torch.uint8), stable=True)])
    size = min((x.numel() for x in columns), default=0)
    if not columns:
        return torch.zeros(0, 1, dtype=torch.int64)
    return torch.stack([x[:size] for x in columns], 1)


def _per(squares: Tensor, cost: Tensor) -> Tensor:
    return squares / cost.clamp(min=1e-300)


def density(pool: Pool, cost: Tensor) -> Tensor:
    """Returns worth^2 / cost of each unit; cost: of each group."""
    squares = pool.worth if pool.squared else pool.worth.square()
    return _per(squares, cost[pool.units].sum(1))


def _joined(measured: Worth, units: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns the worth of units of several groups, and which are not removed."""
    worth, alive = measured.worth[units], measured.alive[units].any(1)
    if units.shape[1] == 1:
        return worth[:, 0], alive
    if options.aggregate == "mean":
        return worth.mean(1), alive
    return exact_sqrt(worth.square().sum(1)), alive


def _fitting(groups: CoupledGroups, units: Tensor, multiple_of: int) -> Tensor:
    """Marks the numbers of units that leave a multiple of so many channels, or all."""
    count = units.shape[0]
    keeps = torch.arange(count + 1)
    if multiple_of == 1 or not count:
        return torch.ones(count + 1, dtype=torch.bool)
    width, size = (1, count)
    if groups.structure in ("channel", "unit"):
        width, size = _narrowest(groups, units[0])
    fits = (size - (count - keeps) * width) % multiple_of == 0
    fits[count] = True
    return fits


def _narrowest(groups: CoupledGroups, unit: Tensor) -> tuple[int, int]:
    """Returns the smallest share that a unit has of a layer's channels, and that layer's size.

    Of packed experts, those of one expert count.
    """
    found = []
    for x in groups.weights:
        experts = x.groups if groups.packed(x) else 1
        for side in (x.rows, x.cols.flatten()):
            own = int(torch.isin(side, unit).count_nonzero())
            if own:
                found.append((own // experts, side.numel() // experts))
    return min(found)


@dataclass(eq=False)
class Choice:
    """How many units of each pool are kept, while some go."""

    pools: list[Pool]
    keeps: list[int]

    @classmethod
    def of(cls, pools: list[Pool]) -> Choice:
        """Begins with all units that are not removed."""
        return cls(pools, [max(int(pool.alive.count_nonzero()), pool.least) for pool in pools])

    def removed(self, count: int) -> Tensor:
        """Marks the groups that go, bool [count]."""
        result = torch.zeros(count, dtype=torch.bool)
        for pool, keep in zip(self.pools, self.keeps, strict=True):
            result[pool.units[: pool.size - keep].flatten()] = True
        return result

    def round(self) -> None:
        """Rounds all numbers down to multiples."""
        pairs = zip(self.pools, self.keeps, strict=True)
        self.keeps = [pool.rounded(keep) for pool, keep in pairs]

    def order(self, key: Callable[[Pool], Tensor]) -> tuple[list[int], list[Tensor]]:
        """Lists what can go, lowest key first, as (indices of pools, groups of the units)."""
        keys, owners = [torch.zeros(0).double()], [torch.zeros(0, dtype=torch.int64)]
        for index, pool in reversed(list(enumerate(self.pools))):  # of equal keys, the later pool
            gone, keep = pool.size - self.keeps[index], self.keeps[index]
            last = pool.size - min(pool.least, keep)
            keys.append(torch.cummax(key(pool)[gone:last], 0).values)  # in the order of the pool
            owners.append(torch.full((last - gone,), index))
        ordered = torch.cat(owners)[torch.argsort(torch.cat(keys), stable=True)].tolist()
        at = [pool.size - keep for pool, keep in zip(self.pools, self.keeps, strict=True)]
        units = []
        for owner in ordered:
            units.append(self.pools[owner].units[at[owner]])
            at[owner] += 1
        return ordered, units

    def remove(self, owners: Iterable[int]) -> None:
        """Removes the next unit of each of some pools."""
        for owner in owners:
            self.keeps[owner] -= 1


def by_rank(pool: Pool) -> Tensor:
    """Returns the place of each unit in its pool, in (0, 1)."""
    return (torch.arange(pool.size, dtype=torch.float64) + 0.5) / max(1, pool.size)


def kept_of(sparsity: Fraction, count: int) -> int:
    """Returns how many of so many units a sparsity keeps."""
    return keep_count(sparsity, None, count)


def choose_fraction(choice: Choice, sparsities: Mapping[str, Fraction], together: bool) -> None:
    """Keeps a fraction of each pool, or of all together; sparsities: pool -> fraction to remove."""
    if not together:
        for index, pool in enumerate(choice.pools):
            keep = max(kept_of(sparsities[pool.name], pool.size), pool.least)
            choice.keeps[index] = min(keep, choice.keeps[index])
        return
    total = sum(pool.size for pool in choice.pools)
    keep = kept_of(next(iter(sparsities.values())), total)
    floor = sum(pool.floor for pool in choice.pools)
    if keep < floor and any(pool.floor > 1 for pool in choice.pools):
        raise LapValueError(
            f"a {{argument}} that keeps {floor} units at least, as {{min_keep=}} asks for",
            f"one that keeps {keep} of {total}",
            argument="sparsity",
        )
    owners, _ = choice.order(lambda pool: pool.worth)
    choice.remove(owners[: max(0, sum(choice.keeps) - keep)])


def choose_cost(
    choice: Choice, sparsities: Mapping[str, Fraction], cost: Tensor, together: bool
) -> None:
    """Removes units of least worth per cost until what is left costs (1 - sparsity) at most.

    Args:
        choice: of units.
        sparsities: pool -> the fraction of its cost to remove.
        cost: of each group, float64 [n].
        together: whether all pools are one ranking; their fractions are equal.
    """

    def of(pool: Pool) -> Fraction:
        return Fraction(float(cost[pool.units].sum()))

    parts = [choice]
    if not together:
        pairs = zip(choice.pools, choice.keeps, strict=True)
        parts = [Choice([pool], [keep]) for pool, keep in pairs]
    for part in parts:
        share = 1 - sparsities[part.pools[0].name]
        every = sum(of(pool) for pool in part.pools)
        left = every - Fraction(float(cost[part.removed(cost.numel())].sum()))
        owners, units = part.order(partial(density, cost=cost))
        for owner, unit in zip(owners, units, strict=True):
            if left <= share * every:
                break
            part.remove([owner])
            left -= Fraction(float(cost[unit].sum()))
    if not together:
        choice.keeps = [part.keeps[0] for part in parts]


def choose_count(
    choice: Choice,
    limit: int,
    key: Callable[[Pool], Tensor],
    left_without: Callable[[Tensor], int],
    what: str,
) -> None:
    """Removes as few units as possible until a count of the whole model is at most a limit.

    Args:
        choice: of units.
        limit: the largest count that is allowed.
        key: the order of units.
        left_without: counts what is left without some more groups.
        what: is counted, in errors.
    """
    owners, units = choice.order(key)
    none = torch.zeros(0, dtype=torch.int64)

    def left(count: int) -> int:
        return left_without(torch.cat([none, *units[:count]]))

    if left(len(units)) > limit:
        raise LapValueError(
            f"a {{argument}} of at least {left(len(units)):,} {what}, which are left when each "
            "layer has only the units that it keeps at least",
            f"{limit:,}",
            "Raise it, or lower {min_keep=}.",
            argument="sparsity",
        )
    choice.remove(owners[: bisect_left(range(len(units)), True, key=lambda n: left(n) <= limit)])
