# SPDX-License-Identifier: MIT
"""Sums float64 numbers exactly and rounds once: the bits of math.fsum, from tensors of any size.

A number is an integer of 53 bits times a power of two. Its upper 26 and lower 27 bits are added
by exponent in int64, and the sums join one Python integer, so that neither the order nor the
chunks in which the numbers come matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BATCH = 1 << 15  # numbers at a time: they stay in the cache, and no sum of 27 bits leaves int64
_DIGITS, _LOWER = 53, 27
_LEAST = -1073  # the exponent of the least number, 1/2 * 2^-1073
_UNIT = 1 << (_DIGITS - _LEAST)  # sums are counted in 1 / _UNIT
_EXPONENTS = 1024 - _LEAST + 1


class ExactSum:
    """The exact sum of the numbers so far.

    Example:
        >>> total = ExactSum()
        >>> total.add(torch.tensor([1e300, 1.0], dtype=torch.float64))
        >>> total.add(torch.tensor([-1e300], dtype=torch.float64))
        >>> total.value()
        1.0
    """

    def __init__(self) -> None:
        self._units = 0
        self._not_finite = 0.0

    def add(self, numbers: Tensor) -> None:
        """Adds float64 numbers."""
        for batch in numbers.flatten().split(_BATCH):
            finite = batch.isfinite()
            if bool(finite.all()):
                self._units += _in_units(batch.cpu())
            else:
                self._not_finite += float(batch[~finite].sum())

    def value(self) -> float:
        """Rounds the sum to the nearest float; it is inf or NaN as IEEE 754 adds such numbers."""
        if self._not_finite != 0:
            return self._not_finite
        try:
            return self._units / _UNIT  # of integers: rounded once
        except OverflowError:
            return float("inf") if self._units > 0 else float("-inf")


def _in_units(numbers: Tensor) -> int:
    """Sums finite numbers on the CPU in units."""
    mantissas, exponents = torch.frexp(numbers)
    whole = (mantissas * 2.0**_DIGITS).long()
    index = exponents.long() - _LEAST
    upper, lower = torch.zeros(2, _EXPONENTS, dtype=torch.int64, device="cpu")
    upper.index_add_(0, index, whole >> _LOWER)
    lower.index_add_(0, index, whole & ((1 << _LOWER) - 1))
    used = (upper != 0).logical_or_(lower != 0).nonzero().flatten()
    parts = zip(used.tolist(), upper[used].tolist(), lower[used].tolist(), strict=True)
    return sum(((high << _LOWER) + low) << shift for shift, high, low in parts)
