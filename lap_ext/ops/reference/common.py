# SPDX-License-Identifier: MIT
"""What the reference's operators share: shapes of factors, rounding, roots, what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import numpy as np
except ImportError:  # torch does not need it
    np = None  # type: ignore[assignment]


def score_dtype(weight: torch.dtype) -> torch.dtype:
    """The dtype of the scores of weights: float64 of float64, else float32."""
    return torch.float64 if weight == torch.float64 else torch.float32


def roles(in_norm: Tensor, out_norm: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """(norms of w's rows, norms of its columns)."""
    return (in_norm, out_norm) if transposed else (out_norm, in_norm)


def outer(
    rows: Tensor,
    cols: Tensor,
    w: Tensor,
    groups: int,
    combine: Callable[..., Tensor] = torch.mul,
) -> Tensor:
    """One factor per row and column of w [R, C, *K], from rows [R] and cols [groups * C]."""
    r, c = w.shape[:2]
    factor = combine(rows.view(groups, r // groups, 1), cols.view(groups, 1, c))
    return factor.view(r, c, *([1] * (w.dim() - 2)))


def times(w: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """W * factor in dtype, a new contiguous tensor."""
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    return torch.mul(w, factor, out=out)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 x to the precision of dtype, ties to even; the exponent keeps float64's range."""
    if dtype == torch.float64:
        return x
    bits = x.view(torch.int64)
    rounded = (bits + 0x0FFFFFFF + ((bits >> 29) & 1)) & ~0x1FFFFFFF
    return rounded.view(torch.float64)


def exact_sqrt(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The correctly rounded square root of float64 or float32 x, detached; out may be x itself.

    On a CPU torch.sqrt goes through a vector math library whose last bit depends on the machine and
    differs from CUDA's root. The roots of NumPy, of Python and of torch on CUDA are IEEE 754's.
    """
    x = x.detach()
    out = torch.empty_like(x) if out is None else out
    if x.device.type != "cpu":
        return torch.sqrt(x, out=out)
    if np is None:
        return out.copy_(x).apply_(_root)  # type: ignore[unreachable]
    with np.errstate(invalid="ignore"):  # of a negative number: NaN, without a word
        np.sqrt(x.numpy(), out=out.numpy())
    return out


def _root(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def require_valid(w: Tensor, in_norm: Tensor, out_norm: Tensor, op: str) -> None:
    """Raises unless the weights are finite, and the norms finite and not negative."""
    _require_norms(in_norm, op, "in_norm")
    _require_norms(out_norm, op, "out_norm")
    require_finite(w, op, "w")


def _require_norms(norm: Tensor, op: str, name: str) -> None:
    """Raises unless every factor is finite and not negative."""
    bad = ~((norm >= 0) & (norm < torch.inf))
    if bad.any():
        at = int(bad.to(torch.uint8).argmax())
        raise ValueError(
            f"{op}: expected finite norms >= 0 in {name}, got {float(norm[at]):f} at index {at}."
        )


def require_finite(w: Tensor, op: str, name: str) -> None:
    """Raises unless every weight is finite, with the count and the first index of those not."""
    if w.numel() == 0 or all(math.isfinite(x) for x in w.aminmax()):
        return
    bad = ~torch.isfinite(w)
    first = int(bad.flatten().to(torch.uint8).argmax())
    raise ValueError(
        f"{op}: expected finite weights in {name}, got {int(bad.count_nonzero())} non-finite "
        f"values, the first at flat index {first}. Repair them, or pass check_finite=False to "
        "rank them as they come."
    )
