# SPDX-License-Identifier: MIT
"""Makes scores of different layers comparable; the definitions that shares.py must agree with.

    norm    s / ||s||_2 of the layer
    lamp    s_j^2 / sum of s_m^2 over the weights of the layer ranked at or above j
            (Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021)

Of equal scores, the one with the lower index ranks higher. The sums of "lamp" are of integers, so
that neither the order nor the chunks in which scores come matter:

    e        the exponent of the layer's largest score: 2^(e-1) <= max < 2^e
    q        (s * 2^-e)^2 in float64, below 1
    sum      of floor(q * 2^60), in units of 2^-60; as float64: its upper part (units of 2^-30)
             rounded to float64, plus its lower 30 bits
    result   q / sum
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.ops import schema
from lap_ext.ops.reference.chunks import DIGITS, LOWER, parts_of, squared
from lap_ext.pruning.exact_sum import ExactSum

_SQUARED = 1 << 18  # scores whose squares are summed at a time
_SORTED = 1 << 17  # sorted scores that are divided at a time

Sums = tuple[Tensor, Tensor]  # upper and lower parts, int64


def normalized(scores: Tensor, how: str, mask: Tensor | None) -> Tensor:
    """Makes a layer's scores comparable with those of other layers; counts only those in mask."""
    if how == "none":
        return scores
    masked = scores if mask is None else scores * mask
    if masked.numel():
        require_finite_scores(float(masked.max()), how)
    if how == "norm":
        return over(masked, size_of(squares_of(masked)))
    return lamp(masked)


def require_finite_scores(largest: float, how: str) -> None:
    """Raises if the largest score of a layer is infinite."""
    if math.isinf(largest):
        raise LapValueError(
            f"finite scores for {{normalize={how!r}}}",
            "infinite ones: products of a weight and norms beyond the range of their dtype",
            "Convert the model to float64, or scale its weights down.",
        )


def squares_of(scores: Tensor, squares: ExactSum | None = None) -> ExactSum:
    """Sums the squares of scores, or adds them to a sum; any chunks of whole rows have its bits.

    Each row (of the last dimension) is summed as row_squared_norms does, and the sum of these is
    exact.
    """
    squares = ExactSum() if squares is None else squares
    width = scores.shape[-1] if scores.dim() else 1
    if scores.numel():
        for rows in scores.reshape(-1, width).split(max(1, _SQUARED // width)):
            squares.add(schema.row_squared_norms(rows, False, "scores"))
    return squares


def size_of(squares: ExactSum) -> float:
    """Takes the norm of a layer's scores from the sum of their squares."""
    size = math.sqrt(squares.value())
    if not math.isfinite(size):
        raise LapValueError("scores with a finite norm", size)
    return size


def over(scores: Tensor, size: float) -> Tensor:
    """Divides scores by size, the norm of all scores of their layer; computes in float64."""
    scores = scores.double()
    return scores / size if size > 0 else scores


def lamp(scores: Tensor) -> Tensor:
    """Divides each squared score by the sum of the squares that are not smaller, in float64.

        lamp[j] = s[j]^2 / sum of s[m]^2 over m ranked at or above j

    Of equal scores, the one with the lower index ranks higher and so has the larger result.
    The largest result is 1, so that no layer is emptied before the others.
    """
    flat = scores.flatten()
    result = torch.empty(flat.shape, dtype=torch.float64, device=flat.device)
    ordered, order = torch.sort(flat, descending=True, stable=True)
    exponent = exponent_of(float(ordered[0])) if ordered.numel() else 0
    above = 0
    for values, index in zip(ordered.split(_SORTED), order.split(_SORTED), strict=True):
        q = squared(values, exponent)
        sums = running(above, parts_of(q))
        above = total_of((sums[0][-1], sums[1][-1]))
        result[index] = quotients(q, sums)
    return result.reshape(scores.shape)


def exponent_of(largest: float) -> int:
    """Returns e, such that the largest score of a layer is below 2^e."""
    return math.frexp(largest)[1]


def running(above: int, parts: Sums, counts: Tensor | None = None) -> Sums:
    """Adds each to those before it, and to above; counts says how often each occurs."""
    upper, lower = parts if counts is None else (part * counts for part in parts)
    return upper.cumsum(0) + (above >> DIGITS), lower.cumsum(0) + (above & LOWER)


def total_of(sums: Sums) -> int:
    """Joins the parts of one sum."""
    return (int(sums[0]) << DIGITS) + int(sums[1])


def quotients(q: Tensor, sums: Sums) -> Tensor:
    """Divides squares by their sums; 0 is 0, whatever the sum."""
    upper, lower = sums[0] + (sums[1] >> DIGITS), sums[1] & LOWER
    divisor = upper.double() + lower.double() * 2.0**-DIGITS
    return torch.where(q > 0, q * 2.0**DIGITS / divisor, 0.0)


def quotient(q: float, total: int) -> float:
    """Divides one square by its sum, as `quotients` does."""
    divisor = float(total >> DIGITS) + float(total & LOWER) * 2.0**-DIGITS
    if q == 0:
        return 0.0
    return q * 2.0**DIGITS / divisor if divisor else math.inf
