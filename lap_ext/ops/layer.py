# SPDX-License-Identifier: MIT
"""Computes scores and masks of one layer from its weight and those of its neighbors.

    score[o, i, ...] = |w[o, i, ...]| * in_norm[i] * out_norm[o]
    in_norm[i]  = sqrt(sum over producers of ||w_prev[i]||_F^2)
    out_norm[o] = sqrt(sum over consumers of ||w_next[:, o]||_F^2)

Each function checks its arguments and then calls the operators of schema.py. If it raises an error,
it has changed nothing.
Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020,
section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lap_ext.errors import LapTypeError, LapValueError, calling
from lap_ext.ops import check, schema, selection, torch_args
from lap_ext.ops.neighbors import Neighbor
from lap_ext.ops.reference.common import require_batch_norm
from lap_ext.structures import Aggregate, StructureLike

Neighbors: TypeAlias = Tensor | Neighbor | Sequence[Tensor | Neighbor | None] | None


@calling("score")
def score(
    w_prev: Neighbors,
    w: Tensor,
    w_next: Neighbors,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Scores every weight of one layer by lookahead.

        score[o, i, ...] = |w[o, i, ...]| * ||w_prev[i]||_F * ||w_next[:, o]||_F

    A small score means that removing the weight hardly changes the product of the three layers. The
    norms are summed in float64 in a fixed order and rounded to the score's precision; their product
    and the score are each rounded once. The result has the same bits on every device, for every
    memory layout and for every number of threads.

    Args:
        w_prev: weight of the layer before, [I, P, *K], whose outputs feed w's inputs. Pass a
            `Neighbor` for a grouped, depthwise or transposed convolution or if a batch norm lies
            in between, `IDENTITY` for a skip connection, and a list of these for several producers
            (their squared norms are added). Pass None for a first layer; the norms then count as 1.
            The dtype of w_prev may differ from w's.
        w: weight to score, [O, I / groups, *K], in float32, float64, float16 or bfloat16, with any
            strides.
        w_next: weight of the layer after, [N, O, *K], with the same choices as w_prev. A
            channel-major flatten between a convolution and a linear layer is recognized; the linear
            weight then has the shape [N, O * S] for S positions per channel.
        groups: number of groups of w.
        transposed: whether w is the weight of a transposed convolution, [I, O / groups, *K].
        check_finite: whether to raise an error if a weight is inf or NaN.

    Returns:
        Scores >= 0 with the shape of w, contiguous, on w's device. Their dtype is float64 if w is
        float64, otherwise float32. They are not differentiable.

    Raises:
        ValueError: channel counts do not match, the tensors are on different devices, or a weight
            is not finite.
        TypeError: a weight is not a floating-point tensor.

    Example:
        >>> import torch, lap_ext
        >>> w_prev, w = torch.tensor([[3., 4.]]), torch.tensor([[-2.]])
        >>> lap_ext.score(w_prev, w, torch.tensor([[1.]]))  # |-2| * 5 * 1
        tensor([[10.]])
        >>> lap_ext.score([w_prev, lap_ext.IDENTITY], w, None)  # |-2| * sqrt(25 + 1)
        tensor([[10.1980]])
    """
    w = torch_args.weight(w, groups, transposed)
    norms = torch_args.norms(w_prev, w, w_next, groups, transposed, check_finite)
    return schema.call(schema.score, w, *norms, groups, transposed, check_finite)


