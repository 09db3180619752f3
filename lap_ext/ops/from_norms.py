# SPDX-License-Identifier: MIT
"""Scores and masks of one layer from neighbor norms that the caller has computed.

    score[o, i, ...] = |w[o, i, ...]| * in_norm[i] * out_norm[o]

For norms made from activations, gradients or a graph, and for reusing those of `neighbor_norms`.
"""

from __future__ import annotations

from typing import SupportsIndex

from torch import Tensor

from lap_ext.errors import calling
from lap_ext.ops import check, schema, torch_args


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
    """Scores every weight from one norm per input and one per output channel.

        score[o, i, ...] = |w[o, i, ...]| * in_norm[i] * out_norm[o]

    Args:
        w: weight to score, [O, I / groups, *K] ([I, O / groups, *K] when transposed).
        in_norm: [I], >= 0, any of the four floating dtypes. None: ones.
        out_norm: [O], likewise.
        groups: groups of w.
        transposed: w is the weight of a transposed convolution.
        check_finite: raise on a weight or norm that is inf or NaN, and on a negative norm.

    Returns:
        Scores, shape of w, contiguous, w's device, float32 (float64 for float64 weights). Not
        differentiable.

    Raises:
        ValueError: a norm of another length or device, a norm < 0, a weight that is not finite.
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
    sparsity: check.Number | None = None,
    *,
    keep: SupportsIndex | None = None,
    mask: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Selects the weights with the largest scores, from norms: a mask of exactly `keep` of them.

    The scores are those of `score_from_norms`, the choice is that of `lap_ext.mask`.

    Args:
        w: weight to prune, [O, I / groups, *K] ([I, O / groups, *K] when transposed).
        in_norm: [I], >= 0, any of the four floating dtypes. None: ones.
        out_norm: [O], likewise.
        sparsity: fraction of all weights of w to remove, 0 to 1.
        keep: number of weights to keep, instead of sparsity.
        mask: bool, shape of w: the weights that may be kept.
        groups: groups of w.
        transposed: w is the weight of a transposed convolution.
        check_finite: raise on a weight or norm that is inf or NaN, and on a negative norm.

    Returns:
        Bool tensor, True: kept; shape of w, contiguous, w's device.

    Raises:
        ValueError: as `score_from_norms` and `lap_ext.mask`.
        TypeError: as `score_from_norms` and `lap_ext.mask`.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2.], [3., 4.]])
        >>> lap_ext.mask_from_norms(w, torch.tensor([1., 10.]), None, keep=2)
        tensor([[False,  True],
                [False,  True]])
    """
    w = torch_args.weight(w, groups, transposed)
    count = check.keep_count(sparsity, keep, w.numel())
    eligible = torch_args.eligible("mask", mask, "w", w)
    norms = torch_args.given_norms(w, in_norm, out_norm, groups, transposed)
    return schema.call(schema.mask, w, *norms, count, eligible, groups, transposed, check_finite)


@calling("prune_from_norms_")
def prune_from_norms_(
    w: Tensor,
    in_norm: Tensor | None,
    out_norm: Tensor | None,
    sparsity: check.Number | None = None,
    *,
    keep: SupportsIndex | None = None,
    mask: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Does what `mask_from_norms` does, and sets the weights that are not kept to +0.0, in place.

    Args:
        w: weight to prune, [O, I / groups, *K] ([I, O / groups, *K] when transposed).
        in_norm: [I], >= 0, any of the four floating dtypes. None: ones.
        out_norm: [O], likewise.
        sparsity: fraction of all weights of w to remove, 0 to 1.
        keep: number of weights to keep, instead of sparsity.
        mask: bool, shape of w: the weights that may be kept.
        groups: groups of w.
        transposed: w is the weight of a transposed convolution.
        check_finite: raise on a weight or norm that is inf or NaN, and on a negative norm.

    Returns:
        Bool tensor, True: kept; shape of w, contiguous, w's device.

    Raises:
        ValueError: as `mask_from_norms`; elements of w share memory (an expanded tensor).
        TypeError: as `mask_from_norms`.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2.], [3., 4.]])
        >>> kept = lap_ext.prune_from_norms_(w, torch.tensor([1., 10.]), None, keep=2)
        >>> w
        tensor([[ 0., -2.],
                [ 0.,  4.]])
    """
    target = torch_args.weight(w, groups, transposed)
    torch_args.writable(target)
    count = check.keep_count(sparsity, keep, w.numel())
    eligible = torch_args.eligible("mask", mask, "w", target)
    norms = torch_args.given_norms(target, in_norm, out_norm, groups, transposed)
    kept = schema.call(
        schema.prune_, target, *norms, count, eligible, groups, transposed, check_finite
    )
    torch_args.mark_changed(w)
    return kept
