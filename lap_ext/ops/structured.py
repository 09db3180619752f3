# SPDX-License-Identifier: MIT
"""Masks of structures for one weight, or for scores of several that are ranked together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.ops import partition, schema, units
from lap_ext.ops.partition import Scored
from lap_ext.ops.reference.structured import TILE, TILE_KEEP, tiles_of, untiled
from lap_ext.ops.transposable import transposable
from lap_ext.structures import NM, Aggregate, Groups, Matrix, Partition


def pattern_mask(
    scored: Scored,
    matrix: Matrix,
    pattern: NM,
    mask: Tensor | None,
    aggregate: Aggregate = "energy",
    check_finite: bool = True,
) -> Tensor:
    """Keeps the best of every few weights, among those that mask names, in the shape of x.

    A transposable pattern keeps those with the largest sum of squared scores (of scores, for
    aggregate="mean").
    """
    x, norms = scored.x, (scored.rows, scored.cols, scored.groups)
    numbers, along = (pattern.keep, pattern.of), pattern.along(matrix)
    if pattern.transposable and numbers == (TILE_KEEP, TILE):
        squared = aggregate != "mean"
        return schema.call(schema.transposable_mask, x, *norms, squared, mask, check_finite)
    if pattern.transposable:
        scores = scored.scores(check_finite)
        tiles = tiles_of(scores.double(), pattern.of)
        tiles = tiles if aggregate == "mean" else tiles.square()
        live = None if mask is None else tiles_of(mask, pattern.of)
        kept = transposable(tiles, pattern.keep, live)
        full = untiled(kept, x.shape, pattern.of).contiguous()
        return full if mask is None else full & mask
    if along == "flat" and (matrix.window > 1 or matrix.cols % pattern.of):
        lines = scored.scores(check_finite).reshape(-1, pattern.of)
        which = None if mask is None else mask.reshape(lines.shape)
        none = scored.rows.new_empty(0)
        options = numbers[0], numbers[1], False, which, check_finite
        return schema.call(schema.nm_mask, lines, none, none, 1, *options).view(x.shape)
    options = numbers[0], numbers[1], along == "rows", mask, check_finite
    return schema.call(schema.nm_mask, x, *norms, *options)


def partition_masks(
    every: Sequence[Scored],
    matrices: Sequence[Matrix],
    shapes: Sequence[tuple[int, ...]],
    structure: Partition | Groups,
    keep: int,
    masks: Sequence[Tensor | None],
    aggregate: Aggregate = "energy",
    check_finite: bool = True,
) -> list[Tensor]:
    """Keeps the best units, in one ranking, with at most keep weights together."""
    cut, worths = [], []
    for scored, matrix, shape, mask in zip(every, matrices, shapes, masks, strict=True):
        part = partition.units_of(structure, matrix, shape, scored.x.device)
        sums = part.zeros()
        part.add(sums, scored, mask, aggregate, check_finite)
        cut.append(part)
        worths.append(units.worth_of(sums, part.sizes, aggregate))
    return unit_masks(cut, worths, keep, [scored.x for scored in every], masks)


def unit_masks(
    cut: Sequence[partition.Units],
    worths: Sequence[Tensor],
    keep: int,
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    """Keeps the units with the highest worth, in one ranking; masks are like the weights."""
    ranked = [
        units.Ranked(worth.to(part.device), part.sizes, _live(part, mask))
        for part, worth, mask in zip(cut, worths, masks, strict=True)
    ]
    kept = [units.best(ranked[0], keep)] if len(cut) == 1 else units.best_of_all(ranked, keep)
    result = []
    for w, part, which, mask in zip(weights, cut, kept, masks, strict=True):
        full = part.mask(which.to(w.device), tuple(w.shape))
        result.append(full if mask is None else full & mask)
    return result


def _live(part: partition.Units, mask: Tensor | None) -> Tensor | None:
    """Marks the units that have a weight that a mask names; None: all."""
    if mask is None:
        return None
    counts = part.zeros()
    part.add(counts, Scored.of_scores(mask.to(torch.float32)), None, "mean")
    return counts > 0


def require_fit(pattern: NM, matrix: Matrix) -> None:
    """Raises unless a matrix can have the pattern."""
    why = pattern.misfit(matrix)
    if why:
        raise LapValueError(
            f"a weight that {pattern.spelled} fits", f"shape {list(matrix.shape)}, where {why}"
        )