@calling("mask")
def mask(
    w_prev: Neighbors,
    w: Tensor,
    w_next: Neighbors,
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
    """Selects exactly `keep` weights of one layer, those with the largest lookahead scores.

        keep = floor((1 - sparsity) * w.numel() + 1/2)

    Of two equal scores, the one with the lower flat (C-order) index ranks first. The ranking stays
    exact even where a product of norms is too small or too large for float32. No score is stored,
    and w is read once. With a structure, the weights of a unit go together, as in
    `lap_ext.structures`: of N:M patterns N of every M are kept, of other units as many of the best
    as have at most `keep` weights.

    Args:
        w_prev: weight of the layer before, [I, P, *K], as in `score`.
        w: weight to prune, [O, I / groups, *K], or [I, O / groups, *K] if transposed.
        w_next: weight of the layer after, [N, O, *K], as in `score`.
        sparsity: fraction of all weights of w to remove, 0 to 1, taken exactly as given. The float
            0.9 is the double nearest to 9/10; for exactly 9/10, pass Fraction(9, 10) or
            Decimal("0.9").
        keep: number of weights to keep, given instead of sparsity. If it exceeds w.numel(), all
            weights are kept.
        structure: what is removed together: "N:M" (such as "2:4", without sparsity and keep),
            "ROWSxCOLUMNS" (such as "16x16"), "row", "column" or an object of `lap_ext.structures`.
            None stands for single weights.
        aggregate: what a unit is worth: the "energy" or the "mean" of its scores, or "exact", how
            much w_next * w * w_prev changes when the unit goes.
        mask: bool tensor with the shape of w; True marks the weights that may be kept. Weights
            marked False never return. If fewer than keep are True, all of those are kept.
        groups: number of groups of w.
        transposed: whether w is the weight of a transposed convolution.
        check_finite: whether to raise an error if a weight is inf or NaN. If False, such weights
            rank by the bits of their scores.

    Returns:
        Bool tensor with the shape of w, contiguous, on w's device; True marks the kept weights.

    Raises:
        ValueError: as for `score`; or sparsity is outside [0, 1], keep is negative, both or neither
            of them is given, w does not fit the structure, mask has another shape, or float64
            scores span more than float64's range.
        TypeError: a weight is not a floating-point tensor, mask is not bool, or keep is not an
            integer.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2., 3.], [2., 0., -2.]])
        >>> lap_ext.mask(None, w, None, sparsity=0.5)    # 3 of 6; of the three twos the first two
        tensor([[False,  True,  True],
                [ True, False, False]])
        >>> lap_ext.mask(None, w, None, structure="1:3")
        tensor([[False, False,  True],
                [ True, False, False]])
        >>> lap_ext.mask(None, w, None, sparsity=0.5, structure="row")  # 1 + 4 + 9 and 4 + 0 + 4
        tensor([[ True,  True,  True],
                [False, False, False]])
    """
    w = torch_args.weight(w, groups, transposed)
    options = structure, aggregate, sparsity, keep
    chosen = selection.choice(*options, w.numel(), with_neighbors=True)
    eligible = torch_args.eligible("mask", mask, "w", w)
    norms = torch_args.norms(w_prev, w, w_next, groups, transposed, check_finite)
    kinds = groups, transposed, check_finite
    return selection.mask(w, norms, chosen, eligible, *kinds, (w_prev, w_next))


@calling("prune_")
def prune_(
    w_prev: Neighbors,
    w: Tensor,
    w_next: Neighbors,
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
    """Selects weights like `mask` and sets the other weights of w to +0.0, in place.

    Args:
        w_prev: weight of the layer before, [I, P, *K], as in `score`.
        w: weight to prune, [O, I / groups, *K], or [I, O / groups, *K] if transposed. It may
            require grad; autograd sees the change.
        w_next: weight of the layer after, [N, O, *K], as in `score`.
        sparsity: fraction of all weights of w to remove, 0 to 1, as in `mask`.
        keep: number of weights to keep, given instead of sparsity.
        structure: what is removed together, as in `mask`.
        aggregate: what a unit is worth, as in `mask`.
        mask: bool tensor with the shape of w; True marks the weights that may be kept.
        groups: number of groups of w.
        transposed: whether w is the weight of a transposed convolution.
        check_finite: whether to raise an error, before any change, if a weight is inf or NaN.

    Returns:
        Bool tensor with the shape of w, contiguous, on w's device; True marks the kept weights.

    Raises:
        ValueError: as for `mask`; or elements of w share memory (an expanded tensor).
        TypeError: as for `mask`.

    Example:
        >>> import torch, lap_ext
        >>> w = torch.tensor([[1., -2., 3.], [2., 0., -2.]])
        >>> kept = lap_ext.prune_(None, w, None, keep=2)
        >>> w
        tensor([[ 0., -2.,  3.],
                [ 0.,  0.,  0.]])
        >>> kept = lap_ext.prune_(None, w, None, keep=2, structure="column")
        >>> w
        tensor([[0., 0., 3.],
                [0., 0., 0.]])
    """
    target = torch_args.weight(w, groups, transposed)
    torch_args.writable(target)
    options = structure, aggregate, sparsity, keep
    chosen = selection.choice(*options, w.numel(), with_neighbors=True)
    eligible = torch_args.eligible("mask", mask, "w", target)
    norms = torch_args.norms(w_prev, target, w_next, groups, transposed, check_finite)
    kinds = groups, transposed, check_finite
    kept = selection.prune_(target, norms, chosen, eligible, *kinds, (w_prev, w_next))
    torch_args.mark_changed(w)
    return kept


@calling("neighbor_norms")
def neighbor_norms(
    w_prev: Neighbors,
    w: Tensor,
    w_next: Neighbors,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Computes the neighbor norms that enter the scores of w, one per input and output channel.

        in_norm[i]  = sqrt(sum over producers of ||w_prev[i]||_F^2 * scale[i]^2)
        out_norm[o] = sqrt(sum over consumers of ||w_next[:, o]||_F^2 * scale[o]^2)

    Here scale is the scale of a `Neighbor`, or 1 if there is none. The producers are those in
    w_prev, the consumers those in w_next.

    Args:
        w_prev: weight of the layer before, [I, P, *K], as in `score`.
        w: weight between the two, [O, I / groups, *K]; only its shape and device matter.
        w_next: weight of the layer after, [N, O, *K], as in `score`.
        groups: number of groups of w.
        transposed: whether w is the weight of a transposed convolution, [I, O / groups, *K].
        check_finite: whether to raise an error if a neighbor's weight is inf or NaN.

    Returns:
        (in_norm [I], out_norm [O]) in float64, on w's device. They are not differentiable.

    Raises:
        ValueError: as for `score`; or the squares of float64 weights leave float64's range.
        TypeError: as for `score`.

    Example:
        >>> import torch, lap_ext
        >>> w_prev, w, w_next = torch.tensor([[3., 4.]]), torch.ones(2, 1), torch.tensor([[6., 1.]])
        >>> lap_ext.neighbor_norms(w_prev, w, w_next)
        (tensor([5.], dtype=torch.float64), tensor([6., 1.], dtype=torch.float64))
    """
    w = torch_args.weight(w, groups, transposed)
    return torch_args.norms(w_prev, w, w_next, groups, transposed, check_finite)


@calling("bn_scale")
def bn_scale(module: torch.nn.Module) -> Tensor:
    """Computes the factor by which a batch norm in evaluation mode multiplies each channel.

    Pass the result as `Neighbor(scale=...)`.

        scale[c] = gamma[c] / sqrt(running_var[c] + eps)

    Args:
        module: a BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm. If it is not affine, its
            gamma [C] counts as 1.

    Returns:
        Factors [C] in float64, on the module's device. They are not differentiable.

    Raises:
        TypeError: module is of another type.
        ValueError: module has no running statistics, is not initialized yet, or its scale has an
            entry that is not finite.

    Example:
        >>> import torch, lap_ext
        >>> bn = torch.nn.BatchNorm2d(2, eps=0.)
        >>> bn.running_var.copy_(torch.tensor([4., 0.25]))
        tensor([4.0000, 0.2500])
        >>> lap_ext.bn_scale(bn)
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    if not isinstance(module, _BatchNorm):
        raise LapTypeError(
            "a BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm", type(module).__name__
        )
    variance: Tensor | None = module.running_var
    gamma: Tensor | None = module.weight  # None: not affine
    if variance is None:
        raise LapValueError(
            "a batch norm with running statistics (the scale in evaluation mode)",
            "track_running_stats=False",
            "Pass your own scale to Neighbor.",
        )
    if is_lazy(variance):
        raise LapValueError("an initialized batch norm", "a lazy one", "Run the model once.")
    if not torch.compiler.is_compiling() and not variance.is_meta:
        require_batch_norm(gamma, variance, module.eps, "module")
    variance = variance.detach().to(torch.float64) + module.eps
    deviation = schema.norm([variance])  # an operator: no compiler takes its root in another way
    if gamma is None:
        return 1.0 / deviation
    return gamma.detach().to(torch.float64) / deviation
