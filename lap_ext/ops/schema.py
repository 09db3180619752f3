# SPDX-License-Identifier: MIT
"""The operators of lap_ext: schemas, default kernels, shapes for tracing, calls with clear errors.

The reference is the default kernel of every operator, on every device. The native libraries add
kernels for CPU and CUDA; PyTorch's dispatcher chooses among them, not the code here. Only this file
spells torch.ops.lap_ext. An operator does not check what check.py has checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, library

from lap_ext.errors import LapError
from lap_ext.ops import native, reference
from lap_ext.ops.reference.common import score_dtype
from lap_ext.ops.reference.key import key_dtype

_library = library.Library("lap_ext", "DEF")
_Fake = TypeVar("_Fake", bound=Callable[..., Any])


def _define(schema: str, kernel: Callable[..., Any]) -> Callable[[_Fake], _Fake]:
    """Defines an operator with its default kernel; the decorated function is its fake kernel."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")

    def register(fake: _Fake) -> _Fake:
        library.register_fake(f"lap_ext::{name}", fake, lib=_library)
        return fake

    return register


@_define(
    "row_squared_norms(Tensor weight, bool check_finite, str name) -> Tensor",
    reference.row_squared_norms,
)
def _(weight: Tensor, *_: object) -> Tensor:
    return weight.new_empty([weight.shape[0]], dtype=torch.float64)


@_define(
    "col_squared_norms(Tensor weight, int groups, bool check_finite, str name) -> Tensor",
    reference.col_squared_norms,
)
def _(weight: Tensor, groups: int, *_: object) -> Tensor:
    return weight.new_empty([groups * weight.shape[1]], dtype=torch.float64)


# Both from one pass over the weight.
@_define(
    "squared_norms(Tensor weight, int groups, bool check_finite, str name) -> "
    "(Tensor row, Tensor col)",
    reference.squared_norms,
)
def _(weight: Tensor, groups: int, *_: object) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape[:2]
    return (
        weight.new_empty([rows], dtype=torch.float64),
        weight.new_empty([groups * cols], dtype=torch.float64),
    )


# An operator, so that a compiler cannot fuse it with what makes the squared norms and round them in
# another way.
@_define("norm(Tensor[] squared_norms) -> Tensor", reference.norm)
def _(squared_norms: list[Tensor]) -> Tensor:
    return squared_norms[0].new_empty(squared_norms[0].shape)


@_define(
    "score(Tensor w, Tensor in_norm, Tensor out_norm, int groups, bool transposed, "
    "bool check_finite) -> Tensor",
    reference.score,
)
def _(w: Tensor, *_: object) -> Tensor:
    return w.new_empty(w.shape, dtype=score_dtype(w.dtype))


@_define(
    "mask(Tensor w, Tensor in_norm, Tensor out_norm, SymInt keep, Tensor? mask, int groups, "
    "bool transposed, bool check_finite) -> Tensor",
    reference.mask,
)
@_define(
    "prune_(Tensor(a!) w, Tensor in_norm, Tensor out_norm, SymInt keep, Tensor? mask, int groups, "
    "bool transposed, bool check_finite) -> Tensor",
    reference.prune_,
)
def _(w: Tensor, *_: object) -> Tensor:
    return w.new_empty(w.shape, dtype=torch.bool)


