# SPDX-License-Identifier: MIT
"""The range of norms in plain PyTorch: whether products of two are normal numbers, and scaling.

Norms are scaled by powers of two to at most 1, so that a plain product cannot overflow; the scale
drops out of every comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def is_plain(rows: Tensor, cols: Tensor, dtype: torch.dtype) -> bool:
    """Tells whether all norms and all products of two are normal numbers of dtype."""
    info = torch.finfo(dtype)
    low_row, high_row = extremes(rows)
    low_col, high_col = extremes(cols)
    low, high = min(low_row, low_col), max(high_row, high_col)
    return (
        low >= info.tiny
        and low_row * low_col >= info.tiny
        and high < info.max / 2
        and high_row * high_col < info.max / 2
    )


def extremes(norm: Tensor) -> tuple[float, float]:
    """Returns the smallest and largest finite nonzero entry; 1, 1 when there is none."""
    size = norm.abs()
    size = size[(size > 0) & (size < torch.inf)]
    if size.numel() == 0:
        return 1.0, 1.0
    low, high = size.aminmax()
    return float(low), float(high)


def scaled_to_one(norm: Tensor) -> tuple[Tensor, float]:
    """Multiplies norms by the power of two that brings the largest into [0.5, 1).

    Returns them and the least nonzero one. An entry 2^-1074 times the largest becomes 0; the
    returned least one is then 0, too.
    """
    low, high = extremes(norm)
    exponent = math.frexp(high)[1]
    return times_power(norm, -exponent), math.ldexp(low, -exponent)


def scaled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Multiplies float64 tensors by the one power of two that brings the largest into [0.5, 1)."""
    exponent = math.frexp(max(map(_largest, tensors), default=0.0))[1]
    return [times_power(x, -exponent) for x in tensors]


def _largest(x: Tensor) -> float:
    """Returns the largest finite size of an entry, or 0."""
    size = x.abs()
    size = size[size < torch.inf]
    return float(size.max()) if size.numel() else 0.0


def times_power(x: Tensor, exponent: int) -> Tensor:
    """Multiplies by a power of two, which may be outside float64's range."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)
