# SPDX-License-Identifier: MIT
"""The lookahead score of every weight in plain PyTorch, written from the definition.

    c = round(in_norm * out_norm), s = round(|w| * c), each to 24 bits (53 for float64); the
    exponent is unbounded until the score itself is stored

Source: Park et al., ICLR 2020, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.errors import calling
from lap_ext.ops.reference.common import (
    outer,
    require_valid,
    rounded,
    rows_and_cols,
    score_dtype,
    times,
)
from lap_ext.ops.reference.scale import is_plain


@calling("score")
def score(
    w: Tensor, in_norm: Tensor, out_norm: Tensor, groups: int, transposed: bool, check_finite: bool
) -> Tensor:
    """Computes |w| * c in float32 (float64 for float64 w); c is in_norm * out_norm, rounded.

    Each score is rounded only once, so a denormal score is the one nearest to the exact |w| * c.

    w [O, I / groups, *K] ([I, O / groups, *K] when transposed), in_norm [I], out_norm [O].
    """
    if check_finite:
        require_valid(w, in_norm, out_norm)
    dtype = score_dtype(w.dtype)
    rows, cols = rows_and_cols(in_norm, out_norm, transposed)
    if is_plain(rows, cols, dtype):
        return times(w, outer(rows.to(dtype), cols.to(dtype), w, groups), dtype).abs_()
    return _unbounded_score(w, rows, cols, groups, dtype)


def wide_score(w: Tensor, rows: Tensor, cols: Tensor, groups: int, check_finite: bool) -> Tensor:
    """Computes the same scores of w [R, C, *K] in float64, whose exponents no product leaves.

    rows [R] and cols [groups * C] are norms of at most 1.
    """
    if check_finite:
        require_valid(w, cols, rows)
    dtype = score_dtype(w.dtype)
    norms = rounded(outer(rounded(rows, dtype), rounded(cols, dtype), w, groups), dtype)
    return rounded((w.double().abs() * norms).contiguous(), dtype)


def _unbounded_score(
    w: Tensor, rows: Tensor, cols: Tensor, groups: int, dtype: torch.dtype
) -> Tensor:
    """Scores from mantissas and exponents kept apart; only the last product may leave the range."""
    (row_m, row_e), (col_m, col_e) = torch.frexp(rows), torch.frexp(cols)
    product_m = rounded(outer(rounded(row_m, dtype), rounded(col_m, dtype), w, groups), dtype)
    w_m, w_e = torch.frexp(w.to(torch.float64).abs())
    exponent = (w_e + outer(row_e, col_e, w, groups, torch.add)).clamp(-1200, 1200)
    half = exponent // 2
    # Both sides are normal, so their product is rounded once (float32: exact, then rounded once).
    out = torch.ldexp(w_m, half) * torch.ldexp(product_m.expand_as(w_m), exponent - half)
    return out.to(dtype).contiguous()
