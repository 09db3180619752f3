# SPDX-License-Identifier: MIT
"""Every op of lap_ext in plain PyTorch: the fallback on any device, and the oracle of the tests.

Written from the definition, bit for bit:

    energies  squares in float64, added in the fixed order of csrc/math/sums.h
    score     c = round(in_norm * out_norm), s = round(|w| * c), each to 24 bits (53 for float64);
              the exponent is unbounded, except in the scores that score() returns
    rank      the larger key first; of equal keys the lower (tensor, flat C-order index)

Plan of a score: norms are scaled by powers of two to at most 1, so that a plain float product
cannot overflow. Where it underflows and that could decide, the same roundings are made again in
float64 (wide). Selection is in select_reference.py.
Source: Park et al., ICLR 2020, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lap_ext.select_reference import kth_largest, never, select, topk_mask

__all__ = [
    "col_energy",
    "energies",
    "kth_largest",
    "mask",
    "prune_",
    "row_energy",
    "score",
    "topk_mask",
]

SEGMENT, LANES, SEGMENT_ROWS = 1024, 32, 64  # csrc/math/sums.h
_CHUNK = 1 << 17  # elements widened to float64 at a time: 1 MiB
_LOST = 2.0**-1000  # a float64 energy below this may have lost squares to underflow


def row_energy(weight: Tensor, check_finite: bool, name: str) -> Tensor:
    """Sum of squares of each row of weight [R, *rest] -> float64 [R]."""
    if check_finite:
        _require_finite(weight, "factors", name)
    energy = _row_energy(weight, 1.0)
    if check_finite and weight.dtype == torch.float64:
        _require_range(energy, lambda: _row_energy(weight, 2.0**900), name)
    return energy


def _row_energy(weight: Tensor, factor: float) -> Tensor:
    rows = weight.reshape(weight.shape[0], weight.shape[1:].numel())  # [R, L]
    count, length = rows.shape
    energy = torch.zeros(count, dtype=torch.float64, device=weight.device)
    width = max(SEGMENT, _CHUNK // max(count, 1) // SEGMENT * SEGMENT)  # whole segments
    height = max(1, _CHUNK // max(min(width, length), 1))
    for top in range(0, count, height):
        total = energy[top : top + height]
        for left in range(0, length, width):
            _add_segments(total, rows[top : top + height, left : left + width], factor)
    return energy


def _add_segments(total: Tensor, part: Tensor, factor: float) -> None:
    """Adds the segments of part [r, l] to total [r], in order."""
    height, length = part.shape
    segments = max(1, -(-length // SEGMENT))
    steps = -(-length // (segments * LANES)) if segments == 1 else SEGMENT // LANES
    squares = _squares(part, segments * steps * LANES, factor)
    squares = squares.view(height, segments, steps, LANES)
    lanes = squares[:, :, 0].clone()  # [r, segment, lane]
    for step in range(1, steps):
        lanes += squares[:, :, step]
    half = LANES // 2
    while half:
        lanes = lanes[:, :, :half] + lanes[:, :, half : 2 * half]
        half //= 2
    for segment in range(segments):
        total += lanes[:, segment, 0]


def _squares(part: Tensor, size: int, factor: float) -> Tensor:
    """Squares of factor * part [a, l, *rest] in float64, [a, size, *rest]: zeros from l on.

    Adding + 0.0 changes no sum of squares.
    """
    out = torch.empty(part.shape[0], size, *part.shape[2:], dtype=torch.float64, device=part.device)
    length = part.shape[1]
    out[:, length:] = 0.0
    values = out[:, :length]
    values.copy_(part)
    if factor != 1.0:
        values *= factor
    return out.mul_(out)


def col_energy(weight: Tensor, groups: int, check_finite: bool, name: str) -> Tensor:
    """Sum of squares of each column of weight [G * N, C, *K] -> float64 [G * C]."""
    if check_finite:
        _require_finite(weight, "factors", name)
    energy = _col_energy(weight, groups, 1.0)
    if check_finite and weight.dtype == torch.float64:
        _require_range(energy, lambda: _col_energy(weight, groups, 2.0**900), name)
    return energy


def _col_energy(weight: Tensor, groups: int, factor: float) -> Tensor:
    channels, window = weight.shape[1], weight.shape[2:].numel()
    rows, width = weight.shape[0] // groups, channels * window
    columns = weight.reshape(groups, rows, width)  # [G, N, C * K]
    total = torch.zeros(groups, width, dtype=torch.float64, device=weight.device)
    tile = min(width, max(LANES, _CHUNK // (SEGMENT_ROWS * groups)))
    height = SEGMENT_ROWS * max(1, _CHUNK // max(SEGMENT_ROWS * groups * tile, 1))
    for top in range(0, rows, height):
        for left in range(0, width, max(tile, 1)):
            part = columns[:, top : top + height, left : left + tile]
            _add_row_segments(total[:, left : left + tile], part, factor)
    taps = total.view(groups * channels, window)
    energy = taps.new_zeros(groups * channels)
    for tap in range(window):
        energy += taps[:, tap]
    return energy


def _add_row_segments(total: Tensor, part: Tensor, factor: float) -> None:
    """Adds the segments of rows of part [G, n, m] to total [G, m], in order."""
    groups, rows, width = part.shape
    segments = -(-rows // SEGMENT_ROWS)
    squares = _squares(part, segments * SEGMENT_ROWS, factor)
    squares = squares.view(groups, segments, SEGMENT_ROWS, width)
    sums = squares[:, :, 0].clone()  # [G, segment, m]
    for row in range(1, min(SEGMENT_ROWS, rows)):
        sums += squares[:, :, row]
    for segment in range(segments):
        total += sums[:, segment]


def energies(weight: Tensor, groups: int, check_finite: bool, name: str) -> tuple[Tensor, Tensor]:
    """(row_energy, col_energy) of weight [G * N, C, *K] -> float64 ([G * N], [G * C])."""
    return (
        row_energy(weight, check_finite, name),
        col_energy(weight, groups, check_finite, name),
    )


def norm(energies: list[Tensor]) -> Tensor:
    """sqrt(energies[0] + energies[1] + ...), each float64 [n], added in order."""
    total = energies[0]
    for energy in energies[1:]:
        total = total + energy
    return total.sqrt()


def score(
    w: Tensor, in_norm: Tensor, out_norm: Tensor, groups: int, transposed: bool, check_finite: bool
) -> Tensor:
    """|w| * c, c = in_norm * out_norm rounded, contiguous, float32 (float64 for float64 w).

    Rounded once: a denormal score is the nearest one.

    w [O, I / groups, *K] ([I, O / groups, *K] when transposed), in_norm [I], out_norm [O].
    """
    if check_finite:
        _require_valid(w, in_norm, out_norm, "score")
    dtype = _score_dtype(w)
    rows, cols = _roles(in_norm, out_norm, transposed)
    if _plain(rows, cols, dtype):
        return _times(w, _outer(rows.to(dtype), cols.to(dtype), w, groups), dtype).abs_()
    return _unbounded_score(w, rows, cols, groups, dtype)


def _plain(rows: Tensor, cols: Tensor, dtype: torch.dtype) -> bool:
    """Whether no norm and no product of two norms leaves the normal numbers of dtype."""
    info = torch.finfo(dtype)
    low_row, high_row = _extremes(rows)
    low_col, high_col = _extremes(cols)
    low, high = min(low_row, low_col), max(high_row, high_col)
    return (
        low >= info.tiny
        and low_row * low_col >= info.tiny
        and high < info.max / 2
        and high_row * high_col < info.max / 2
    )


def _extremes(norm: Tensor) -> tuple[float, float]:
    """Smallest and largest finite nonzero entry; 1, 1 when there is none."""
    size = norm.abs()
    size = size[(size > 0) & (size < torch.inf)]
    if size.numel() == 0:
        return 1.0, 1.0
    low, high = size.aminmax()
    return float(low), float(high)


def _unbounded_score(
    w: Tensor, rows: Tensor, cols: Tensor, groups: int, dtype: torch.dtype
) -> Tensor:
    """The score from mantissas and exponents kept apart; only the last product leaves the range."""
    (row_m, row_e), (col_m, col_e) = torch.frexp(rows), torch.frexp(cols)
    factor_m = _round(_outer(_round(row_m, dtype), _round(col_m, dtype), w, groups), dtype)
    w_m, w_e = torch.frexp(w.to(torch.float64).abs())
    exponent = (w_e + _outer(row_e, col_e, w, groups, torch.add)).clamp(-1200, 1200)
    half = exponent // 2
    # Both sides are normal, so their product is rounded once (float32: exact, then rounded once).
    out = torch.ldexp(w_m, half) * torch.ldexp(factor_m.expand_as(w_m), exponent - half)
    return out.to(dtype).contiguous()


def mask(
    w: Tensor,
    in_norm: Tensor,
    out_norm: Tensor,
    keep: int,
    mask: Tensor | None,
    groups: int,
    transposed: bool,
    check_finite: bool,
) -> Tensor:
    """Mask of the keep weights with the largest scores among those that mask names.

    w [O, I / groups, *K] ([I, O / groups, *K] when transposed), in_norm [I], out_norm [O].
    """
    if check_finite:
        _require_valid(w, in_norm, out_norm, "mask")
    return _mask(w, in_norm, out_norm, keep, mask, groups, transposed, "mask")


def prune_(
    w: Tensor,
    in_norm: Tensor,
    out_norm: Tensor,
    keep: int,
    mask: Tensor | None,
    groups: int,
    transposed: bool,
    check_finite: bool,
) -> Tensor:
    """As mask; then the weights that are not kept become +0.0."""
    if check_finite:
        _require_valid(w, in_norm, out_norm, "prune_")
    kept = _mask(w, in_norm, out_norm, keep, mask, groups, transposed, "prune_")
    w.masked_fill_(~kept, 0.0)
    return kept


def _mask(
    w: Tensor,
    in_norm: Tensor,
    out_norm: Tensor,
    keep: int,
    mask: Tensor | None,
    groups: int,
    transposed: bool,
    op: str,
) -> Tensor:
    dtype = _score_dtype(w)
    (rows, least_row), (cols, least_col) = (
        _scaled_to_one(norm) for norm in _roles(in_norm, out_norm, transposed)
    )
    rows, cols = _round(rows, dtype), _round(cols, dtype)
    eligible = w.numel() if mask is None else int(mask.count_nonzero())
    sure = not 0 < keep < eligible  # the scores do not matter
    for kind in dict.fromkeys((dtype, torch.float64)):
        if sure or least_row * least_col >= 4 * torch.finfo(kind).tiny:
            kept = _select(w, rows, cols, keep, mask, groups, dtype, kind)
            if kept is not None:
                return kept
    raise ValueError(
        f"{op}: expected products within float64's range, got scores around the threshold that "
        "underflow. Multiply w, w_prev or w_next by a power of two; a common factor changes no "
        "mask."
    )


def _select(
    w: Tensor,
    rows: Tensor,
    cols: Tensor,
    keep: int,
    mask: Tensor | None,
    groups: int,
    dtype: torch.dtype,
    kind: torch.dtype,
) -> Tensor | None:
    """The mask by products in kind, rounded to dtype; None where an underflow could decide."""
    factor = _outer(rows.to(kind), cols.to(kind), w, groups)
    scores = _times(w, factor if kind == dtype else _round(factor, dtype), kind)
    keys = _keys(scores if kind == dtype else _round(scores, dtype), mask)
    (kept,), threshold = select([keys], keep)
    tiny = int(torch.tensor(torch.finfo(kind).tiny, dtype=kind).view(keys.dtype))
    if threshold is None or threshold > tiny:
        return kept
    lost = (keys < tiny) & (keys != never(keys.dtype)) & (w != 0) & (factor != 0)
    return None if lost.any() else kept


def _keys(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Keys of scores, whose sign is dropped; overwrites scores."""
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    keys = scores.view(integer)
    keys &= torch.iinfo(integer).max
    if mask is not None:
        keys.masked_fill_(~mask, never(integer))
    return keys


