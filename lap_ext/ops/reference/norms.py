# SPDX-License-Identifier: MIT
"""Squared norms of rows and columns in plain PyTorch.

Squares in float64, added in the fixed order of csrc/math/sums.h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lap_ext.ops.reference.common import exact_sqrt, require_finite

SEGMENT, LANES, SEGMENT_ROWS = 1024, 32, 64  # csrc/math/sums.h
_CHUNK = 1 << 17  # elements widened to float64 at a time: 1 MiB
_LOST = 2.0**-1000  # a float64 energy below this may have lost squares to underflow


def row_energy(weight: Tensor, check_finite: bool, name: str) -> Tensor:
    """Sum of squares of each row of weight [R, *rest] -> float64 [R]."""
    if check_finite:
        require_finite(weight, "factors", name)
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
        require_finite(weight, "factors", name)
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
    return exact_sqrt(total)


def _require_range(energy: Tensor, enlarged: Callable[[], Tensor], name: str) -> None:
    """Raises if finite float64 weights have squares that overflow, or vanish."""
    small = energy < _LOST
    if torch.isinf(energy).any() or (small.any() and (small & (enlarged() > 0)).any()):
        raise ValueError(
            f"factors: expected squared norms within float64's range in {name}, got one that "
            f"leaves it. Multiply {name} by a power of two; a common factor changes no mask."
        )
