# SPDX-License-Identifier: MIT
"""Offers the functions of lap_ext for NumPy arrays, without torch.

The functions have the same names and meaning and return the same bits as those for tensors.

    import lap_ext.numpy as lap
    kept = lap.mask(w_prev, w, w_next, sparsity=0.9)

Arrays are float32, float64, float16 or the bfloat16 of ml_dtypes, with any strides; neighbors are
those of lap_ext. Only the native kernels (lap_ext._np) are used; there is no fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias, overload

from lap_ext.errors import calling
from lap_ext.ops import check, numpy_args
from lap_ext.ops.neighbors import IDENTITY, Neighbor
from lap_ext.ops.numpy_args import Array, Mask

__all__ = [
    "IDENTITY",
    "Neighbor",
    "kth_largest",
    "mask",
    "mask_from_norms",
    "neighbor_norms",
    "prune_",
    "prune_from_norms_",
    "score",
    "score_from_norms",
    "topk_mask",
]

Neighbors: TypeAlias = Array | Neighbor | Sequence[Array | Neighbor | None] | None


@calling("score")
def score(
    w_prev: Neighbors,
    w: Array,
    w_next: Neighbors,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Array:
    """Scores every weight of one layer by lookahead; see `lap_ext.score`.

        score[o, i, ...] = |w[o, i, ...]| * ||w_prev[i]||_F * ||w_next[:, o]||_F

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> lap.score(np.array([[3., 4.]]), np.array([[-2.]]), np.array([[1.]]))  # |-2| * 5 * 1
        array([[10.]])
    """
    numpy_args.weight(w, groups, transposed)
    norms = numpy_args.norms(w_prev, w, w_next, groups, transposed, check_finite)
    return numpy_args.kernels.score(w, *norms, groups, transposed, check_finite)


@calling("mask")
def mask(
    w_prev: Neighbors,
    w: Array,
    w_next: Neighbors,
    *,
    sparsity: check.Number | None = None,
    keep: SupportsIndex | None = None,
    mask: Mask | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Mask:
    """Selects exactly `keep` weights, those with the largest scores; see `lap_ext.mask`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> lap.mask(None, np.array([[1., -2., 3.], [2., 0., -2.]]), None, sparsity=0.5)
        array([[False,  True,  True],
               [ True, False, False]])
    """
    numpy_args.weight(w, groups, transposed)
    count = check.keep_count(sparsity, keep, w.size)
    eligible = numpy_args.eligible("mask", mask, "w", w)
    norms = numpy_args.norms(w_prev, w, w_next, groups, transposed, check_finite)
    options = (count, eligible, groups, transposed, check_finite)
    return numpy_args.kernels.mask(w, *norms, *options)


@calling("prune_")
def prune_(
    w_prev: Neighbors,
    w: Array,
    w_next: Neighbors,
    *,
    sparsity: check.Number | None = None,
    keep: SupportsIndex | None = None,
    mask: Mask | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Mask:
    """Selects weights like `mask` and zeroes the others in place; see `lap_ext.prune_`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> w = np.array([[1., -2., 3.]])
        >>> lap.prune_(None, w, None, keep=1), w
        (array([[False, False,  True]]), array([[0., 0., 3.]]))
    """
    numpy_args.weight(w, groups, transposed)
    numpy_args.writable(w)
    count = check.keep_count(sparsity, keep, w.size)
    eligible = numpy_args.eligible("mask", mask, "w", w)
    norms = numpy_args.norms(w_prev, w, w_next, groups, transposed, check_finite)
    options = (count, eligible, groups, transposed, check_finite)
    return numpy_args.kernels.prune_(w, *norms, *options)


@calling("neighbor_norms")
def neighbor_norms(
    w_prev: Neighbors,
    w: Array,
    w_next: Neighbors,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> tuple[Array, Array]:
    """Computes float64 (in_norm [I], out_norm [O]) of w; see `lap_ext.neighbor_norms`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> lap.neighbor_norms(np.array([[3., 4.]]), np.ones((2, 1)), None)
        (array([5.]), array([1., 1.]))
    """
    numpy_args.weight(w, groups, transposed)
    return numpy_args.norms(w_prev, w, w_next, groups, transposed, check_finite)


@calling("score_from_norms")
def score_from_norms(
    w: Array,
    in_norm: Array | None,
    out_norm: Array | None,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Array:
    """Scores every weight from norms [I] and [O]; see `lap_ext.score_from_norms`."""
    norms = numpy_args.given_norms(w, in_norm, out_norm, groups, transposed)
    return numpy_args.kernels.score(w, *norms, groups, transposed, check_finite)


@calling("mask_from_norms")
def mask_from_norms(
    w: Array,
    in_norm: Array | None,
    out_norm: Array | None,
    *,
    sparsity: check.Number | None = None,
    keep: SupportsIndex | None = None,
    mask: Mask | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Mask:
    """Selects the `keep` largest scores from norms; see `lap_ext.mask_from_norms`."""
    norms = numpy_args.given_norms(w, in_norm, out_norm, groups, transposed)
    count = check.keep_count(sparsity, keep, w.size)
    eligible = numpy_args.eligible("mask", mask, "w", w)
    return numpy_args.kernels.mask(w, *norms, count, eligible, groups, transposed, check_finite)


@calling("prune_from_norms_")
def prune_from_norms_(
    w: Array,
    in_norm: Array | None,
    out_norm: Array | None,
    *,
    sparsity: check.Number | None = None,
    keep: SupportsIndex | None = None,
    mask: Mask | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Mask:
    """Selects like `mask_from_norms` and prunes w in place; see `lap_ext.prune_from_norms_`."""
    norms = numpy_args.given_norms(w, in_norm, out_norm, groups, transposed)
    numpy_args.writable(w)
    count = check.keep_count(sparsity, keep, w.size)
    eligible = numpy_args.eligible("mask", mask, "w", w)
    return numpy_args.kernels.prune_(
        w,
        *norms,
        count,
        eligible,
        groups,
        transposed,
        check_finite,
    )


@overload
def topk_mask(
    scores: Array,
    *,
    keep: SupportsIndex | None = None,
    sparsity: check.Number | None = None,
    mask: Mask | None = None,
    check_finite: bool = True,
) -> Mask: ...
@overload
def topk_mask(
    scores: Sequence[Array],
    *,
    keep: SupportsIndex | None = None,
    sparsity: check.Number | None = None,
    mask: Sequence[Mask] | None = None,
    check_finite: bool = True,
) -> list[Mask]: ...
@calling("topk_mask")
def topk_mask(
    scores: Array | Sequence[Array],
    *,
    keep: SupportsIndex | None = None,
    sparsity: check.Number | None = None,
    mask: Mask | Sequence[Mask] | None = None,
    check_finite: bool = True,
) -> Mask | list[Mask]:
    """Selects exactly `keep` scores, the largest ones; see `lap_ext.topk_mask`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> lap.topk_mask(np.array([3., 1., 3., 2.]), keep=2)
        array([ True, False,  True, False])
    """
    single, checked = numpy_args.score_list(scores)
    count = check.keep_count(sparsity, keep, sum(x.size for x in checked))
    masks = numpy_args.mask_list(mask, single, checked)
    if not checked:
        return []
    kept: list[Mask] = numpy_args.kernels.topk_mask(checked, count, masks, check_finite)
    return kept[0] if single else kept


@calling("kth_largest")
def kth_largest(
    scores: Array | Sequence[Array], k: SupportsIndex, *, check_finite: bool = True
) -> Any:
    """Finds the k-th largest score as a scalar of the same dtype; see `lap_ext.kth_largest`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> float(lap.kth_largest(np.array([3., 1., 3., 2.]), 3))
        2.0
    """
    _, checked = numpy_args.score_list(scores)
    count = check.rank(k, sum(x.size for x in checked))
    value = numpy_args.kernels.kth_largest(checked, count, check_finite)
    return checked[0].dtype.type(value)
