# SPDX-License-Identifier: MIT
"""The units of one weight: adds up the scores of each, and masks those that are kept.

Rows of a weight may come one after the other, in order; the sums have the same bits however they
come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lap_ext.ops import schema
from lap_ext.ops.reference.select import require_numbers
from lap_ext.ops.units import sizes_of
from lap_ext.structures import Aggregate, Grid, Groups, Matrix, Partition


@dataclass(frozen=True)
class Scored:
    """Rows of a weight whose scores are |x| times norms, or that holds scores >= 0.

    Attributes:
        x: [r, C, *K].
        rows: norms of rows, float64 [r]; empty: x holds scores.
        cols: norms of columns, float64 [groups * C].
        groups: of these rows.
        first: the index of the first row in the weight.
    """

    x: Tensor
    rows: Tensor
    cols: Tensor
    groups: int = 1
    first: int = 0

    @classmethod
    def of_scores(cls, scores: Tensor, first: int = 0) -> Scored:
        """Takes scores as they are."""
        none = scores.new_empty(0, dtype=torch.float64)
        return cls(scores, none, none, 1, first)

    def scores(self, check_finite: bool = True) -> Tensor:
        """Computes the scores, in float64 if from norms: no underflow decides."""
        if not self.rows.numel():
            if check_finite and self.x.is_floating_point():
                require_numbers([self.x])
            return self.x
        norms = self.rows, self.cols, self.groups
        return schema.call(schema.wide_score, self.x, *norms, check_finite)


class GridUnits:
    """The blocks of a grid.

    Attributes:
        grid: cuts the weight.
        device: where sums are.
        sizes: how many weights each block has, int64 [count], or one number for all.
        count: how many blocks there are.
    """

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.grid, self.device = grid, device
        self.sizes, self.count = sizes_of(grid), grid.count

    def zeros(self) -> Tensor:
        """Makes sums to add to."""
        return torch.zeros(self.count, dtype=torch.float64, device=self.device)

    def add(
        self,
        sums: Tensor,
        scored: Scored,
        mask: Tensor | None,
        aggregate: Aggregate,
        check_finite: bool = True,
    ) -> None:
        """Adds scores by the operator that reads weights once."""
        if 0 in scored.x.shape:
            return
        norms = scored.rows, scored.cols, scored.groups
        where = list(self.grid.block), scored.first, self.grid.matrix.height
        options = aggregate == "energy", mask, check_finite
        view = sums.view(self.grid.shape)
        schema.call(schema.block_sums_, view, scored.x, *norms, *where, *options)

    def mask(self, kept: Tensor, shape: tuple[int, ...], first: int = 0) -> Tensor:
        """Masks the weights of blocks."""
        if 0 in shape:
            return kept.new_empty(shape)
        where = list(self.grid.block), first, self.grid.matrix.height
        view = kept.view(self.grid.shape)
        return schema.call(schema.block_mask, view, list(shape), *where, None)


class GroupUnits:
    """The groups of a user's partition, with what `GridUnits` has; sums are on the CPU.

    There, their order is fixed. numbers: of each weight's group, flat, without gaps.
    """

    def __init__(self, numbers: Tensor) -> None:
        _, self.numbers = torch.unique(numbers, return_inverse=True)  # none without weights
        self.sizes: Tensor | int = torch.bincount(self.numbers)
        self.count, self.device = self.sizes.numel(), numbers.device

    def zeros(self) -> Tensor:
        """Makes sums to add to."""
        return torch.zeros(self.count, dtype=torch.float64)

    def add(
        self,
        sums: Tensor,
        scored: Scored,
        mask: Tensor | None,
        aggregate: Aggregate,
        check_finite: bool = True,
    ) -> None:
        """Adds scores in flat order."""
        values = scored.scores(check_finite).detach().flatten().cpu().double()
        values = values.square() if aggregate == "energy" else values
        if mask is not None:
            values = values.masked_fill(~mask.flatten().cpu(), 0.0)
        sums.index_add_(0, self._numbers(scored.x.shape, scored.first), values)

    def _numbers(self, shape: tuple[int, ...], first: int) -> Tensor:
        length = torch.Size(shape[1:]).numel()
        return self.numbers[first * length : (first + shape[0]) * length]

    def mask(self, kept: Tensor, shape: tuple[int, ...], first: int = 0) -> Tensor:
        """Masks the weights of groups."""
        return kept[self._numbers(shape, first)].view(shape)


Units: TypeAlias = GridUnits | GroupUnits


def units_of(
    structure: Partition | Groups,
    matrix: Matrix,
    shape: tuple[int, ...],
    device: torch.device,
    name: str | None = None,
) -> Units:
    """Cuts a weight of a shape, whose layer may have a name, into units."""
    if isinstance(structure, Groups):
        return GroupUnits(structure.numbers(name, shape))
    return GridUnits(structure.grid(matrix), device)
