# SPDX-License-Identifier: MIT
"""Computes scores and masks of one layer from neighbor norms that the caller has computed.

    score[o, i, ...] = |w[o, i, ...]| * in_norm[i] * out_norm[o]

The norms may come from activations, gradients or a graph, or be reused from `neighbor_norms`.
"""

from __future__ import annotations

from typing import SupportsIndex

from torch import Tensor

from lap_ext.errors import calling
from lap_ext.ops import check, schema, selection, torch_args
from lap_ext.structures import Aggregate, StructureLike


@calling("score_from_norms")
def score_from_norms(
    w: Tensor,
    in_norm: Tensor | None,
    out_norm: Tensor | None,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Scores every weight from one norm per input channel and one per output channel.

        score[o, i, ...] = |w[o, i, ...]| * in_norm[i] * out_norm[o]

    Args:
        w: weight to score, [O, I / groups, *K], or [I, O / groups, *K] if transposed.
        in_norm: norms [I] >= 0 in float32, float64, float16 or bfloat16. None stands for ones.
        out_norm: norms [O], with the same choices as in_norm.
        groups: number of groups of w.
        transposed: whether w is the weight of a transposed convolution.
        check_finite: whether to raise an error if a weight or norm is inf or NaN, or a norm < 0.

    Returns:
        Scores with the shape of w, contiguous, on w's device. Their dtype is float64 if w is
        float64, otherwise float32. They are not differentiable.

    Raises:
        ValueError: a norm tensor has another length or device, a norm is < 0, or a weight or norm
            is not finite.
        TypeError: w or a norm is not a floating-point tensor.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2.], [3., 4.]])
        >>> lap_ext.score_from_norms(w, torch.tensor([1., 10.]), torch.tensor([1., 0.5]))
        tensor([[ 1.0000, 20.0000],
                [ 1.5000, 20.0000]])
    """
    w = torch_args.weight(w, groups, transposed)
    norms = torch_args.given_norms(w, in_norm, out_norm, groups, transposed)
    return schema.call(schema.score, w, *norms, groups, transposed, check_finite)


@calling("mask_from_norms")
def mask_from_norms(
    w: Tensor,
    in_norm: Tensor | None,
    out_norm: Tensor | None,
    *,
    sparsity: check.Number | None = None,
    keep: SupportsIndex | None = None,
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    mask: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Selects exactly `keep` weights of one layer, those with the largest scores, from given norms.

    The scores are those of `score_from_norms`; the selection follows the rules of `lap_ext.mask`.

    Args:
        w: weight to prune, [O, I / groups, *K], or [I, O / groups, *K] if transposed.
        in_norm: norms [I] >= 0 in float32, float64, float16 or bfloat16. None stands for ones.
        out_norm: norms [O], with the same choices as in_norm.
        sparsity: fraction of all weights of w to remove, 0 to 1.
        keep: number of weights to keep, given instead of sparsity.
        structure: what is removed together, as in `lap_ext.mask`.
        aggregate: what a unit is worth, "energy" or "mean" ("exact" needs the neighbors).
        mask: bool tensor with the shape of w; True marks the weights that may be kept.
        groups: number of groups of w.
        transposed: whether w is the weight of a transposed convolution.
        check_finite: whether to raise an error if a weight or norm is inf or NaN, or a norm < 0.

    Returns:
        Bool tensor with the shape of w, contiguous, on w's device; True marks the kept weights.

    Raises:
        ValueError: as for `score_from_norms` and `lap_ext.mask`.
        TypeError: as for `score_from_norms` and `lap_ext.mask`.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2.], [3., 4.]])
        >>> lap_ext.mask_from_norms(w, torch.tensor([1., 10.]), None, keep=2)
        tensor([[False,  True],
                [False,  True]])
        >>> lap_ext.mask_from_norms(w, torch.tensor([10., 1.]), None, structure="1:2")
        tensor([[ True, False],
                [ True, False]])
    """
    w = torch_args.weight(w, groups, transposed)
    chosen = selection.choice(structure, aggregate, sparsity, keep, w.numel())
    eligible = torch_args.eligible("mask", mask, "w", w)
    norms = torch_args.given_norms(w, in_norm, out_norm, groups, transposed)
    return selection.mask(w, norms, chosen, eligible, groups, transposed, check_finite)


@calling("prune_from_norms_")
def prune_from_norms_(
    w: Tensor,
    in_norm: Tensor | None,
    out_norm: Tensor | None,
    *,
    sparsity: check.Number | None = None,
    keep: SupportsIndex | None = None,
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    mask: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Selects weights like `mask_from_norms` and sets the other weights to +0.0, in place.

    Args:
        w: weight to prune, [O, I / groups, *K], or [I, O / groups, *K] if transposed.
        in_norm: norms [I] >= 0 in float32, float64, float16 or bfloat16. None stands for ones.
        out_norm: norms [O], with the same choices as in_norm.
        sparsity: fraction of all weights of w to remove, 0 to 1.
        keep: number of weights to keep, given instead of sparsity.
        structure: what is removed together, as in `lap_ext.mask`.
        aggregate: what a unit is worth, "energy" or "mean" ("exact" needs the neighbors).
        mask: bool tensor with the shape of w; True marks the weights that may be kept.
        groups: number of groups of w.
        transposed: whether w is the weight of a transposed convolution.
        check_finite: whether to raise an error if a weight or norm is inf or NaN, or a norm < 0.

    Returns:
        Bool tensor with the shape of w, contiguous, on w's device; True marks the kept weights.

    Raises:
        ValueError: as for `mask_from_norms`; or elements of w share memory (an expanded tensor).
        TypeError: as for `mask_from_norms`.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2.], [3., 4.]])
        >>> kept = lap_ext.prune_from_norms_(w, torch.tensor([1., 10.]), None, keep=2)
        >>> w
        tensor([[ 0., -2.],
                [ 0.,  4.]])
        >>> kept = lap_ext.prune_from_norms_(w, None, None, keep=2, structure="row")
        >>> w
        tensor([[0., 0.],
                [0., 4.]])
    """
    target = torch_args.weight(w, groups, transposed)
    torch_args.writable(target)
    chosen = selection.choice(structure, aggregate, sparsity, keep, w.numel())
    eligible = torch_args.eligible("mask", mask, "w", target)
    norms = torch_args.given_norms(target, in_norm, out_norm, groups, transposed)
    kept = selection.prune_(target, norms, chosen, eligible, groups, transposed, check_finite)
    torch_args.mark_changed(w)
    return kept
