# SPDX-License-Identifier: MIT
"""Checks the arguments of the operators of structures, in the words of the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.ops.reference.common import require_valid
from lap_ext.ops.reference.select import require_numbers


def require_weight(
    w: Tensor,
    row_norm: Tensor,
    col_norm: Tensor,
    groups: int,
    mask: Tensor | None,
    check_finite: bool,
) -> Tensor | None:
    """Raises unless norms and mask fit w, and (check_finite) its values; shapes mask as w."""
    _require_groups(w.shape, groups)
    is_scores = row_norm.numel() == 0 and w.shape[0] != 0
    if not is_scores:
        _require_norms(w, row_norm, col_norm, groups)
    if check_finite and is_scores:
        require_numbers([w])
    elif check_finite:
        require_valid(w, col_norm, row_norm)
    return None if mask is None else fitting(mask, w.shape)


def _require_groups(shape: Sequence[int], groups: int) -> None:
    if len(shape) < 2:
        raise LapValueError("w with at least 2 dimensions [O, I, *K]", len(shape))
    if groups < 1 or shape[0] % groups:
        got = f"groups {groups} and w.shape[0] {shape[0]}"
        raise LapValueError("groups that divide w.shape[0]", got)


def _require_norms(w: Tensor, row_norm: Tensor, col_norm: Tensor, groups: int) -> None:
    if row_norm.dtype != torch.float64 or col_norm.dtype != torch.float64:
        raise LapValueError("in_norm and out_norm of float64")
    (rows, cols), ins, outs = w.shape[:2], col_norm.numel(), row_norm.numel()
    if outs != rows or ins != cols * groups:
        raise LapValueError(
            "one norm per channel of w",
            f"in_norm [{ins}], out_norm [{outs}] and w [{rows}, {cols}, ...] with groups {groups}",
        )


def fitting(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns mask in this shape, if it is a contiguous mask of as many elements."""
    size = torch.Size(shape)
    if mask.dtype != torch.bool or mask.numel() != size.numel() or not mask.is_contiguous():
        raise LapValueError("a contiguous bool mask with as many elements as the weights")
    return mask.view(size)


def require_parts(keep: int, of: int, size: int, rows: bool) -> None:
    """Raises unless `keep` of every `of` can be kept of size columns, or rows of a group."""
    if keep < 0:
        raise LapValueError("keep >= 0", keep)
    if of < 1 or size % of:
        what = "the rows of a group" if rows else "the columns"
        raise LapValueError(f"of >= 1 that divides {what}, {size}", of)


def require_tiles(rows: int, cols: int) -> None:
    """Raises unless tiles of 4 by 4 fill the rows of a group and the columns."""
    if rows % 4 or cols % 4:
        got = f"{rows} and {cols}"
        raise LapValueError("rows of a group and columns that 4 divides", got)


def require_block(block: Sequence[int], first: int, height: int) -> None:
    """Raises unless a matrix of groups of such height can be cut into such blocks."""
    if len(block) != 2 or min(block) < 1:
        raise LapValueError("block of two sizes >= 1", list(block))
    if first < 0 or height < 1:
        raise LapValueError("first >= 0 and height >= 1", f"{first} and {height}")


def require_sums(
    sums: Tensor, shape: Sequence[int], block: Sequence[int], first: int, height: int
) -> None:
    """Raises unless sums can take those of every block of rows first, first + 1, ..."""
    good = sums.dtype == torch.float64 and sums.is_contiguous()
    if not (good and _covers(sums, shape, block, first, height)):
        expected = "contiguous sums of float64, an entry for each block"
        raise LapValueError(expected, f"ones of shape {list(sums.shape)}")


def require_kept(
    kept: Tensor, shape: Sequence[int], block: Sequence[int], first: int, height: int
) -> None:
    """Raises unless kept says of every block of rows first, first + 1, ... whether it is kept."""
    _require_groups(shape, 1)
    if kept.dtype != torch.bool or not _covers(kept, shape, block, first, height):
        expected = "kept of bool, an entry for each block"
        raise LapValueError(expected, f"one of shape {list(kept.shape)}")


def _covers(x: Tensor, shape: Sequence[int], block: Sequence[int], first: int, height: int) -> bool:
    if x.dim() != 2 or x.shape[1] != -(-shape[1] // block[1]):
        return False
    last = first + shape[0] - 1
    unit = last // height * -(-height // block[0]) + last % height // block[0]
    return not shape[0] or unit < x.shape[0]
