# SPDX-License-Identifier: MIT
"""Exact selection in plain PyTorch, for reference.py.

A score becomes an ordered integer key (csrc/math/key.h). The keep-th largest key is bracketed by a
strided sample and found among the few keys inside the bracket (among all keys if the sample
misled); then the weights above it are kept, and of those equal to it the first ones, found by
counting halves. Counts are exact (int64); nothing is sorted but the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SAMPLE = (1 << 12, 1 << 15)  # least and most keys of the sample, 1/64 of all between
_MARGIN = 4.0  # standard deviations of the sample's rank on either side
_SMALL = 1 << 17  # fewer keys are not worth a sample


def never(integer: torch.dtype) -> int:
    """The key of a weight that may not be kept, below every other key."""
    return torch.iinfo(integer).min


def ordered_keys(scores: Tensor, without_nan: bool) -> Tensor:
    """Int32 (int64 for float64) keys that sort as the scores do, contiguous; -0.0 equals +0.0.

    A NaN, unless it is known that there is none, has the largest key.
    """
    double = scores.dtype == torch.float64
    wide = scores.to(torch.float64 if double else torch.float32) + 0.0
    keys = _flip(wide.contiguous().view(torch.int64 if double else torch.int32))
    return keys if without_nan else keys.masked_fill_(wide.isnan(), torch.iinfo(keys.dtype).max)


def _flip(bits: Tensor) -> Tensor:
    """Float bits to ordered key, and back."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def topk_mask(
    scores: list[Tensor], keep: int, masks: list[Tensor], check_finite: bool
) -> list[Tensor]:
    """Masks of the keep largest of all scores; masks [] or one per tensor names the eligible.

    Extra memory: a key for every score (the native kernels need none).
    """
    if check_finite:
        _require_numbers(scores, "topk_mask")
    keys = [ordered_keys(x, without_nan=check_finite) for x in scores]
    for key, mask in zip(keys, masks, strict=False):
        key.masked_fill_(~mask, never(key.dtype))
    return select(keys, keep)[0]


def kth_largest(scores: list[Tensor], k: int, check_finite: bool) -> Tensor:
    """The k-th largest of all scores, 0-d float32 (float64 for float64), 1 <= k <= all.

    Extra memory: a key for every score (the native kernels need none).
    """
    if check_finite:
        _require_numbers(scores, "kth_largest")
    keys = [ordered_keys(x, without_nan=check_finite) for x in scores]
    key = torch.tensor(_kth_key(keys, k), dtype=keys[0].dtype, device=scores[0].device)
    return _flip(key).view(torch.float64 if key.dtype == torch.int64 else torch.float32)


def _require_numbers(scores: Sequence[Tensor], op: str) -> None:
    for t, x in enumerate(scores):
        if x.numel() == 0 or not torch.isnan(x.aminmax()[0]):
            continue
        bad = torch.isnan(x).flatten()
        name = "scores" if len(scores) == 1 else f"scores[{t}]"
        raise ValueError(
            f"{op}: expected scores without NaN in {name}, got {int(bad.count_nonzero())} NaN "
            f"values, the first at flat index {int(bad.to(torch.uint8).argmax())}. Repair them, "
            "or pass check_finite=False to rank them as they come."
        )


def select(keys: list[Tensor], keep: int) -> tuple[list[Tensor], int | None]:
    """Masks of the keep largest keys, and the smallest key kept.

    The key is None where no threshold was needed (nothing, or everything eligible, is kept).
    """
    eligible = [key > never(key.dtype) for key in keys]
    if keep >= sum(int(flags.count_nonzero()) for flags in eligible):
        return eligible, None
    if keep <= 0:
        return [torch.zeros_like(flags) for flags in eligible], None
    threshold = _kth_key(keys, keep)
    kept = [key >= threshold for key in keys]
    surplus = sum(int(flags.count_nonzero()) for flags in kept) - keep
    for key, flags in zip(reversed(keys), reversed(kept), strict=True):
        if surplus <= 0:
            break
        surplus -= _drop_last_ties(flags, key == threshold, surplus)
    return kept, threshold


def _drop_last_ties(kept: Tensor, ties: Tensor, surplus: int) -> int:
    """Clears the last surplus ties in kept, or all if there are fewer; returns how many."""
    count = int(ties.count_nonzero())
    drop = min(surplus, count)
    cut = _prefix(ties.view(-1), count - drop)
    kept.view(-1)[cut:] &= ~ties.view(-1)[cut:]
    return drop


def _prefix(flags: Tensor, count: int) -> int:
    """Length of the shortest prefix of flags [n] that holds count of them; reads 2 n flags."""
    if count == 0:
        return 0
    begin, end = 0, flags.numel()
    while end - begin > 1:
        middle = (begin + end) // 2
        found = int(flags[begin:middle].count_nonzero())
        if found >= count:
            end = middle
        else:
            count -= found
            begin = middle
    return end


def _kth_key(keys: list[Tensor], k: int) -> int:
    """The k-th largest of all keys, 1 <= k <= all."""
    total = sum(key.numel() for key in keys)
    above, inside = 0, None
    if total >= _SMALL:
        low, high = _bracket(keys, k, total)
        above = sum(int((key > high).count_nonzero()) for key in keys)
        if low == high and above < k <= above + sum(
            int((key == low).count_nonzero()) for key in keys
        ):
            return low
        inside = torch.cat([key[(key >= low) & (key <= high)] for key in keys])
    if inside is None or not above < k <= above + inside.numel():
        above, inside = 0, torch.cat([key.view(-1) for key in keys])  # small, or a misled sample
    return int(inside.kthvalue(inside.numel() - (k - above) + 1).values)


def _bracket(keys: list[Tensor], k: int, total: int) -> tuple[int, int]:
    """Keys that probably enclose the k-th largest, from a sample of every step-th key."""
    step = total // min(max(_SAMPLE[0], total >> 6), _SAMPLE[1]) | 1
    sample = torch.cat([key.view(-1)[::step] for key in keys]).sort(descending=True).values
    size = sample.numel()
    part = k / total
    margin = _MARGIN * math.sqrt(size * part * (1 - part)) + 2
    first, last = math.floor(part * size - margin), math.ceil(part * size + margin)
    info = torch.iinfo(sample.dtype)
    high = int(sample[first]) if first >= 0 else info.max
    low = int(sample[last]) if last < size else info.min
    return low, high
