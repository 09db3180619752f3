# SPDX-License-Identifier: MIT
"""Scores and masks of one layer from two factors that the caller has worked out.

    score[o, i, ...] = |w[o, i, ...]| * in_norm[i] * out_norm[o]

For factors made from activations, gradients or a graph, and for reusing those of `factors`.
"""

from __future__ import annotations

from typing import SupportsIndex

from torch import Tensor

from lap_ext.ops import check, schema, torch_args


def score_from_factors(
    w: Tensor,
    in_norm: Tensor | None,
    out_norm: Tensor | None,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Score of every weight from one factor per input and one per output channel.

        score[o, i, ...] = |w[o, i, ...]| * in_norm[i] * out_norm[o]

    Args:
        w: weight to score, [O, I / groups, *K] ([I, O / groups, *K] when transposed).
        in_norm: [I], >= 0, any of the four floating dtypes. None: ones.
        out_norm: [O], likewise.
        groups: groups of w.
        transposed: w is the weight of a transposed convolution.
        check_finite: raise on a weight or factor that is inf or NaN, and on a negative factor.

    Returns:
        Scores, shape of w, contiguous, w's device, float32 (float64 for float64 weights). Not
        differentiable.

    Raises:
        ValueError: a factor of another length or device, a factor < 0, a weight that is not finite.
        TypeError: w or a factor is not a floating-point tensor.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2.], [3., 4.]])
        >>> lap_ext.score_from_factors(w, torch.tensor([1., 10.]), torch.tensor([1., 0.5]))
        tensor([[ 1.0000, 20.0000],
                [ 1.5000, 20.0000]])
    """
    name = "score_from_factors"
    w = torch_args.weight(name, w, groups, transposed)
    norms = torch_args.given_norms(name, w, in_norm, out_norm, groups, transposed)
    return schema.call(name, schema.score, w, *norms, groups, transposed, check_finite)


def mask_from_factors(
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
    """Mask of the weights with the largest scores, from factors: exactly `keep` of them.

    The scores are those of `score_from_factors`, the choice is that of `lap_ext.mask`.

    Args:
        w: weight to prune, [O, I / groups, *K] ([I, O / groups, *K] when transposed).
        in_norm: [I], >= 0, any of the four floating dtypes. None: ones.
        out_norm: [O], likewise.
        sparsity: fraction of all weights of w to remove, 0 to 1.
        keep: number of weights to keep, instead of sparsity.
        mask: bool, shape of w: the weights that may be kept.
        groups: groups of w.
        transposed: w is the weight of a transposed convolution.
        check_finite: raise on a weight or factor that is inf or NaN, and on a negative factor.

    Returns:
        Bool tensor, True: kept; shape of w, contiguous, w's device.

    Raises:
        ValueError: as `score_from_factors` and `lap_ext.mask`.
        TypeError: as `score_from_factors` and `lap_ext.mask`.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2.], [3., 4.]])
        >>> lap_ext.mask_from_factors(w, torch.tensor([1., 10.]), None, keep=2)
        tensor([[False,  True],
                [False,  True]])
    """
    name = "mask_from_factors"
    w = torch_args.weight(name, w, groups, transposed)
    count = check.keep_count(name, sparsity, keep, w.numel())
    eligible = torch_args.eligible(name, "mask", mask, "w", w)
    norms = torch_args.given_norms(name, w, in_norm, out_norm, groups, transposed)
    return schema.call(
        name, schema.mask, w, *norms, count, eligible, groups, transposed, check_finite
    )


def prune_from_factors_(
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
    """As `mask_from_factors`, and sets the weights that are not kept to zero (+0.0), in place.

    Args:
        w: weight to prune, [O, I / groups, *K] ([I, O / groups, *K] when transposed).
        in_norm: [I], >= 0, any of the four floating dtypes. None: ones.
        out_norm: [O], likewise.
        sparsity: fraction of all weights of w to remove, 0 to 1.
        keep: number of weights to keep, instead of sparsity.
        mask: bool, shape of w: the weights that may be kept.
        groups: groups of w.
        transposed: w is the weight of a transposed convolution.
        check_finite: raise on a weight or factor that is inf or NaN, and on a negative factor.

    Returns:
        Bool tensor, True: kept; shape of w, contiguous, w's device.

    Raises:
        ValueError: as `mask_from_factors`; elements of w share memory (an expanded tensor).
        TypeError: as `mask_from_factors`.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2.], [3., 4.]])
        >>> kept = lap_ext.prune_from_factors_(w, torch.tensor([1., 10.]), None, keep=2)
        >>> w
        tensor([[ 0., -2.],
                [ 0.,  4.]])
    """
    name = "prune_from_factors_"
    target = torch_args.weight(name, w, groups, transposed)
    torch_args.writable(name, target)
    count = check.keep_count(name, sparsity, keep, w.numel())
    eligible = torch_args.eligible(name, "mask", mask, "w", target)
    norms = torch_args.given_norms(name, target, in_norm, out_norm, groups, transposed)
    kept = schema.call(
        name, schema.prune_, target, *norms, count, eligible, groups, transposed, check_finite
    )
    torch_args.mark_changed(w)
    return kept
