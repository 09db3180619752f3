# SPDX-License-Identifier: MIT
"""Computes how many weights are kept, with a smallest number for each layer (min_keep).

    floor = min(n, min_keep)         min_keep: an integer, weights of each layer
    floor = ceil(min_keep * n)       min_keep: a float in [0, 1], a fraction of each layer

n is the number of weights of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lap_ext.allocation.layerwise import Allocation, Shapes, er, total, uniform, uniform_plus
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.options import MinKeep


def floors(min_keep: MinKeep, sizes: Mapping[str, int]) -> dict[str, int]:
    """Computes the floor of each layer from its size; None is a floor of 0.

    Example:
        >>> sizes = {"fc1": 100, "fc2": 7}
        >>> floors(10, sizes), floors(0.5, sizes), floors(None, sizes)
        ({'fc1': 10, 'fc2': 7}, {'fc1': 50, 'fc2': 4}, {'fc1': 0, 'fc2': 0})
    """
    _check(min_keep)
    if isinstance(min_keep, float):
        fraction = Fraction(repr(min_keep))  # of its digits: 0.1 is a tenth
        return {name: math.ceil(fraction * n) for name, n in sizes.items()}
    return {name: min(n, min_keep or 0) for name, n in sizes.items()}


def rank_with_floors(
    names: Sequence[str],
    keep: int,
    floors: Mapping[str, int],
    rank: Callable[[Sequence[str], int], Mapping[str, int]],
) -> None:
    """Ranks layers together so that each keeps its floor; the others share the rest.

    A layer that a ranking leaves with less than its floor is ranked by itself, to its floor.

    Args:
        names: of the layers.
        keep: weights that all keep together.
        floors: of each layer.
        rank: ranks some layers together to a number of weights, and returns how many each keeps;
            its last call counts.
    """
    left = list(names)
    while left:
        kept = rank(left, keep)
        short = [name for name in left if kept[name] < floors[name]]
        if not short:
            return
        for name in short:
            keep -= rank([name], floors[name])[name]
        left = [name for name in left if name not in short]


@dataclass(frozen=True)
class Budget:
    """How many weights are kept.

    Attributes:
        keeps: by each layer that is ranked by itself, at least its floor.
        total: by all layers that are ranked together.
        floors: by each layer at least.
    """

    keeps: dict[str, int]
    total: int
    floors: dict[str, int]


def budget(
    allocation: Allocation, shapes: Shapes, min_keep: MinKeep, without: Collection[str] = ()
) -> Budget:
    """Allocates to all layers, then leaves some out.

    Args:
        allocation: of the sparsity.
        shapes: of all layers that it may name.
        min_keep: the floor of each layer.
        without: names of layers that are not pruned after all.

    Example:
        >>> shapes = {"fc1": (3, 4), "fc2": (4, 2)}
        >>> budget(uniform(0.75), shapes, 4)
        Budget(keeps={'fc1': 4, 'fc2': 4}, total=5, floors={'fc1': 4, 'fc2': 4})
    """
    left = {name: shape for name, shape in shapes.items() if name not in without}
    every = allocation.keeps(shapes)  # names that it does not know are an error
    if isinstance(allocation, (er, uniform_plus)):  # shares of what is left
        every = allocation.keeps(left)
    keeps = {name: every[name] for name in left if name in every}
    least = floors(min_keep, {name: math.prod(left[name]) for name in keeps})
    # a number is a fraction of the layers that are left
    together = total(allocation, left) if isinstance(allocation, uniform) else sum(keeps.values())
    return Budget({name: max(n, least[name]) for name, n in keeps.items()}, together, least)


def check_floors(floors: Mapping[str, int], keep: int) -> None:
    """Raises unless keep weights in all layers together suffice for the floors."""
    needed = sum(floors.values())
    if needed > keep:
        raise LapValueError(
            f"a {{argument}} that the sparsity leaves room for (it keeps {keep:,} weights)",
            f"one that needs {needed:,} in {len(floors)} layers",
            "Lower one of them.",
            argument="min_keep",
        )


def _check(min_keep: object) -> None:
    """Checks that min_keep is None, a count or a fraction."""
    if min_keep is None:
        return
    expected = "{argument} to be a number of weights (an integer) or a fraction (a float)"
    if isinstance(min_keep, bool) or not isinstance(min_keep, (int, float)):
        raise LapTypeError(expected, type(min_keep).__name__, argument="min_keep")
    if isinstance(min_keep, float) and not 0 <= min_keep <= 1:
        raise LapValueError("0 <= {argument} <= 1 for a fraction", min_keep, argument="min_keep")
    if min_keep < 0:
        raise LapValueError("{argument} >= 0", min_keep, argument="min_keep")
