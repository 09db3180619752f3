# SPDX-License-Identifier: MIT
"""Selects exactly among given scores, of one tensor or of several tensors ranked together.

Larger scores come first. Of equal scores, the one in the earlier tensor comes first, and within a
tensor the one with the lower flat (C-order) index. -0.0 equals +0.0. Nothing is sorted or
concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, overload

from torch import Tensor

from lap_ext.errors import calling
from lap_ext.ops import check, schema, selection, torch_args
from lap_ext.structures import Aggregate, StructureLike


@overload
def topk_mask(
    scores: Tensor,
    *,
    keep: SupportsIndex | None = None,
    sparsity: check.Number | None = None,
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    mask: Tensor | None = None,
    check_finite: bool = True,
) -> Tensor: ...
@overload
def topk_mask(
    scores: Sequence[Tensor],
    *,
    keep: SupportsIndex | None = None,
    sparsity: check.Number | None = None,
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    mask: Sequence[Tensor] | None = None,
    check_finite: bool = True,
) -> list[Tensor]: ...
@calling("topk_mask")
def topk_mask(
    scores: Tensor | Sequence[Tensor],
    *,
    keep: SupportsIndex | None = None,
    sparsity: check.Number | None = None,
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    mask: Tensor | Sequence[Tensor] | None = None,
    check_finite: bool = True,
) -> Tensor | list[Tensor]:
    """Selects exactly `keep` scores, the largest ones, and returns a mask of them.

        keep = floor((1 - sparsity) * n + 1/2)      n: number of all scores

    With a structure, the scores of a unit go together, as in `lap_ext.structures`; the units of all
    tensors are ranked together, and an N:M pattern holds in each. The pure-PyTorch fallback
    temporarily stores one integer key per score.

    Args:
        scores: float32, float64, float16 or bfloat16 tensor with any shape and strides. Scores may
            have any sign and may be +-inf. The tensors of a list or tuple must share one dtype and
            one device; they are ranked together.
        keep: number of scores to keep over all tensors. If it exceeds their number, all are kept.
        sparsity: fraction of all scores to drop, 0 to 1, given instead of keep.
        structure: what is dropped together, as in `lap_ext.mask`. A vector counts as one row. The
            scores of units and of transposable patterns must be >= 0, for they are added.
        aggregate: what a unit is worth, "energy" or "mean" ("exact" needs weights).
        mask: bool tensor with the shape of scores (a list for a list); True marks the scores that
            may be kept.
        check_finite: whether to raise an error on NaN. If False, a NaN ranks by its bits.

    Returns:
        Bool tensor with the shape of scores, in which True marks the kept scores; for a list of
        scores, a list of such tensors.

    Raises:
        ValueError: a score is NaN; sparsity is outside [0, 1] or keep is negative; both or neither
            of them is given; scores do not fit the structure; a mask has another shape; tensors are
            on different devices.
        TypeError: scores are not floating-point tensors, or have different dtypes.

    Example:
        >>> import torch, lap_ext
        >>> lap_ext.topk_mask(torch.tensor([3., 1., 3., 2.]), keep=2)
        tensor([ True, False,  True, False])
        >>> lap_ext.topk_mask([torch.tensor([1., 5.]), torch.tensor([4.])], sparsity=0.5)
        [tensor([False,  True]), tensor([True])]
        >>> lap_ext.topk_mask(torch.tensor([-3., -1., 5., 4.]), structure="1:2")
        tensor([False,  True,  True, False])
    """
    single, checked = _scores(scores)
    count = sum(x.numel() for x in checked)
    chosen = selection.choice(structure, aggregate, sparsity, keep, count)
    masks = _masks(mask, single, checked)
    if not checked:
        return []
    names = ["scores"] if single else [f"scores[{t}]" for t in range(len(checked))]
    kept = selection.of_scores(checked, names, chosen, masks, check_finite)
    return kept[0] if single else kept


@calling("kth_largest")
def kth_largest(
    scores: Tensor | Sequence[Tensor], k: SupportsIndex, *, check_finite: bool = True
) -> Tensor:
    """Finds exactly the k-th largest of all scores; k = 1 gives the largest.

    Args:
        scores: tensor of any shape and strides, or a list or tuple of tensors, as in `topk_mask`.
        k: rank, 1 to the number of all scores.
        check_finite: whether to raise an error on NaN. If False, a NaN ranks by its bits.

    Returns:
        0-d tensor with the dtype and device of scores; a zero is returned as +0.0.

    Raises:
        ValueError: a score is NaN, k is not between 1 and the number of all scores, or tensors are
            on different devices.
        TypeError: scores are not floating-point tensors, or have different dtypes.

    Example:
        >>> import torch, lap_ext
        >>> lap_ext.kth_largest(torch.tensor([[3., 1.], [3., 2.]]), 3)
        tensor(2.)
    """
    _, checked = _scores(scores)
    count = check.rank(k, sum(x.numel() for x in checked))
    value = schema.call(schema.kth_largest, checked, count, check_finite)
    return value.to(checked[0].dtype)


def _scores(scores: Any) -> tuple[bool, list[Tensor]]:
    """Checks scores; returns (whether they are one tensor, their tensors)."""
    if not isinstance(scores, (list, tuple)):
        return True, [torch_args.floating("scores", scores)]
    checked = [torch_args.floating(f"scores[{t}]", x) for t, x in enumerate(scores)]
    for x in checked[1:]:
        if x.dtype != checked[0].dtype:
            check.one_of_a_kind("dtype", [str(x.dtype) for x in checked])
        if x.device != checked[0].device:
            check.one_of_a_kind("device", [str(x.device) for x in checked])
    return False, checked


def _masks(mask: Any, single: bool, scores: list[Tensor]) -> list[Tensor]:
    """Checks masks of scores; returns one contiguous mask per tensor of scores, or none."""
    if mask is None:
        return []
    if single:
        masks = [torch_args.eligible("mask", mask, "scores", scores[0])]
    else:
        check.one_mask_each(mask, len(scores))
        masks = [
            torch_args.eligible(f"mask[{t}]", m, f"scores[{t}]", x)
            for t, (m, x) in enumerate(zip(mask, scores, strict=True))
        ]
    return [m for m in masks if m is not None]
