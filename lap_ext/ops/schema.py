# SPDX-License-Identifier: MIT
"""The operators of lap_ext: schemas, default kernels, shapes for tracing, and calls with clean errors.

The reference is the default kernel of every operator, on every device. The native libraries add
kernels for CPU and CUDA: PyTorch's dispatcher chooses, no code here does. Only this file spells
torch.ops.lap_ext. An operator does not check what check.py has checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, library

from lap_ext.ops import check, native, reference
from lap_ext.ops.reference.common import score_dtype

_library = library.Library("lap_ext", "DEF")
_Fake = TypeVar("_Fake", bound=Callable[..., Any])


def _define(schema: str, kernel: Callable[..., Any]) -> Callable[[_Fake], _Fake]:
    """Defines an operator with its default kernel; decorates its fake."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")

    def register(fake: _Fake) -> _Fake:
        library.register_fake(f"lap_ext::{name}", fake, lib=_library)
        return fake

    return register


@_define("row_energy(Tensor weight, bool check_finite, str name) -> Tensor", reference.row_energy)
def _(weight: Tensor, *_: object) -> Tensor:
    return weight.new_empty([weight.shape[0]], dtype=torch.float64)


@_define(
    "col_energy(Tensor weight, int groups, bool check_finite, str name) -> Tensor",
    reference.col_energy,
)
def _(weight: Tensor, groups: int, *_: object) -> Tensor:
    return weight.new_empty([groups * weight.shape[1]], dtype=torch.float64)


# Both from one reading of the weight.
@_define(
    "energies(Tensor weight, int groups, bool check_finite, str name) -> (Tensor row, Tensor col)",
    reference.energies,
)
def _(weight: Tensor, groups: int, *_: object) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape[:2]
    return (
        weight.new_empty([rows], dtype=torch.float64),
        weight.new_empty([groups * cols], dtype=torch.float64),
    )


# An operator, so that a compiler cannot fuse it with what makes the energies and round otherwise.
@_define("norm(Tensor[] energies) -> Tensor", reference.norm)
def _(energies: list[Tensor]) -> Tensor:
    return energies[0].new_empty(energies[0].shape)


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
    """The definition of global_mask, by operators: topk_mask of the scores of all weights."""
    scores = []
    for t, (x, rows, cols, count) in enumerate(zip(w, row_norm, col_norm, groups, strict=True)):
        if rows.numel() == 0:
            scores.append(x)
            continue
        try:
            scores.append(score(x, cols, rows, count, False, check_finite))
        except (RuntimeError, ValueError) as error:
            clean = _unwrapped(error)
            if not isinstance(clean, ValueError):
                raise
            raise ValueError(str(clean).replace(" in w,", f" in w[{t}],")) from None
    return topk_mask(scores, keep, masks, check_finite)


# One ranking over weights [R, C, *K] with norms of rows [R] and of columns [groups * C] each (a
# transposed convolution's rows are its inputs). An empty row_norm says that w is ready scores.
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


native.load()
info = native.info

row_energy = torch.ops.lap_ext.row_energy.default
col_energy = torch.ops.lap_ext.col_energy.default
energies = torch.ops.lap_ext.energies.default
norm = torch.ops.lap_ext.norm.default
score = torch.ops.lap_ext.score.default
mask = torch.ops.lap_ext.mask.default
prune_ = torch.ops.lap_ext.prune_.default
topk_mask = torch.ops.lap_ext.topk_mask.default
global_mask = torch.ops.lap_ext.global_mask.default
kth_largest = torch.ops.lap_ext.kth_largest.default

_ERRORS = {"lap_ext.ValueError: ": ValueError, "lap_ext.TypeError: ": TypeError}


def call(function: str, op: Callable[..., Any], *args: object) -> Any:
    """Runs an operator for a public function, whose name replaces the operator's in errors."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except (RuntimeError, ValueError, TypeError) as error:
        clean = check.renamed(function, _unwrapped(error))
        if clean is None:
            raise
    raise clean


def _unwrapped(error: Exception) -> Exception:
    """What a native kernel meant: PyTorch's stable ABI carries only RuntimeError."""
    for marker, kind in _ERRORS.items():
        _, found, text = str(error).partition(marker)
        if found:
            return kind(text.partition("\n")[0])
    return error
