# SPDX-License-Identifier: MIT
"""Ranks the units of weights and keeps the best ones that fit.

    energy    sqrt(sum of s^2)                          s: scores of the weights of a unit
    mean      (sum of s) / (number of its weights)

A unit counts with all of its weights. Units rank by worth; of equal ones, the one in the earlier
layer or with the lower number ranks higher. They are kept in this order as long as their weights
fit: the first that does not fit ends the ranking. A unit that is not live has no rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.ops import schema
from lap_ext.structures import Aggregate, Grid


@dataclass(frozen=True)
class Ranked:
    """The units of a weight.

    Attributes:
        worth: of each, float64 [n].
        sizes: how many weights each has, int64 [n], or one number for all.
        live: which may be kept, bool [n]; None: all.
        least: how many weights are kept at least, in full units, whatever fits.
    """

    worth: Tensor
    sizes: Tensor | int
    live: Tensor | None = None
    least: int = 0

    @property
    def count(self) -> int:
        """The number of units that may be kept."""
        return self.worth.numel() if self.live is None else int(self.live.count_nonzero())


def sizes_of(grid: Grid) -> Tensor | int:
    """Counts the weights of each unit of a grid, int64 [n], or returns the number of all."""
    (rows, cols), matrix, window = grid.block, grid.matrix, grid.matrix.window
    if grid.count and matrix.height % rows == 0 == matrix.cols % cols:
        return rows * cols * window
    sizes = torch.tensor(grid.heights()).view(-1, 1) * torch.tensor(grid.widths()).view(1, -1)
    return sizes.flatten().to(torch.int64) * window


def worth_of(sums: Tensor, sizes: Tensor | int, aggregate: Aggregate) -> Tensor:
    """Computes the worth of units from the sums of their scores, or of the squares.

    A unit that has a NaN is worth more than any number.
    """
    if aggregate == "energy":
        worth = schema.norm([sums])
    elif isinstance(sizes, Tensor):  # a group may have no weights
        worth = sums / sizes.to(sums.device).clamp(min=1)
    else:
        worth = sums / max(sizes, 1)
    return worth.nan_to_num(nan=torch.inf, posinf=torch.inf)


def best(units: Ranked, keep: int, multiple_of: int = 1) -> Tensor:
    """Marks the best units with at most keep weights, bool [n].

    Their number is a multiple of multiple_of, or that of all units (of all that are live, where
    these are fewer); it is rounded down, but for `least` up.

    Example:
        >>> units = Ranked(torch.tensor([1., 3., 2., 3.], dtype=torch.float64), 5)
        >>> best(units, 14).tolist(), best(units, 14, multiple_of=2).tolist()
        ([False, True, False, True], [False, True, False, True])
        >>> best(units, 15).tolist()
        [False, True, True, True]
    """
    if isinstance(units.sizes, int):
        size, live = max(units.sizes, 1), units.count
        count, least = min(keep // size, live), min(-(-units.least // size), live)
        count = _rounded(count, least, units, multiple_of)
        masks = [] if units.live is None else [units.live]
        (kept,) = schema.call(schema.topk_mask, [units.worth], count, masks, True)
        return kept
    order = _order(units)
    ends = units.sizes.to(order.device)[order].cumsum(0)
    count = int(torch.searchsorted(ends, keep, right=True))
    least = _least(units, ends)
    return _first(units, order, _rounded(count, least, units, multiple_of))


def best_of_all(
    every: Sequence[Ranked], keep: int, multiple_of: int = 1, *, floors: bool = False
) -> list[Tensor]:
    """Marks the best units of several weights in one ranking, with at most keep weights together.

    Each weight keeps its `least` first, even where keep is less; with floors, that is an error.
    With multiple_of, so many units of a weight are ranked together: by the least worth of them.
    """
    if alike(every) and multiple_of == 1:
        return _best_alike(every, keep, floors)
    orders = [_order(units) for units in every]
    sizes, worths, forced, bundles = [], [], [], []
    for units, order in zip(every, orders, strict=True):
        ends = _all_sizes(units).to(order.device)[order].cumsum(0)
        counts = _bundles(units, order.numel(), multiple_of)
        least = _least(units, ends)
        first = int(torch.searchsorted(counts, least)) + 1 if least else 0
        first = min(first, counts.numel())
        ends = torch.cat([ends.new_zeros(1), ends])
        upto = ends[torch.cat([counts.new_zeros(1), counts]).to(ends.device)].cpu()
        forced.append(first)
        bundles.append(counts)
        sizes.append(upto.diff())
        worths.append(units.worth[order[(counts - 1).to(order.device)]].cpu())
    needed = sum(int(size[:n].sum()) for size, n in zip(sizes, forced, strict=True))
    _require_floors(needed, keep, len(every), floors)
    free = [worth[n:] for worth, n in zip(worths, forced, strict=True)]
    taken = _prefix(free, [size[n:] for size, n in zip(sizes, forced, strict=True)], keep - needed)
    result = []
    for units, order, counts, first, more in zip(
        every, orders, bundles, forced, taken, strict=True
    ):
        number = first + more
        result.append(_first(units, order, int(counts[number - 1]) if number else 0))
    return result


def alike(every: Sequence[Ranked]) -> bool:
    """Says whether all units have one size: then nothing is sorted."""
    sizes = [units.sizes for units in every]
    return bool(sizes) and all(isinstance(x, int) and x == sizes[0] for x in sizes)


def _best_alike(every: Sequence[Ranked], keep: int, floors: bool) -> list[Tensor]:
    """Marks the best units of several weights whose units have one size."""
    assert isinstance(every[0].sizes, int)
    size = max(every[0].sizes, 1)
    forced = [
        best(replace(units, least=0), size * min(-(-units.least // size), units.count))
        for units in every
    ]
    taken = sum(int(x.count_nonzero()) for x in forced)
    _require_floors(size * taken, keep, len(every), floors)
    free = [
        ~first if units.live is None else units.live & ~first
        for units, first in zip(every, forced, strict=True)
    ]
    worths, masks = [units.worth.cpu() for units in every], [x.cpu() for x in free]
    more = schema.call(schema.topk_mask, worths, max(keep // size - taken, 0), masks, True)
    return [first | x.to(first.device) for first, x in zip(forced, more, strict=True)]


def _require_floors(needed: int, keep: int, layers: int, floors: bool) -> None:
    """Raises if floors are given that need more than is kept."""
    if floors and needed > keep:
        raise LapValueError(
            f"a {{argument}} that the sparsity leaves room for (it keeps {keep:,} weights)",
            f"one that needs {needed:,} in whole units of {layers} layers",
            "Lower one of them.",
            argument="min_keep",
        )


def _prefix(worths: Sequence[Tensor], sizes: Sequence[Tensor], keep: int) -> list[int]:
    """Counts how many of each are in the longest prefix of their ranking that fits."""
    joined = torch.cat([torch.empty(0, dtype=torch.float64), *worths])
    order = joined.sort(descending=True, stable=True).indices
    ends = torch.cat([torch.empty(0, dtype=torch.int64), *sizes])[order].cumsum(0)
    chosen = order[: int(torch.searchsorted(ends, keep, right=True))]
    counts = torch.tensor([x.numel() for x in worths], dtype=torch.int64)
    index = torch.repeat_interleave(torch.arange(len(worths)), counts)[chosen]
    return torch.bincount(index, minlength=len(worths)).tolist()


def _bundles(units: Ranked, live: int, multiple_of: int) -> Tensor:
    """Lists the numbers of units that a weight may keep, rising from the least above 0."""
    counts = torch.arange(live // multiple_of).add(1).mul(multiple_of)
    if live % multiple_of and (live == units.worth.numel() or live < multiple_of):
        counts = torch.cat([counts, torch.tensor([live])])
    return counts


def _rounded(count: int, least: int, units: Ranked, multiple_of: int) -> int:
    """Rounds a number of units down to one that may be kept, but least up to one."""
    live, every = units.count, units.worth.numel()
    if max(count, least) == live and (live == every or live < multiple_of):
        return live
    up = -(-least // multiple_of) * multiple_of
    if up > live:
        up = live // multiple_of * multiple_of
        up = live if live == every or not up else up
    return max(count // multiple_of * multiple_of, up)


def _order(units: Ranked) -> Tensor:
    """Sorts the live units, the best first."""
    if units.live is None:
        return units.worth.sort(descending=True, stable=True).indices
    index = units.live.nonzero().flatten()
    return index[units.worth[index].sort(descending=True, stable=True).indices]


def _all_sizes(units: Ranked) -> Tensor:
    if isinstance(units.sizes, Tensor):
        return units.sizes
    return torch.full([units.worth.numel()], units.sizes, dtype=torch.int64)


def _least(units: Ranked, ends: Tensor) -> int:
    """Counts the first units that have the least weights together, or all."""
    return min(int(torch.searchsorted(ends, units.least)) + 1, ends.numel()) if units.least else 0


def _first(units: Ranked, order: Tensor, count: int) -> Tensor:
    kept = torch.zeros(units.worth.numel(), dtype=torch.bool, device=units.worth.device)
    kept[order[:count]] = True
    return kept
