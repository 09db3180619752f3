# SPDX-License-Identifier: MIT
"""The functions of lap_ext for NumPy arrays: same names, meaning and bits, without torch.

    import lap_ext.numpy as lap
    kept = lap.mask(w_prev, w, w_next, sparsity=0.9)

Arrays are float32, float64 or float16 (or bfloat16 of ml_dtypes), of any strides; neighbors are
those of lap_ext. The kernels are the native ones (lap_ext._np): there is no fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias, overload

from lap_ext.ops import check, numpy_args
from lap_ext.ops.neighbors import IDENTITY, Neighbor
from lap_ext.ops.numpy_args import Array, Mask

__all__ = [
    "IDENTITY",
    "Neighbor",
    "factors",
    "kth_largest",
    "mask",
    "mask_from_factors",
    "prune_",
    "prune_from_factors_",
    "score",
    "score_from_factors",
    "topk_mask",
]

Neighbors: TypeAlias = Array | Neighbor | Sequence[Array | Neighbor | None] | None


def score(
    w_prev: Neighbors,
    w: Array,
    w_next: Neighbors,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Array:
    """Lookahead score of every weight of one layer; see `lap_ext.score`.

        score[o, i, ...] = |w[o, i, ...]| * ||w_prev[i]||_F * ||w_next[:, o]||_F

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> lap.score(np.array([[3., 4.]]), np.array([[-2.]]), np.array([[1.]]))  # |-2| * 5 * 1
        array([[10.]])
    """
    numpy_args.weight("score", w, groups, transposed)
    norms = numpy_args.norms("score", w_prev, w, w_next, groups, transposed, check_finite)
    return numpy_args.call(
        "score", numpy_args.kernels.score, w, *norms, groups, transposed, check_finite
    )


def mask(
    w_prev: Neighbors,
    w: Array,
    w_next: Neighbors,
    sparsity: check.Number | None = None,
    *,
    keep: SupportsIndex | None = None,
    mask: Mask | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Mask:
    """Mask of exactly `keep` weights with the largest lookahead scores; see `lap_ext.mask`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> lap.mask(None, np.array([[1., -2., 3.], [2., 0., -2.]]), None, sparsity=0.5)
        array([[False,  True,  True],
               [ True, False, False]])
    """
    numpy_args.weight("mask", w, groups, transposed)
    count = check.keep_count("mask", sparsity, keep, w.size)
    eligible = numpy_args.eligible("mask", "mask", mask, "w", w)
    norms = numpy_args.norms("mask", w_prev, w, w_next, groups, transposed, check_finite)
    options = (count, eligible, groups, transposed, check_finite)
    return numpy_args.call("mask", numpy_args.kernels.mask, w, *norms, *options)


def prune_(
    w_prev: Neighbors,
    w: Array,
    w_next: Neighbors,
    sparsity: check.Number | None = None,
    *,
    keep: SupportsIndex | None = None,
    mask: Mask | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Mask:
    """As `mask`, and sets the weights that are not kept to +0.0 in place; see `lap_ext.prune_`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> w = np.array([[1., -2., 3.]])
        >>> lap.prune_(None, w, None, keep=1), w
        (array([[False, False,  True]]), array([[0., 0., 3.]]))
    """
    numpy_args.weight("prune_", w, groups, transposed)
    numpy_args.writable("prune_", w)
    count = check.keep_count("prune_", sparsity, keep, w.size)
    eligible = numpy_args.eligible("prune_", "mask", mask, "w", w)
    norms = numpy_args.norms("prune_", w_prev, w, w_next, groups, transposed, check_finite)
    options = (count, eligible, groups, transposed, check_finite)
    return numpy_args.call("prune_", numpy_args.kernels.prune_, w, *norms, *options)


def factors(
    w_prev: Neighbors,
    w: Array,
    w_next: Neighbors,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> tuple[Array, Array]:
    """Float64 (in_norm [I], out_norm [O]), the factors of the scores of w; see `lap_ext.factors`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> lap.factors(np.array([[3., 4.]]), np.ones((2, 1)), None)
        (array([5.]), array([1., 1.]))
    """
    numpy_args.weight("factors", w, groups, transposed)
    return numpy_args.norms("factors", w_prev, w, w_next, groups, transposed, check_finite)


def score_from_factors(
    w: Array,
    in_norm: Array | None,
    out_norm: Array | None,
    *,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Array:
    """Score of every weight from factors [I] and [O]; see `lap_ext.score_from_factors`."""
    name = "score_from_factors"
    norms = numpy_args.given_norms(name, w, in_norm, out_norm, groups, transposed)
    return numpy_args.call(
        name, numpy_args.kernels.score, w, *norms, groups, transposed, check_finite
    )


def mask_from_factors(
    w: Array,
    in_norm: Array | None,
    out_norm: Array | None,
    sparsity: check.Number | None = None,
    *,
    keep: SupportsIndex | None = None,
    mask: Mask | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Mask:
    """Mask of the keep largest scores, from factors; see `lap_ext.mask_from_factors`."""
    name = "mask_from_factors"
    norms = numpy_args.given_norms(name, w, in_norm, out_norm, groups, transposed)
    count = check.keep_count(name, sparsity, keep, w.size)
    eligible = numpy_args.eligible(name, "mask", mask, "w", w)
    return numpy_args.call(
        name, numpy_args.kernels.mask, w, *norms, count, eligible, groups, transposed, check_finite
    )


def prune_from_factors_(
    w: Array,
    in_norm: Array | None,
    out_norm: Array | None,
    sparsity: check.Number | None = None,
    *,
    keep: SupportsIndex | None = None,
    mask: Mask | None = None,
    groups: int = 1,
    transposed: bool = False,
    check_finite: bool = True,
) -> Mask:
    """As `mask_from_factors`, and prunes w in place; see `lap_ext.prune_from_factors_`."""
    name = "prune_from_factors_"
    norms = numpy_args.given_norms(name, w, in_norm, out_norm, groups, transposed)
    numpy_args.writable(name, w)
    count = check.keep_count(name, sparsity, keep, w.size)
    eligible = numpy_args.eligible(name, "mask", mask, "w", w)
    return numpy_args.call(
        name,
        numpy_args.kernels.prune_,
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
    keep: SupportsIndex | None = None,
    *,
    sparsity: check.Number | None = None,
    mask: Mask | None = None,
    check_finite: bool = True,
) -> Mask: ...
@overload
def topk_mask(
    scores: Sequence[Array],
    keep: SupportsIndex | None = None,
    *,
    sparsity: check.Number | None = None,
    mask: Sequence[Mask] | None = None,
    check_finite: bool = True,
) -> list[Mask]: ...
def topk_mask(
    scores: Array | Sequence[Array],
    keep: SupportsIndex | None = None,
    *,
    sparsity: check.Number | None = None,
    mask: Mask | Sequence[Mask] | None = None,
    check_finite: bool = True,
) -> Mask | list[Mask]:
    """Mask of exactly `keep` of the largest scores; see `lap_ext.topk_mask`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> lap.topk_mask(np.array([3., 1., 3., 2.]), 2)
        array([ True, False,  True, False])
    """
    single, checked = numpy_args.score_list("topk_mask", scores)
    count = check.keep_count("topk_mask", sparsity, keep, sum(x.size for x in checked))
    masks = numpy_args.mask_list(mask, single, checked)
    if not checked:
        return []
    kept: list[Mask] = numpy_args.call(
        "topk_mask", numpy_args.kernels.topk_mask, checked, count, masks, check_finite
    )
    return kept[0] if single else kept


def kth_largest(
    scores: Array | Sequence[Array], k: SupportsIndex, *, check_finite: bool = True
) -> Any:
    """The k-th largest of all scores, a NumPy scalar of their dtype; see `lap_ext.kth_largest`.

    Example:
        >>> import numpy as np, lap_ext.numpy as lap
        >>> float(lap.kth_largest(np.array([3., 1., 3., 2.]), 3))
        2.0
    """
    _, checked = numpy_args.score_list("kth_largest", scores)
    count = check.rank("kth_largest", k, sum(x.size for x in checked))
    value = numpy_args.call(
        "kth_largest", numpy_args.kernels.kth_largest, checked, count, check_finite
    )
    return checked[0].dtype.type(value)
