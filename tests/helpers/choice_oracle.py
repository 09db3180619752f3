# SPDX-License-Identifier: MIT
"""Which units across layers go, by plain sorting: the definition of budgets, floors and ties."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

Fits = Callable[[int], bool]


class Unit(NamedTuple):
    """The groups of a unit, what it is worth among all, and what it costs."""

    groups: tuple[int, ...]
    worth: float
    cost: float = 1.0


class Pool(NamedTuple):
    """Units that are counted together, from the one that goes first, and how many stay at least."""

    name: str
    units: list[Unit]
    least: int


def pool_of(
    families: Sequence[Any],
    worth: Sequence[float],
    *,
    least: Callable[[int], int] = lambda n: min(1, n),
    mean: bool = False,
    cost: Sequence[float] | None = None,
) -> Pool:
    """The pool of families that lose the same number each; usually of one family."""
    columns: list[list[int]] = []
    for family in families:
        pairs = list(zip(family.groups.tolist(), family.classes.tolist(), strict=True))
        for kind in sorted({k for _, k in pairs}):
            own = [number for number, k in pairs if k == kind]

            def key(number: int) -> tuple[float, int]:
                each = 1.0 if cost is None else cost[number]
                return worth[number] ** (1 if cost is None else 2) / each, -number

            columns.append(sorted(own, key=key))
    units = []
    for groups in zip(*columns, strict=False):
        values = [worth[g] for g in groups]
        joined = math.sqrt(math.fsum(x * x for x in values))
        joined = values[0] if len(values) == 1 else joined
        joined = math.fsum(values) / len(values) if mean else joined
        units.append(Unit(groups, joined, 1.0 if cost is None else sum(cost[g] for g in groups)))
    return Pool(families[0].name, units, least(len(units)))


def normalized(pool: Pool, how: str) -> Pool:
    """The pool with the worths that a ranking of several pools compares."""
    if how == "none":
        return pool
    squares = [x.worth**2 for x in pool.units]
    if how == "norm":
        size = math.sqrt(math.fsum(squares))
        worths = [x.worth / size for x in pool.units]
    else:
        worths = [x / math.fsum(y for y in squares if y >= x) for x in squares]
    units = [x._replace(worth=own) for x, own in zip(pool.units, worths, strict=True)]
    return pool._replace(units=units)


def kept_of(sparsity: float, count: int) -> int:
    """How many of so many a sparsity keeps."""
    return math.floor((1 - Fraction(sparsity)) * count + Fraction(1, 2))


def by_layer(pools: Sequence[Pool], sparsities: Mapping[str, float]) -> set[int]:
    """The groups that go if each pool keeps its own fraction."""
    gone = set()
    for pool in pools:
        keep = max(kept_of(sparsities[pool.name], len(pool.units)), pool.least)
        gone |= {g for unit in pool.units[: len(pool.units) - keep] for g in unit.groups}
    return gone


def order(pools: Sequence[Pool], key: Callable[[Unit], float]) -> list[Unit]:
    """All units that may go, the one that goes first first; of equal ones, that of a later pool."""
    every = []
    for index, pool in enumerate(pools):
        highest = -math.inf
        for place, unit in enumerate(pool.units[: len(pool.units) - pool.least]):
            highest = max(highest, key(unit))
            every.append((highest, -index, place, unit))
    return [unit for *_, unit in sorted(every, key=lambda x: x[:3])]


def together(pools: Sequence[Pool], sparsity: float) -> set[int]:
    """The groups that go in one ranking of all pools."""
    count = sum(len(pool.units) for pool in pools)
    going = order(pools, lambda unit: unit.worth)[: count - kept_of(sparsity, count)]
    return {g for unit in going for g in unit.groups}


def until(units: Sequence[Unit], enough: Callable[[set[int]], bool]) -> set[int]:
    """The groups of the first units until that is enough."""
    gone = set[int]()
    for unit in units:
        if enough(gone):
            break
        gone |= set(unit.groups)
    return gone
