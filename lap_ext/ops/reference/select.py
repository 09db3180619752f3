# SPDX-License-Identifier: MIT
"""Exact selection in plain PyTorch: masks of the k best weights, or of given scores.

A score becomes an ordered integer key (csrc/math/key.h). The keep-th largest key is bracketed by a
strided sample and found among the few keys inside the bracket (among all keys if the sample
misled); then the weights above it are kept, and of those equal to it the first ones, found by
bisection. Counts are exact (int64); nothing is sorted but the sample.

The score of a weight is a plain product of scaled norms. Where it underflows and that could change
the mask, the same roundings are made again in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lap_ext.errors import LapValueError, calling
from lap_ext.ops.reference.common import (
    RANK_AS_THEY_COME,
    outer,
    require_valid,
    rounded,
    rows_and_cols,
    score_dtype,
    times,
)
from lap_ext.ops.reference.key import flip, never, ordered_keys, score_keys
from lap_ext.ops.reference.scale import scaled_to_one

_SAMPLE = (1 << 12, 1 << 15)  # least and most keys of the sample, 1/64 of all between
_MARGIN = 4.0  # standard deviations of the sample's rank on either side
_SMALL = 1 << 17  # fewer keys are not worth a sample


@calling("mask")
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
    """Selects the keep weights with the largest scores among those that mask names.

    w [O, I / groups, *K] ([I, O / groups, *K] when transposed), in_norm [I], out_norm [O].
    """
    if check_finite:
        require_valid(w, in_norm, out_norm)
    return _mask(w, in_norm, out_norm, keep, mask, groups, transposed)


@calling("prune_")
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
    """Selects as mask does; then the weights that are not kept become +0.0."""
    if check_finite:
        require_valid(w, in_norm, out_norm)
    kept = _mask(w, in_norm, out_norm, keep, mask, groups, transposed)
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
) -> Tensor:
    dtype = score_dtype(w.dtype)
    (rows, least_row), (cols, least_col) = (
        scaled_to_one(norm) for norm in rows_and_cols(in_norm, out_norm, transposed)
    )
    rows, cols = rounded(rows, dtype), rounded(cols, dtype)
    eligible = w.numel() if mask is None else int(mask.count_nonzero())
    sure = not 0 < keep < eligible  # the result does not depend on the scores
    for kind in dict.fromkeys((dtype, torch.float64)):
        if sure or least_row * least_col >= 4 * torch.finfo(kind).tiny:
            kept = _select_scores(w, rows, cols, keep, mask, groups, dtype, kind)
            if kept is not None:
                return kept
    raise LapValueError(
        "products within float64's range",
        "scores around the threshold that underflow",
        "Multiply w, w_prev or w_next by a power of two; a common factor changes no mask.",
    )


def _select_scores(
    w: Tensor,
    rows: Tensor,
    cols: Tensor,
    keep: int,
    mask: Tensor | None,
    groups: int,
    dtype: torch.dtype,
    kind: torch.dtype,
) -> Tensor | None:
    """Selects by products in kind, rounded to dtype; None where an underflow could decide."""
    norms = outer(rows.to(kind), cols.to(kind), w, groups)
    scores = times(w, norms if kind == dtype else rounded(norms, dtype), kind)
    keys = score_keys(scores if kind == dtype else rounded(scores, dtype), mask)
    (kept,), threshold = select([keys], keep)
    tiny = int(torch.tensor(torch.finfo(kind).tiny, dtype=kind).view(keys.dtype))
    if threshold is None or threshold > tiny:
        return kept
    lost = (keys < tiny) & (keys != never(keys.dtype)) & (w != 0) & (norms != 0)
    return None if lost.any() else kept


@calling("topk_mask")
def topk_mask(
    scores: list[Tensor], keep: int, masks: list[Tensor], check_finite: bool
) -> list[Tensor]:
    """Selects the keep largest of all scores; masks [] or one per tensor names the eligible.

    Extra memory: a key for every score (the native kernels need none).
    """
    if check_finite:
        require_numbers(scores)
    keys = [ordered_keys(x, without_nan=check_finite) for x in scores]
    for key, mask in zip(keys, masks, strict=False):
        key.masked_fill_(~mask, never(key.dtype))
    return select(keys, keep)[0]


@calling("kth_largest")
def kth_largest(scores: list[Tensor], k: int, check_finite: bool) -> Tensor:
    """Finds the k-th largest of all scores, 0-d float32 (float64 for float64), 1 <= k <= all.

    Extra memory: a key for every score (the native kernels need none).
    """
    if check_finite:
        require_numbers(scores)
    keys = [ordered_keys(x, without_nan=check_finite) for x in scores]
    key = torch.tensor(_kth_key(keys, k), dtype=keys[0].dtype, device=scores[0].device)
    return flip(key).view(score_dtype(scores[0].dtype))


def require_numbers(scores: Sequence[Tensor]) -> None:
    """Raises if a score is NaN."""
    for t, x in enumerate(scores):
        if x.numel() == 0 or not torch.isnan(x.aminmax()[0]):
            continue
        bad = torch.isnan(x).flatten()
        name = "scores" if len(scores) == 1 else f"scores[{t}]"
        raise LapValueError(
            "scores without NaN in {argument}",
            f"{int(bad.count_nonzero())} NaN values, the first at flat index "
            f"{int(bad.to(torch.uint8).argmax())}",
            "Repair them.",
            option=RANK_AS_THEY_COME,
            argument=name,
        )


def select(keys: list[Tensor], keep: int) -> tuple[list[Tensor], int | None]:
    """Selects the keep largest keys: masks, and the smallest key kept.

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
    end = _prefix(ties.view(-1), count - drop)
    kept.view(-1)[end:] &= ~ties.view(-1)[end:]
    return drop


def _prefix(flags: Tensor, count: int) -> int:
    """Finds the length of the shortest prefix of flags [n] with count set ones; reads 2 n flags."""
    if count == 0:
        return 0
    begin, end = 0, flags.numel()
    while end - begin > 1:
        middle = (begin + end) // 2
        left = int(flags[begin:middle].count_nonzero())
        if left >= count:
            end = middle
        else:
            count -= left
            begin = middle
    return end


def _kth_key(keys: list[Tensor], k: int) -> int:
    """Finds the k-th largest of all keys, 1 <= k <= all."""
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
    """Finds keys that probably enclose the k-th largest, from a sample of every step-th key."""
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
