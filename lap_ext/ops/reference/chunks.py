# SPDX-License-Identifier: MIT
"""Ranking scores >= 0 that are never all in memory: what is asked of each chunk of them.

The key of a score is its IEEE bits as an integer: int32, int64 for float64. Where a mask is False
the key is -1, below all others. Results depend on nothing but the scores: not on how they are cut
into chunks, where they are added up, and not on threads.

Squares are summed in integers, so that their order does not matter either:

    q = (score * 2^-exponent)^2 in float64, below 1
    floor(q * 2^60) = upper * 2^30 + lower, which are summed apart
"""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.errors import LapValueError, calling
from lap_ext.ops.reference.key import key_dtype

DIGITS = 30  # of the lower part of a square; the upper part of a sum holds 2^33 squares below 1
LOWER = (1 << DIGITS) - 1
MOST_BINS = 1 << 15
EXPONENTS = (-1073, 1024)  # of float64's positive numbers: each is below 2^exponent
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio

_BATCH = 1 << 15  # numbers at a time: they stay in the cache, and torch uses one thread


@calling("count_keys")
def count_keys(
    scores: Tensor, mask: Tensor | None, low: int, high: int, take: bool
) -> tuple[Tensor, Tensor]:
    """Counts the keys above high and those from low to high: int64 [2], on the CPU.

    Also returns the latter, in flat order, or no keys unless take is set.
    """
    keys = _keys(scores, mask, low, high)
    inside = (keys >= low) & (keys <= high)
    counts = [int(x.count_nonzero()) for x in (keys > high, inside)]
    return torch.tensor(counts), keys[inside] if take else keys.new_empty(0)


@calling("key_histogram")
def key_histogram(
    scores: Tensor, mask: Tensor | None, low: int, high: int, shift: int, bins: int
) -> Tensor:
    """Counts the keys from low to high by (key - low) >> shift: int64 [bins]."""
    keys = _keys(scores, mask, low, high)
    fits = 1 <= bins <= MOST_BINS and 0 <= shift < torch.iinfo(keys.dtype).bits
    if not fits or (high - low) >> shift >= bins:
        raise LapValueError(
            f"(high - low) >> shift < bins <= {MOST_BINS}", f"shift {shift} and bins {bins}"
        )
    inside = keys[(keys >= low) & (keys <= high)].long()
    return torch.bincount((inside - low) >> shift, minlength=bins)


@calling("squares_above")
def squares_above(scores: Tensor, mask: Tensor | None, key: int, exponent: int) -> Tensor:
    """Sums the upper and the lower parts of the squares of the scores above key: int64 [2]."""
    keys = _keys(scores, mask, key)
    if not EXPONENTS[0] <= exponent <= EXPONENTS[1]:
        raise LapValueError("{} <= exponent <= {}".format(*EXPONENTS), exponent)
    q = squared(keys.clamp(min=0).view(scores.dtype), exponent)
    if not bool((q < 1).all()):
        raise LapValueError(f"scores below 2**{exponent}", "larger ones")
    return torch.stack([part.sum() for part in parts_of(q[keys > key])])


@calling("threshold_mask")
def threshold_mask(
    scores: Tensor, mask: Tensor | None, key: int, ties: int
) -> tuple[Tensor, Tensor]:
    """Masks the scores above key and the first ties of those at it, in flat order.

    Also returns how many of those at it: int64 [1]. What mask drops is never kept.
    """
    keys = _keys(scores, mask, key)
    kept = keys > key
    first = (keys == key).nonzero().flatten()[: max(ties, 0) if key >= 0 else 0]
    kept[first] = True
    return kept.view(scores.shape), torch.tensor([first.numel()], device=scores.device)


@calling("random_scores_")
def random_scores_(out: Tensor, start: int, first: int, step: int) -> None:
    """Fills contiguous out with the random scores of the numbers first, first + step, ...

    criteria.Random has their formula; all integers wrap to 64 bits.
    """
    flat = out.view(-1)
    steps = torch.arange(min(flat.numel(), _BATCH), device=out.device)
    steps *= signed(step * GOLDEN)
    x, other = torch.empty_like(steps), torch.empty_like(steps)
    for begin in range(0, flat.numel(), _BATCH):
        batch = flat[begin : begin + _BATCH]
        torch.add(steps, signed(start + (first + begin * step) * GOLDEN), out=x)
        _mix(x, other)
        batch.copy_(x[: batch.numel()]).add_(1).mul_(2.0**-24)


@calling("masked_zero_")
def masked_zero_(weight: Tensor, mask: Tensor) -> None:
    """Sets the weights where mask is False to +0.0, even where they are NaN; no other bit."""
    weight.masked_fill_(~mask.view(weight.shape), 0.0)


@calling("nonzero_mask")
def nonzero_mask(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks the weights that are not zero, and where a mask is given also True there.

    Also counts them: int64 [1], on the CPU. A NaN is not zero, -0.0 is.
    """
    live = weight.contiguous() != 0
    if mask is not None:
        live &= mask.view(live.shape)
    return live, torch.tensor([int(live.count_nonzero())])


def squared(scores: Tensor, exponent: int) -> Tensor:
    """Computes (scores * 2^-exponent)^2 in float64."""
    half = exponent // 2  # each factor is within float64's range
    return (scores.double() * 2.0**-half * 2.0 ** (half - exponent)).square()


def parts_of(q: Tensor) -> tuple[Tensor, Tensor]:
    """Splits floor(q * 2^60) into an upper and a lower part, int64."""
    units = (q * 2.0 ** (2 * DIGITS)).long()
    return units >> DIGITS, units & LOWER


def signed(x: int) -> int:
    """Wraps an integer to the range of int64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _keys(scores: Tensor, mask: Tensor | None, low: int, high: int | None = None) -> Tensor:
    """Views scores as keys, flat, after low and high are found to be ones."""
    dtype = key_dtype(scores.dtype)
    largest = torch.iinfo(dtype).max
    high = largest if high is None else high
    if not -1 <= low <= high <= largest:
        raise LapValueError(f"keys from -1 to {largest} that do not fall", f"{low} and {high}")
    keys = scores.flatten().view(dtype)
    return keys if mask is None else keys.masked_fill(~mask.flatten(), -1)


def _mix(x: Tensor, other: Tensor) -> None:
    """Mixes the bits of int64 x and leaves the upper 24 of them; overwrites other."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        torch.bitwise_right_shift(x, shift, out=other)
        x ^= other.bitwise_and_((1 << (64 - shift)) - 1)  # shifted as an unsigned number
        x *= signed(factor)
    x.bitwise_right_shift_(40).bitwise_and_((1 << 24) - 1)
