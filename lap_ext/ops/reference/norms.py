# SPDX-License-Identifier: MIT
"""Squared norms of rows and columns in plain PyTorch.

Squares in float64, added in the fixed order of csrc/math/sums.h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lap_ext.errors import LapValueError, calling
from lap_ext.ops.reference.common import exact_sqrt, require_finite

SEGMENT, LANES, SEGMENT_ROWS = 1024, 32, 64  # csrc/math/sums.h
_CHUNK = 1 << 17  # elements widened to float64 at a time: 1 MiB
_LOST = 2.0**-1000  # a float64 squared norm below this may have lost squares to underflow


@calling("neighbor_norms")
def row_squared_norms(weight: Tensor, check_finite: bool, name: str) -> Tensor:
    """Sums the squares of each row of weight [R, *rest] -> float64 [R]."""
    if check_finite:
        require_finite(weight, name)
    squared_norm = _row_squared_norms(weight, 1.0)
    if check_finite and weight.dtype == torch.float64:
        _require_range(squared_norm, lambda: _row_squared_norms(weight, 2.0**900), name)
    return squared_norm


def _row_squared_norms(weight: Tensor, scale: float) -> Tensor:
    rows = weight.reshape(weight.shape[0], weight.shape[1:].numel())  # [R, L]
    count, length = rows.shape
    squared_norm = torch.zeros(count, dtype=torch.float64, device=weight.device)
    width = max(SEGMENT, _CHUNK // max(count, 1) // SEGMENT * SEGMENT)  # whole segments
    height = max(1, _CHUNK // max(min(width, length), 1))
    for top in range(0, count, height):
        total = squared_norm[top : top + height]
        for left in range(0, length, width):
            _add_segments(total, rows[top : top + height, left : left + width], scale)
    return squared_norm


def _add_segments(total: Tensor, chunk: Tensor, scale: float) -> None:
    """Adds the segments of chunk [r, l] to total [r], in order."""
    height, length = chunk.shape
    segments = max(1, -(-length // SEGMENT))
    steps = -(-length // (segments * LANES)) if segments == 1 else SEGMENT // LANES
    squares = _squares(chunk, segments * steps * LANES, scale)
    _add_lanes(total, squares.view(height, segments, steps, LANES))


def _add_lanes(total: Tensor, values: Tensor) -> None:
    """Adds values [r, segment, step, lane] to total [r]."""
    lanes = values[:, :, 0].clone()  # [r, segment, lane]
    for step in range(1, values.shape[2]):
        lanes += values[:, :, step]
    half = LANES // 2
    while half:
        lanes = lanes[:, :, :half] + lanes[:, :, half : 2 * half]
        half //= 2
    for segment in range(values.shape[1]):
        total += lanes[:, segment, 0]


def row_sums(values: Tensor) -> Tensor:
    """Adds the entries of each row of float64 values [r, l] in the order of squared norms."""
    height, length = values.shape
    segments = max(1, -(-length // SEGMENT))
    steps = -(-length // LANES) if segments == 1 else SEGMENT // LANES
    padded = values.new_zeros(height, segments * max(steps, 1) * LANES)
    padded[:, :length] = values
    total = values.new_zeros(height)
    _add_lanes(total, padded.view(height, segments, max(steps, 1), LANES))
    return total


def _squares(chunk: Tensor, size: int, scale: float) -> Tensor:
    """Squares scale * chunk [a, l, *rest] in float64, [a, size, *rest]: zeros from l on.

    Adding + 0.0 changes no sum of squares.
    """
    shape = (chunk.shape[0], size, *chunk.shape[2:])
    out = torch.empty(shape, dtype=torch.float64, device=chunk.device)
    length = chunk.shape[1]
    out[:, length:] = 0.0
    values = out[:, :length]
    values.copy_(chunk)
    if scale != 1.0:
        values *= scale
    return out.mul_(out)


@calling("neighbor_norms")
def col_squared_norms(weight: Tensor, groups: int, check_finite: bool, name: str) -> Tensor:
    """Sums the squares of each column of weight [G * N, C, *K] -> float64 [G * C]."""
    if check_finite:
        require_finite(weight, name)
    squared_norm = _col_squared_norms(weight, groups, 1.0)
    if check_finite and weight.dtype == torch.float64:
        _require_range(squared_norm, lambda: _col_squared_norms(weight, groups, 2.0**900), name)
    return squared_norm


def _col_squared_norms(weight: Tensor, groups: int, scale: float) -> Tensor:
    channels, window = weight.shape[1], weight.shape[2:].numel()
    rows, width = weight.shape[0] // groups, channels * window
    columns = weight.reshape(groups, rows, width)  # [G, N, C * K]
    total = torch.zeros(groups, width, dtype=torch.float64, device=weight.device)
    tile = min(width, max(LANES, _CHUNK // (SEGMENT_ROWS * groups)))
    height = SEGMENT_ROWS * max(1, _CHUNK // max(SEGMENT_ROWS * groups * tile, 1))
    for top in range(0, rows, height):
        for left in range(0, width, max(tile, 1)):
            chunk = columns[:, top : top + height, left : left + tile]
            _add_row_segments(total[:, left : left + tile], chunk, scale)
    taps = total.view(groups * channels, window)
    squared_norm = taps.new_zeros(groups * channels)
    for tap in range(window):
        squared_norm += taps[:, tap]
    return squared_norm


def _add_row_segments(total: Tensor, chunk: Tensor, scale: float) -> None:
    """Adds the segments of rows of chunk [G, n, m] to total [G, m], in order."""
    groups, rows, width = chunk.shape
    segments = -(-rows // SEGMENT_ROWS)
    squares = _squares(chunk, segments * SEGMENT_ROWS, scale)
    squares = squares.view(groups, segments, SEGMENT_ROWS, width)
    sums = squares[:, :, 0].clone()  # [G, segment, m]
    for row in range(1, min(SEGMENT_ROWS, rows)):
        sums += squares[:, :, row]
    for segment in range(segments):
        total += sums[:, segment]


def squared_norms(
    weight: Tensor, groups: int, check_finite: bool, name: str
) -> tuple[Tensor, Tensor]:
    """Returns row_squared_norms and col_squared_norms of weight [G * N, C, *K]."""
    return (
        row_squared_norms(weight, check_finite, name),
        col_squared_norms(weight, groups, check_finite, name),
    )


def norm(squared_norms: list[Tensor]) -> Tensor:
    """Takes sqrt(squared_norms[0] + squared_norms[1] + ...), each float64 [n], added in order."""
    total = squared_norms[0]
    for squared_norm in squared_norms[1:]:
        total = total + squared_norm
    return exact_sqrt(total)


def _require_range(squared_norm: Tensor, enlarged: Callable[[], Tensor], name: str) -> None:
    """Raises if finite float64 weights have squares that overflow, or vanish."""
    small = squared_norm < _LOST
    if torch.isinf(squared_norm).any() or (small.any() and (small & (enlarged() > 0)).any()):
        raise LapValueError(
            "squared norms within float64's range in {argument}",
            "one that leaves it",
            "Multiply {argument} by a power of two; a common factor changes no mask.",
            argument=name,
        )