def _require_valid(w: Tensor, in_norm: Tensor, out_norm: Tensor, op: str) -> None:
    _require_norms(in_norm, op, "in_norm")
    _require_norms(out_norm, op, "out_norm")
    _require_finite(w, op, "w")


def _require_norms(norm: Tensor, op: str, name: str) -> None:
    """Raises unless every factor is finite and not negative."""
    bad = ~((norm >= 0) & (norm < torch.inf))
    if bad.any():
        at = int(bad.to(torch.uint8).argmax())
        raise ValueError(
            f"{op}: expected finite norms >= 0 in {name}, got {float(norm[at]):f} at index {at}."
        )


def _require_finite(w: Tensor, op: str, name: str) -> None:
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


def _require_range(energy: Tensor, enlarged: Callable[[], Tensor], name: str) -> None:
    """Raises if finite float64 weights have squares that overflow, or vanish."""
    small = energy < _LOST
    if torch.isinf(energy).any() or (small.any() and (small & (enlarged() > 0)).any()):
        raise ValueError(
            f"factors: expected squared norms within float64's range in {name}, got one that "
            f"leaves it. Multiply {name} by a power of two; a common factor changes no mask."
        )


def _score_dtype(w: Tensor) -> torch.dtype:
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def _roles(in_norm: Tensor, out_norm: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """(norms of w's rows, norms of its columns)."""
    return (in_norm, out_norm) if transposed else (out_norm, in_norm)


def _outer(
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


def _times(w: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """W * factor in dtype, a new contiguous tensor."""
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    return torch.mul(w, factor, out=out)


def _scaled_to_one(norm: Tensor) -> tuple[Tensor, float]:
    """Norm times the power of two that brings its largest entry into [0.5, 1); its least nonzero.

    An entry 2^-1074 times the largest becomes 0; the least, then 0 too, tells.
    """
    low, high = _extremes(norm)
    exponent = math.frexp(high)[1]
    half = -exponent // 2
    return norm * 2.0**half * 2.0 ** (-exponent - half), math.ldexp(low, -exponent)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 x to the precision of dtype, ties to even; the exponent keeps float64's range."""
    if dtype == torch.float64:
        return x
    bits = x.view(torch.int64)
    rounded = (bits + 0x0FFFFFFF + ((bits >> 29) & 1)) & ~0x1FFFFFFF
    return rounded.view(torch.float64)
