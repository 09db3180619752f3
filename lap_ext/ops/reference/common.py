# SPDX-License-Identifier: MIT
"""What the reference's operators share: shapes of norms, rounding, roots, checks of values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lap_ext.errors import LapValueError

try:
    import numpy as np
except ImportError:  # torch does not need it
    np = None  # type: ignore[assignment]


RANK_AS_THEY_COME = "Repair them, or pass check_finite=False to rank them as they come."


def score_dtype(weight: torch.dtype) -> torch.dtype:
    """Returns the dtype of the scores of weights: float64 of float64, else float32."""
    return torch.float64 if weight == torch.float64 else torch.float32


def rows_and_cols(in_norm: Tensor, out_norm: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Returns (norms of w's rows, norms of its columns)."""
    return (in_norm, out_norm) if transposed else (out_norm, in_norm)


def outer(
    rows: Tensor,
    cols: Tensor,
    w: Tensor,
    groups: int,
    combine: Callable[..., Tensor] = torch.mul,
) -> Tensor:
    """Combines rows [R] and cols [groups * C] for each row and column of w [R, C, *K]."""
    r, c = w.shape[:2]
    combined = combine(rows.view(groups, r // groups, 1), cols.view(groups, 1, c))
    return combined.view(r, c, *([1] * (w.dim() - 2)))


def times(w: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies w by norms in dtype, into a new contiguous tensor."""
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    return torch.mul(w, norms, out=out)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float64 x to the precision of dtype, ties to even; exponents keep float64's range."""
    if dtype == torch.float64:
        return x
    bits = x.view(torch.int64)
    rounded = (bits + 0x0FFFFFFF + ((bits >> 29) & 1)) & ~0x1FFFFFFF
    return rounded.view(torch.float64)


def exact_sqrt(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Takes the correctly rounded square root of float64 or float32 x, detached; out may be x.

    On a CPU torch.sqrt goes through a vector math library whose last bit depends on the machine and
    differs from CUDA's root. The roots of NumPy, of Python and of torch on CUDA are IEEE 754's.
    """
    x = x.detach()
    out = torch.empty_like(x) if out is None else out
    if x.device.type != "cpu":
        return torch.sqrt(x, out=out)
    if np is None:
        return out.copy_(x).apply_(_root)  # type: ignore[unreachable]
    with np.errstate(invalid="ignore"):  # of a negative number: NaN, without a warning
        np.sqrt(x.numpy(), out=out.numpy())
    return out


def _root(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def require_valid(w: Tensor, in_norm: Tensor, out_norm: Tensor) -> None:
    """Raises unless the weights are finite, and the norms finite and not negative."""
    _require_norms(in_norm, "in_norm")
    _require_norms(out_norm, "out_norm")
    require_finite(w, "w")


def _require_norms(norm: Tensor, name: str) -> None:
    """Raises unless every norm is finite and not negative."""
    bad = ~((norm >= 0) & (norm < torch.inf))
    if bad.any():
        index = int(bad.to(torch.uint8).argmax())
        raise LapValueError(
            "finite norms >= 0 in {argument}",
            f"{float(norm[index]):g} at index {index}",
            argument=name,
        )


def require_finite(w: Tensor, name: str) -> None:
    """Raises unless every weight is finite, with the count and the first index of those not."""
    if w.numel() == 0 or all(math.isfinite(x) for x in w.aminmax()):
        return
    bad = ~torch.isfinite(w)
    first = int(bad.flatten().to(torch.uint8).argmax())
    raise LapValueError(
        "finite weights in {argument}",
        f"{int(bad.count_nonzero())} non-finite values, the first at flat index {first}",
        "Repair them.",
        option=RANK_AS_THEY_COME,
        argument=name,
    )


def require_batch_norm(gamma: Tensor | None, variance: Tensor, eps: float, name: str) -> None:
    """Raises unless a batch norm's scale, gamma / sqrt(variance + eps), is made of numbers."""
    checks = [("finite running_var", variance, variance.isfinite())]
    checks += [(f"running_var > {-eps:g} (-eps)", variance, variance.double() + eps > 0)]
    if gamma is not None:
        checks.append(("finite weight", gamma.detach(), gamma.isfinite()))
    for expected, values, good in checks:
        if not bool(good.all()):
            index = int((~good).to(torch.uint8).argmax())
            got = f"{float(values[index]):g} at index {index}"
            raise LapValueError(f"{expected} in {name}", got, "Repair it.")
