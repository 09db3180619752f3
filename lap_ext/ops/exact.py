# SPDX-License-Identifier: MIT
"""Measures how much the linear neighborhood of a weight changes when a whole unit of it goes.

    worth^2 = ||W_next (W * unit) W_prev||_F^2
            = sum over e, e' of the unit at one kernel position of w_e w_e' A[o, o'] B[i, i']

    A = sum over consumers of (W_n D)^T (W_n D)       D: the scale of each channel in between
    B = sum over producers of (D W_p) (D W_p)^T

A is the Gram matrix of the consumers' columns, B that of the producers' rows; without a consumer or
a producer they are identities. Different kernel positions of W, and the taps of its neighbors,
count as different inputs and outputs, as in the norms: diag(A) = out_norm^2, diag(B) = in_norm^2.
For a row, worth^2 = A[o, o] * ||W[o] W_prev||^2; for a column, B[i, i] * ||W_next W[:, i]||^2; for
a block, tr(A_RR W_RC B_CC W_RC^T). A unit of one weight has the weight's score.

Only the blocks of A and B that a unit needs are computed, or W_RC W_prev instead of them if that is
less work. Everything is float64, by matrix products: close to the definition, but not the same bits
on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lap_ext.ops.factors import Factor
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.structures import Grid, Matrix

_BATCH = 1 << 22  # float64 numbers in one tensor at a time


# Producers: factors, or matrices [in_channels, J]. Consumers: factors, or [J, out_channels].
Factors: TypeAlias = Sequence[Tensor | Factor] | None


def block_distortions(
    w: Tensor,
    grid: Grid,
    producers: Factors,
    consumers: Factors,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes the worth of every unit of a grid, ||W_next (W * unit) W_prev||_F.

    Args:
        w: weight in the shape of the grid's matrix, [R, C, *K].
        grid: the units.
        producers: what feeds w's input channels; None for an identity.
        consumers: what reads w's output channels; None for an identity.
        mask: bool, like w; weights marked False count as 0.

    Returns:
        Worths, float64 in the grid's shape, on w's device.

    Example:
        >>> from lap_ext.structures import Row
        >>> w, w_prev = torch.tensor([[-1., 4.], [1., -1.]]), torch.tensor([[1., 0.], [1., 1.]])
        >>> block_distortions(w, Row().grid(Matrix.of(w.shape)), [w_prev], None)
        tensor([[5.],
                [1.]], dtype=torch.float64)
    """
    matrix, (height, width) = grid.matrix, grid.block
    rows = _blocks(matrix.groups, matrix.height, height).to(w.device)
    cols = _blocks(matrix.groups, matrix.cols, width).to(w.device)
    sides = _sides(matrix, producers, consumers)
    squared = _squared(_Weights.seen(w, matrix, mask), rows, cols, *sides)
    return exact_sqrt(squared.clamp(min=0).reshape(grid.shape))


