# SPDX-License-Identifier: MIT
"""Masks of structures in plain PyTorch: N:M patterns, and the sums and masks of blocks.

A weight w [R, C, *K] comes with norms of its rows [R] and of its columns [groups * C], or holds
scores itself: then row_norm is empty. Scores keep 24 bits (53 for float64) and have an exponent
that no product leaves (csrc/math/score.h: the wide form), so that no underflow decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

from lap_ext.errors import calling
from lap_ext.ops.reference.key import never, ordered_keys
from lap_ext.ops.reference.norms import row_sums
from lap_ext.ops.reference.score import wide_score
from lap_ext.ops.reference.structure_checks import (
    fitting,
    require_block,
    require_kept,
    require_parts,
    require_sums,
    require_tiles,
    require_weight,
)

TILE, TILE_KEEP = 4, 2  # the transposable pattern that is found exactly

_BATCH = 1 << 18  # weights that are scored at a time


@calling("mask")
def nm_mask(
    w: Tensor,
    row_norm: Tensor,
    col_norm: Tensor,
    groups: int,
    keep: int,
    of: int,
    rows: bool,
    mask: Tensor | None,
    check_finite: bool,
) -> Tensor:
    """Keeps the best `keep` of every `of` consecutive columns of w, or rows, that mask names.

    Consecutive means in the same row (or column) at the same kernel position. Of equal scores, the
    one at the lower index is kept. `of` divides the columns, or the rows of a group.
    """
    mask = require_weight(w, row_norm, col_norm, groups, mask, check_finite)
    require_parts(keep, of, w.shape[0] // groups if rows else w.shape[1], rows)
    kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    numbers = check_finite and not row_norm.numel()  # products may leave float64's range
    for top, bottom, scores in _scores(w, row_norm, col_norm, groups, of):
        keys = ordered_keys(scores, without_nan=numbers)
        if mask is not None:
            keys.masked_fill_(~mask[top:bottom], never(keys.dtype))
        best = _best(keys.movedim(0, -1) if rows else keys.movedim(1, -1), keep, of)
        kept[top:bottom] = best.movedim(-1, 0) if rows else best.movedim(-1, 1)
    return kept if mask is None else kept & mask


def _best(keys: Tensor, keep: int, of: int) -> Tensor:
    """Marks the largest keys of every `of` in the last dimension."""
    cut = keys.reshape(*keys.shape[:-1], keys.shape[-1] // of, of)
    order = cut.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    marks = torch.zeros(cut.shape, dtype=torch.bool, device=keys.device)
    return marks.scatter_(-1, order, True).reshape(keys.shape)


@calling("mask")
def transposable_mask(
    w: Tensor,
    row_norm: Tensor,
    col_norm: Tensor,
    groups: int,
    squared: bool,
    mask: Tensor | None,
    check_finite: bool,
) -> Tensor:
    """Keeps two of four along rows and along columns of every tile of 4 rows by 4 columns of w.

    Of the 90 patterns, the one with the largest sum is taken: of squared scores, or of scores. What
    mask does not name counts 0 and is not kept; with a mask, only the patterns count that keep the
    most of what it names. A pattern's sum adds, in float64, the two kept entries of each row, then
    the rows, in order. Of equal sums, the pattern that comes first in `patterns` is taken.
    """
    mask = require_weight(w, row_norm, col_norm, groups, mask, check_finite)
    require_tiles(w.shape[0] // groups, w.shape[1])
    kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    choices = patterns().to(w.device)
    pairs = _pairs()
    for top, bottom, scores in _scores(w, row_norm, col_norm, groups, TILE):
        values = scores.double()
        values = values.square() if squared else values
        if mask is not None:
            values = values.masked_fill(~mask[top:bottom], 0.0)
        tiles = tiles_of(values, TILE)  # [n, 4, 4]
        sums = torch.stack([tiles[:, :, a] + tiles[:, :, b] for a, b in pairs], dim=-1)
        total = torch.zeros(tiles.shape[0], len(choices), dtype=torch.float64, device=w.device)
        for row, pair in enumerate(choices.unbind(1)):
            total += sums[:, row, pair]
        keys = ordered_keys(total, without_nan=False)
        if mask is not None:
            named = _kept_of(tiles_of(mask[top:bottom], TILE), choices)
            keys[named < named.amax(1, keepdim=True)] = never(keys.dtype)
        found = choices[keys.argmax(dim=1)]  # the first of equal ones
        marks = torch.zeros(tiles.shape, dtype=torch.bool, device=w.device)
        for number, columns in enumerate(pairs):
            for column in columns:
                marks[:, :, column] |= found == number
        kept[top:bottom] = untiled(marks, scores.shape, TILE)
    return kept if mask is None else kept & mask


def _kept_of(tiles: Tensor, choices: Tensor) -> Tensor:
    """Counts what each pattern keeps of bool tiles [n, 4, 4], int64 [n, 90]."""
    counts = torch.stack([tiles[:, :, a].long() + tiles[:, :, b] for a, b in _pairs()], dim=-1)
    return torch.stack([counts[:, row, pair] for row, pair in enumerate(choices.unbind(1))]).sum(0)


def tiles_of(x: Tensor, size: int) -> Tensor:
    """Cuts x [R, C, *K] into tiles of rows and columns, [n, size, size]."""
    rows, cols = x.shape[0] // size, x.shape[1] // size
    cut = x.reshape(rows, size, cols, size, -1)
    return cut.permute(0, 2, 4, 1, 3).reshape(-1, size, size)


def untiled(tiles: Tensor, shape: Sequence[int], size: int) -> Tensor:
    """Puts tiles back into shape [R, C, *K]."""
    rows, cols = shape[0] // size, shape[1] // size
    cut = tiles.reshape(rows, cols, -1, size, size)
    return cut.permute(0, 3, 1, 4, 2).reshape(list(shape))


def _pairs() -> list[tuple[int, int]]:
    """Lists the choices of two of four columns, those with lower columns first."""
    return [(a, b) for a, b in combinations(range(TILE), TILE_KEEP)]


@lru_cache(1)
def patterns() -> Tensor:
    """Lists the 90 patterns by the numbers of their rows' pairs, [90, 4], in rising order."""
    pairs = _pairs()
    found = [
        choice
        for choice in product(range(len(pairs)), repeat=TILE)
        if all(sum(c in pairs[p] for p in choice) == TILE_KEEP for c in range(TILE))
    ]
    return torch.tensor(found)