@_define(
    "topk_mask(Tensor[] scores, SymInt keep, Tensor[] masks, bool check_finite) -> Tensor[]",
    reference.topk_mask,
)
def _(scores: list[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty(x.shape, dtype=torch.bool) for x in scores]


def _global_mask(
    w: list[Tensor],
    row_norm: list[Tensor],
    col_norm: list[Tensor],
    groups: list[int],
    keep: int,
    masks: list[Tensor],
    check_finite: bool,
) -> list[Tensor]:
    """Defines global_mask by other operators: topk_mask of the scores of all weights."""
    scores = []
    for t, (x, rows, cols, count) in enumerate(zip(w, row_norm, col_norm, groups, strict=True)):
        if rows.numel() == 0:
            scores.append(x)
            continue
        try:
            scores.append(call(score, x, cols, rows, count, False, check_finite))
        except LapError as error:
            if error.argument == "w":
                error.argument = f"w[{t}]"
            raise
    return topk_mask(scores, keep, masks, check_finite)


# One ranking over weights [R, C, *K] with norms of rows [R] and of columns [groups * C] each (a
# transposed convolution's rows are its inputs). An empty row_norm says that w holds scores.
@_define(
    "global_mask(Tensor[] w, Tensor[] row_norm, Tensor[] col_norm, int[] groups, SymInt keep, "
    "Tensor[] masks, bool check_finite) -> Tensor[]",
    _global_mask,
)
def _(w: list[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty(x.shape, dtype=torch.bool) for x in w]


@_define(
    "kth_largest(Tensor[] scores, SymInt k, bool check_finite) -> Tensor", reference.kth_largest
)
def _(scores: list[Tensor], *_: object) -> Tensor:
    return scores[0].new_empty([], dtype=score_dtype(scores[0].dtype))


# --- scores that are never all in memory: reference/chunks.py -------------------------------------


@_define(
    "count_keys(Tensor scores, Tensor? mask, int low, int high, bool take) -> "
    "(Tensor counts, Tensor keys)",
    reference.count_keys,
)
def _(
    scores: Tensor, mask: Tensor | None, low: int, high: int, take: bool
) -> tuple[Tensor, Tensor]:
    found = library.get_ctx().new_dynamic_size() if take else 0
    counts = scores.new_empty([2], dtype=torch.int64, device="cpu")
    return counts, scores.new_empty([found], dtype=key_dtype(scores.dtype))


@_define(
    "key_histogram(Tensor scores, Tensor? mask, int low, int high, int shift, int bins) -> Tensor",
    reference.key_histogram,
)
def _(scores: Tensor, mask: Tensor | None, low: int, high: int, shift: int, bins: int) -> Tensor:
    return scores.new_empty([bins], dtype=torch.int64)


@_define(
    "squares_above(Tensor scores, Tensor? mask, int key, int exponent) -> Tensor",
    reference.squares_above,
)
def _(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty([2], dtype=torch.int64)


@_define(
    "threshold_mask(Tensor scores, Tensor? mask, int key, int ties) -> (Tensor kept, Tensor taken)",
    reference.threshold_mask,
)
def _(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    kept = scores.new_empty(scores.shape, dtype=torch.bool)
    return kept, scores.new_empty([1], dtype=torch.int64)


@_define(
    "random_scores_(Tensor(a!) out, int start, int first, int step) -> ()",
    reference.random_scores_,
)
@_define("masked_zero_(Tensor(a!) weight, Tensor mask) -> ()", reference.masked_zero_)
def _(*_: object) -> None:
    pass


@_define(
    "nonzero_mask(Tensor weight, Tensor? mask) -> (Tensor live, Tensor count)",
    reference.nonzero_mask,
)
def _(weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    live = weight.new_empty(weight.shape, dtype=torch.bool)
    return live, weight.new_empty([1], dtype=torch.int64, device="cpu")


# --- structures: reference/structured.py ----------------------------------------------------------
# Weights [R, C, *K] with norms of rows [R] and of columns [groups * C], or scores: an empty
# row_norm says so, as in global_mask.


# Operators, so that no compiler sees values that it does not know, or rounds in another way.
@_define("scaled(Tensor[] tensors) -> Tensor[]", reference.scaled)
def _(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


@_define(
    "wide_score(Tensor w, Tensor row_norm, Tensor col_norm, int groups, bool check_finite) -> "
    "Tensor",
    reference.wide_score,
)
def _(w: Tensor, *_: object) -> Tensor:
    return w.new_empty(w.shape, dtype=torch.float64)


@_define(
    "nm_mask(Tensor w, Tensor row_norm, Tensor col_norm, int groups, int keep, int of, bool rows, "
    "Tensor? mask, bool check_finite) -> Tensor",
    reference.nm_mask,
)
@_define(
    "transposable_mask(Tensor w, Tensor row_norm, Tensor col_norm, int groups, bool squared, "
    "Tensor? mask, bool check_finite) -> Tensor",
    reference.transposable_mask,
)
def _(w: Tensor, *_: object) -> Tensor:
    return w.new_empty(w.shape, dtype=torch.bool)


@_define(
    "block_sums_(Tensor(a!) sums, Tensor w, Tensor row_norm, Tensor col_norm, int groups, "
    "int[] block, int first, int height, bool squared, Tensor? mask, bool check_finite) -> ()",
    reference.block_sums_,
)
def _(*_: object) -> None:
    pass


@_define(
    "block_mask(Tensor kept, SymInt[] shape, int[] block, int first, int height, Tensor? mask) -> "
    "Tensor",
    reference.block_mask,
)
def _(kept: Tensor, shape: list[int], *_: object) -> Tensor:
    return kept.new_empty(shape)


native.load()
info = native.info

row_squared_norms = torch.ops.lap_ext.row_squared_norms.default
col_squared_norms = torch.ops.lap_ext.col_squared_norms.default
squared_norms = torch.ops.lap_ext.squared_norms.default
norm = torch.ops.lap_ext.norm.default
score = torch.ops.lap_ext.score.default
mask = torch.ops.lap_ext.mask.default
prune_ = torch.ops.lap_ext.prune_.default
topk_mask = torch.ops.lap_ext.topk_mask.default
global_mask = torch.ops.lap_ext.global_mask.default
kth_largest = torch.ops.lap_ext.kth_largest.default
count_keys = torch.ops.lap_ext.count_keys.default
key_histogram = torch.ops.lap_ext.key_histogram.default
squares_above = torch.ops.lap_ext.squares_above.default
threshold_mask = torch.ops.lap_ext.threshold_mask.default
random_scores_ = torch.ops.lap_ext.random_scores_.default
masked_zero_ = torch.ops.lap_ext.masked_zero_.default
nonzero_mask = torch.ops.lap_ext.nonzero_mask.default
scaled = torch.ops.lap_ext.scaled.default
wide_score = torch.ops.lap_ext.wide_score.default
nm_mask = torch.ops.lap_ext.nm_mask.default
transposable_mask = torch.ops.lap_ext.transposable_mask.default
block_sums_ = torch.ops.lap_ext.block_sums_.default
block_mask = torch.ops.lap_ext.block_mask.default


def call(op: Callable[..., Any], *args: object) -> Any:
    """Runs an operator; the errors of native kernels are raised as the reference raises them."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except (RuntimeError, ValueError) as error:
        mistake = native.mistake(error)
        if mistake is None:
            raise
    raise mistake