def group_distortions(
    w: Tensor,
    numbers: Tensor,
    matrix: Matrix,
    producers: Factors,
    consumers: Factors,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes the worth of every group of weights, ||W_next (W * group) W_prev||_F.

    Args:
        w: weight in the shape of the matrix, [R, C, *K].
        numbers: the number of each weight's group, int64, flat or like w.
        matrix: how w is seen.
        producers: as in `block_distortions`.
        consumers: as in `block_distortions`.
        mask: bool, like w; weights marked False count as 0.

    Returns:
        Worths, float64 [the largest number + 1], on w's device; 0 where a number has no weight.

    Example:
        >>> w, w_prev = torch.tensor([[-1., 4., 2.]]), torch.tensor([[1., 0.], [1., 1.], [0., 1.]])
        >>> numbers = torch.tensor([[0, 0, 1]])
        >>> group_distortions(w, numbers, Matrix.of(w.shape), [w_prev], None)
        tensor([5., 2.], dtype=torch.float64)
    """
    numbers = numbers.flatten().to(w.device)
    count = int(numbers.max()) + 1 if numbers.numel() else 0
    squared = torch.zeros(count, dtype=torch.float64, device=w.device)
    sides = _sides(matrix, producers, consumers)
    weights = _Weights.seen(w, matrix, mask, numbers)
    index = torch.arange(numbers.numel(), device=w.device) // matrix.window
    row, col = index // matrix.cols, index % matrix.cols
    rows = _Members.of(numbers, row, count)
    cols = _Members.of(numbers, row // matrix.height * matrix.cols + col, count)
    shapes = torch.stack([rows.count, cols.count], dim=1)
    for r, c in torch.unique(shapes[rows.count > 0], dim=0).tolist():
        alike = ((shapes[:, 0] == r) & (shapes[:, 1] == c)).nonzero().flatten()
        for units in alike.split(max(_BATCH // (r * c * matrix.window + r * r + c * c), 1)):
            given = rows.padded(units, r)[:, None], cols.padded(units, c)[:, None]
            within = replace(weights, units=units)
            squared[units] = _squared(within, *given, *sides).flatten()
    return exact_sqrt(squared.clamp(min=0))


def channel_distortions(
    w: Tensor,
    numbers: Tensor,
    matrix: Matrix,
    producers: Factors,
    consumers: Factors,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes the worth of every group of whole output channels, ||W_next (W * group) W_prev||_F.

    Args:
        w: weight in the shape of the matrix, [R, C, *K].
        numbers: the number of each output channel's group, int64 [channels]; -1 for none.
        matrix: how w is seen.
        producers: as in `block_distortions`.
        consumers: as in `block_distortions`.
        mask: bool, like w; weights marked False count as 0.

    Returns:
        Worths, float64 [the largest number + 1], on w's device; 0 where a number has no channel.

    Example:
        >>> w, w_next = torch.tensor([[3., 0.], [0., 1.], [4., 0.]]), torch.tensor([[1., 2., 1.]])
        >>> numbers = torch.tensor([0, -1, 0])
        >>> channel_distortions(w, numbers, Matrix.of(w.shape), None, [w_next])
        tensor([7.], dtype=torch.float64)
    """
    numbers = numbers.to(w.device)
    own = (numbers >= 0).nonzero().flatten()
    count = int(numbers.max()) + 1 if own.numel() else 0
    squared = torch.zeros(count, dtype=torch.float64, device=w.device)
    if not w.numel():
        return squared
    sides, weights = _sides(matrix, producers, consumers), _Weights.seen(w, matrix, mask)
    outputs, inputs = matrix.height, matrix.cols  # of a group of the weight
    if matrix.transposed:
        outputs, inputs = inputs, outputs
    channels = _Members.of(numbers[own], own, count)
    parts = _Members.of(numbers[own], own // outputs, count)  # groups of the weight
    shapes = torch.stack([channels.count, parts.count], dim=1)
    each = torch.arange(inputs, device=w.device)
    for n, m in torch.unique(shapes[channels.count > 0], dim=0).tolist():
        alike = ((shapes[:, 0] == n) & (shapes[:, 1] == m)).nonzero().flatten()
        size = n * m * inputs * matrix.window + n * n + (m * inputs) ** 2
        step = alike.numel() if matrix.groups == 1 else max(_BATCH // size, 1)
        for units in alike.split(step):
            if matrix.groups == 1:  # all read the same inputs
                made, read = channels.padded(units, n)[None], each[None, None]
            else:
                made = channels.padded(units, n)[:, None]
                read = parts.padded(units, m)[:, :, None] * inputs + each
                read = read.flatten(1)[:, None]
            rows, cols = (read, made) if matrix.transposed else (made, read)
            squared[units] = _squared(weights, rows, cols, *sides).flatten()
    return exact_sqrt(squared.clamp(min=0))


@dataclass(frozen=True)
class _Members:
    """The different rows, or columns, of each unit, unit after unit.

    Attributes:
        ids: int64 [n].
        count: int64 [units], how many each has.
        first: int64 [units], where those of each begin.
    """

    ids: Tensor
    count: Tensor
    first: Tensor

    @classmethod
    def of(cls, numbers: Tensor, ids: Tensor, units: int) -> _Members:
        """Gathers the ids that occur in each unit."""
        base = int(ids.max()) + 1 if ids.numel() else 1
        keys = torch.unique(numbers * base + ids)
        count = torch.bincount(keys // base, minlength=units)
        return cls(keys % base, count, count.cumsum(0) - count)

    def padded(self, units: Tensor, size: int) -> Tensor:
        """Returns the ids of units that have so many, [units, size]."""
        return self.ids[self.first[units, None] + torch.arange(size, device=units.device)]


@dataclass(frozen=True)
class _Weights:
    """The weights of units, by their rows and columns.

    Attributes:
        w: [R * C, window].
        matrix: how it is seen.
        mask: like w; None: all count.
        numbers: of each weight's unit, like w; None: rows and columns say it.
        units: where there are numbers, the unit that each group of rows and columns is of.
    """

    w: Tensor
    matrix: Matrix
    mask: Tensor | None
    numbers: Tensor | None = None
    units: Tensor | None = None

    @classmethod
    def seen(
        cls, w: Tensor, matrix: Matrix, mask: Tensor | None, numbers: Tensor | None = None
    ) -> _Weights:
        """Sees tensors in the matrix's shape, row by row and column by column."""
        flat = (matrix.rows * matrix.cols, matrix.window)
        mask, numbers = (None if x is None else x.reshape(flat) for x in (mask, numbers))
        return cls(w.detach().reshape(flat), matrix, mask, numbers)

    def of(self, rows: Tensor, cols: Tensor, groups: slice) -> Tensor:
        """Returns weights in float64, [g, a, r, b, c, window], 0 where there is none.

        rows: [g, a, r] of the matrix, -1 for none. cols: [g, b, c], channels, -1 for none.
        """
        rows, cols = rows[:, :, :, None, None], cols[:, None, None]
        matrix = self.matrix
        there = (rows >= 0) & (cols >= 0)
        there = there & (rows // max(matrix.height, 1) == cols // max(matrix.cols, 1))
        index = torch.where(there, rows * matrix.cols + cols % max(matrix.cols, 1), 0)
        values = self.w[index].to(torch.float64)
        counts = there[..., None]
        if self.mask is not None:
            counts = counts & self.mask[index]
        if self.numbers is not None and self.units is not None:
            counts = counts & (self.numbers[index] == self.units[groups].view(-1, *[1] * 5))
        return values.masked_fill_(~counts, 0.0)


# Squared worths [g, a, b] of weights [g, a, r, b, c, window], which are these parts of all blocks.
_Block: TypeAlias = Callable[[Tensor, slice, slice, slice], Tensor]


def _blocks(groups: int, size: int, step: int) -> Tensor:
    """Cuts the channels of every group into blocks, [groups, blocks, step]; -1 behind the last."""
    blocks = -(-size // step)
    index = torch.arange(blocks * step).reshape(1, blocks, step)
    first = torch.arange(groups).reshape(-1, 1, 1) * size
    return torch.where(index < size, index + first, -1)


def _sides(
    matrix: Matrix, producers: Factors, consumers: Factors
) -> tuple[Sequence[Factor] | None, Sequence[Factor] | None]:
    """Returns the factors of (rows, columns)."""

    def factors(given: Factors, outputs: bool) -> Sequence[Factor] | None:
        if given is None:
            return None
        return [
            x if isinstance(x, Factor) else Factor((x.mT if outputs else x).detach()) for x in given
        ]

    into, out = factors(producers, False), factors(consumers, True)
    return (into, out) if matrix.transposed else (out, into)


def _squared(
    weights: _Weights,
    rows: Tensor,
    cols: Tensor,
    row_factors: Sequence[Factor] | None,
    col_factors: Sequence[Factor] | None,
) -> Tensor:
    """Computes the squared worth of units of rows [g, a, r] and columns [g, b, c]: [g, a, b].

    Channels of one unit that never meet add their squares: they are cut apart.
    """
    shape = (*rows.shape[:2], cols.shape[1])
    total = torch.zeros(shape, dtype=torch.float64, device=rows.device)
    for row_side in _together(row_factors):
        cut_rows = _cut(rows, row_side)
        for col_side in _together(col_factors):
            cut_cols = _cut(cols, col_side)
            _Pair(weights, *cut_rows, row_side, *cut_cols, col_side).add_to(total)
    return total


def _together(factors: Sequence[Factor] | None) -> list[Sequence[Factor] | None]:
    """Gathers factors whose Gram matrices have the same zeros."""
    if factors is None:
        return [None]
    found: list[list[Factor]] = []
    for factor in factors:
        for alike in found:
            one, other = alike[0].apart, factor.apart
            if one is other or (one is not None and other is not None and torch.equal(one, other)):
                alike.append(factor)
                break
        else:
            found.append([factor])
    return list(found)


def _cut(index: Tensor, factors: Sequence[Factor] | None) -> tuple[Tensor, Tensor]:
    """Cuts blocks of channels [g, n, m] where channels do not meet.

    Returns blocks [g, n', m'] and the number of the block that each is of, [g, n'].
    """
    g, n, m = index.shape
    apart = None if not factors else factors[0].apart
    if apart is None or index.numel() == 0:
        return index, torch.arange(n, device=index.device).expand(g, n)
    there = (index >= 0).flatten().nonzero().flatten()
    channel, block = index.flatten()[there], there // m
    label = apart[channel]
    keys, order = (block * (int(label.max()) + 1) + label).sort(stable=True)
    _, piece, size = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    first = size.cumsum(0) - size
    of_block = block[order][first]  # of each piece
    in_group = torch.bincount(of_block // n, minlength=g)
    slot = torch.arange(len(size), device=index.device)
    slot -= (in_group.cumsum(0) - in_group)[of_block // n]
    most, longest = int(in_group.max()), int(size.max())
    blocks = index.new_full((g, most, longest), -1)
    at = torch.arange(len(piece), device=index.device) - first[piece]
    blocks[(of_block // n)[piece], slot[piece], at] = channel[order]
    numbers = index.new_zeros(g, most)
    numbers[of_block // n, slot] = of_block % n
    return blocks, numbers


@dataclass(frozen=True)
class _Pair:
    """Blocks of rows [g, a, r] and columns [g, b, c] with factors whose channels all meet.

    row_unit [g, a] and col_unit [g, b] say which unit each is of.
    """

    weights: _Weights
    rows: Tensor
    row_unit: Tensor
    row_factors: Sequence[Factor] | None
    cols: Tensor
    col_unit: Tensor
    col_factors: Sequence[Factor] | None

    def add_to(self, total: Tensor) -> None:
        """Adds the squared worths to those of the units [g, *, *], by the way of least work."""
        (g, a, r), (_, b, c) = self.rows.shape, self.cols.shape
        count = g * a * r * b * c * self.weights.matrix.window
        row_width, col_width = _width(self.row_factors), _width(self.col_factors)
        row_gram, col_gram = g * a * r * r * row_width, g * b * c * c * col_width
        work = {self._by_grams: row_gram + col_gram + count * (r + c)}
        if self.col_factors is not None and (r == 1 or self.row_factors is None):
            work[self._by_columns] = row_gram + count * col_width
        if self.row_factors is not None and (c == 1 or self.col_factors is None):
            work[self._by_rows] = col_gram + count * row_width
        block = min(work, key=lambda way: work[way])()
        for some in _batches((g, a, b), r * c * self.weights.matrix.window):
            groups, down, across = some
            w = self.weights.of(self.rows[groups, down], self.cols[groups, across], groups)
            unit = self.row_unit[groups, down, None] * total.shape[2]
            unit = unit + self.col_unit[groups, None, across]
            total[groups].flatten(1).scatter_add_(1, unit.flatten(1), block(w, *some).flatten(1))

    def _by_grams(self) -> _Block:
        """Sums (A w) * (w B) over each block."""
        row_gram, col_gram = _gram(self.row_factors, self.rows), _gram(self.col_factors, self.cols)

        def block(w: Tensor, g: slice, a: slice, b: slice) -> Tensor:
            left, right = w, w
            if row_gram is not None:
                left = torch.einsum("garbck,gars->gasbck", w, row_gram[g, a])
            if col_gram is not None:
                right = torch.einsum("garbck,gbcd->garbdk", w, col_gram[g, b])
            return (left * right).sum((2, 4, 5))

        return block

    def _by_columns(self) -> _Block:
        """Sums a * (w P)^2 over each block, where a is a number for each row."""
        weight = _gram(self.row_factors, self.rows)
        factors = self.col_factors or ()

        def block(w: Tensor, g: slice, a: slice, b: slice) -> Tensor:
            norms = _products(w, factors, self.cols[g, b])
            return (norms if weight is None else norms * weight[g, a]).sum(2)

        return block

    def _by_rows(self) -> _Block:
        """Sums b * (N w)^2 over each block, where b is a number for each column."""
        weight = _gram(self.col_factors, self.cols)
        factors = self.row_factors or ()

        def block(w: Tensor, g: slice, a: slice, b: slice) -> Tensor:
            norms = _products(w.permute(0, 3, 4, 1, 2, 5), factors, self.rows[g, a])
            return (norms if weight is None else norms * weight[g, b]).sum(2).mT

        return block


def _width(factors: Sequence[Factor] | None) -> int:
    return 0 if factors is None else sum(factor.width for factor in factors)


def _batches(sizes: tuple[int, int, int], each: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts [g, a, b] into parts of at most _BATCH numbers, so many for each entry."""
    left = max(_BATCH // max(each, 1), 1)
    steps = []
    for size in reversed(sizes):
        step = max(min(size, left), 1)
        left = max(left // step, 1)
        steps.append([slice(x, x + step) for x in range(0, size, step)])
    for b in steps[0]:
        for a in steps[1]:
            for g in steps[2]:
                yield g, a, b


def _columns(factor: Factor, each: int) -> Iterator[slice]:
    """Cuts the columns of a factor so that at most _BATCH numbers are computed at a time."""
    step = max(_BATCH // max(each, 1), 1)
    for first in range(0, factor.width, step):
        yield slice(first, first + step)


def _gram(factors: Sequence[Factor] | None, index: Tensor) -> Tensor | None:
    """Computes the blocks [g, n, m, m] of a Gram matrix for channels [g, n, m]; None: identity."""
    if factors is None:
        return None
    g, n, m = index.shape
    gram = torch.zeros(g, n, m, m, dtype=torch.float64, device=index.device)
    for some in _batches((g, n, 1), m * m):
        for factor in factors:
            for columns in _columns(factor, index[some[:2]].numel()):
                rows = factor.rows(index[some[:2]], columns)
                gram[some[:2]] += rows @ rows.mT
    return gram


def _products(w: Tensor, factors: Sequence[Factor], index: Tensor) -> Tensor:
    """Sums the squares of w [g, a, r, b, c, k] times the rows of channels [g, b, c]: [g, a, r, b].

    The sum is over the kernel positions and the columns of the factors.
    """
    norms = w.new_zeros(w.shape[:4])
    for factor in factors:
        for columns in _columns(factor, max(norms.numel() * w.shape[5], index.numel())):
            product = torch.einsum("garbck,gbcj->garbkj", w, factor.rows(index, columns))
            norms += product.square_().sum((4, 5))
    return norms