@calling("mask")
def block_sums_(
    sums: Tensor,
    w: Tensor,
    row_norm: Tensor,
    col_norm: Tensor,
    groups: int,
    block: Sequence[int],
    first: int,
    height: int,
    squared: bool,
    mask: Tensor | None,
    check_finite: bool,
) -> None:
    """Adds the scores of w, or their squares, to the sums of the blocks in which they are.

    w has rows first, first + 1, ... of a matrix whose groups have `height` rows each; they are of
    one group, or of `groups` full ones. A block has block[0] rows of a group by block[1] columns
    with all kernel positions. sums is float64 [groups of the matrix * blocks down, blocks across].
    What mask does not name counts 0. In each row, what is in a block is added as norms.py adds a
    row; then the rows are added in order: the sums do not depend on how the rows come.
    """
    mask = require_weight(w, row_norm, col_norm, groups, mask, check_finite)
    require_block(block, first, height)
    require_sums(sums, w.shape, block, first, height)
    if not w.numel():
        return
    across = sums.shape[1]
    for top, bottom, scores in _scores(w, row_norm, col_norm, groups, 1):
        values = scores.double().flatten(1)
        values = values.square() if squared else values
        if mask is not None:
            values = values.masked_fill(~mask[top:bottom].flatten(1), 0.0)
        width = block[1] * w.shape[2:].numel()
        padded = values.new_zeros(bottom - top, across * width)
        padded[:, : values.shape[1]] = values
        parts = row_sums(padded.reshape(-1, width)).view(bottom - top, across)
        for rows, units in _units(first + top, first + bottom, height, block[0], w.device):
            sums[units] += parts[rows]


def _units(
    top: int, bottom: int, height: int, block: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (rows, their rows of blocks) in order, such that no row of blocks is there twice."""
    rows = torch.arange(top, bottom, device=device)
    down = -(-height // block)
    units = rows // height * down + rows % height // block
    inside = rows % height % block
    for offset in torch.unique(inside).tolist() if block < bottom - top else ():
        chosen = (inside == offset).nonzero().flatten()
        yield chosen, units[chosen]
    if block >= bottom - top:
        for row in range(bottom - top):
            yield slice(row, row + 1), units[row : row + 1]  # type: ignore[misc]


@calling("mask")
def block_mask(
    kept: Tensor,
    shape: Sequence[int],
    block: Sequence[int],
    first: int,
    height: int,
    mask: Tensor | None,
) -> Tensor:
    """Masks the weights of the blocks that are kept, among those that mask names.

    shape [r, C, *K]: rows first, first + 1, ... of a matrix, as in block_sums_.
    """
    require_block(block, first, height)
    require_kept(kept, shape, block, first, height)
    rows = torch.arange(first, first + shape[0], device=kept.device)
    units = rows // height * -(-height // block[0]) + rows % height // block[0]
    cols = torch.arange(shape[1], device=kept.device) // block[1]
    marks = kept[units][:, cols].view(shape[0], shape[1], *[1] * (len(shape) - 2))
    full = marks.expand(list(shape)).contiguous()
    return full if mask is None else full & fitting(mask, shape)


def _scores(
    w: Tensor, row_norm: Tensor, col_norm: Tensor, groups: int, together: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Scores some rows of w at a time: first row, end, scores; ranges are of `together` rows."""
    rows, cols = w.shape[:2]
    group = max(rows // groups, 1)
    step = max(_BATCH // max(w.shape[1:].numel(), 1) // together, 1) * together
    for begin in range(0, rows, group):
        number = begin // group
        for top in range(begin, begin + group, step):
            bottom = min(top + step, begin + group)
            block = w[top:bottom]
            if not row_norm.numel():
                yield top, bottom, block
                continue
            norms = row_norm[top:bottom], col_norm[number * cols : (number + 1) * cols]
            yield top, bottom, wide_score(block, *norms, 1, False)
