# SPDX-License-Identifier: MIT
"""Selects what is kept of one layer, or among given scores: single weights, or by a structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lap_ext import structures
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.ops import check, exact, factors, schema, structured
from lap_ext.ops.partition import GroupUnits, Scored, units_of
from lap_ext.ops.reference.common import require_finite, rows_and_cols
from lap_ext.structures import (
    NM,
    Aggregate,
    Groups,
    Matrix,
    Partition,
    Structure,
    StructureLike,
)


@dataclass(frozen=True)
class Choice:
    """What the user asks to be kept.

    Attributes:
        keep: how many weights, exactly, or at most in whole units; 0 for a pattern, which says so.
        structure: None for single weights.
        aggregate: what units are worth.
    """

    keep: int
    structure: Structure | None = None
    aggregate: Aggregate = "energy"


def choice(
    structure: StructureLike | None,
    aggregate: Aggregate,
    sparsity: check.Number | None,
    keep: SupportsIndex | None,
    n: int,
    *,
    with_neighbors: bool = False,
) -> Choice:
    """Checks the options of a selection among n weights, whose neighbors may be known."""
    structures.check_aggregate(aggregate, exact=with_neighbors)
    if structure is None:
        if aggregate != "energy":
            raise LapValueError(
                "a structure with {argument} (it says what a unit of weights is worth)",
                f"{{argument}}={aggregate!r} alone",
                argument="aggregate",
            )
        return Choice(check.keep_count(sparsity, keep, n))
    known = structures.of(structure)
    if isinstance(known, NM):
        for name, value in (("sparsity", sparsity), ("keep", keep)):
            if value is not None:
                raise LapValueError(
                    f"no {{argument}} with {known.spelled}, which itself says how many are kept",
                    f"{{argument}}={value}",
                    argument=name,
                )
        if aggregate == "exact":
            raise LapValueError(
                f"no {{argument}}='exact' with {known.spelled}, which ranks single weights",
                "{argument}='exact'",
                argument="aggregate",
            )
        return Choice(0, known, aggregate)
    if not isinstance(known, (Partition, Groups)):
        raise LapTypeError(
            "{argument} to be one of lap_ext.structures", type(known).__name__, argument="structure"
        )
    return Choice(check.keep_count(sparsity, keep, n), known, aggregate)


def mask(
    w: Tensor,
    norms: tuple[Tensor, Tensor],
    chosen: Choice,
    mask: Tensor | None,
    groups: int,
    transposed: bool,
    check_finite: bool,
    neighbors: tuple[Any, Any] = (None, None),
) -> Tensor:
    """Masks what is kept of w among what mask names.

    norms are those of inputs and of outputs; aggregate="exact" asks for w_prev and w_next, too.
    """
    structure = chosen.structure
    if structure is None:
        options = chosen.keep, mask, groups, transposed, check_finite
        return schema.call(schema.mask, w, *norms, *options)
    matrix = Matrix.of(w.shape, groups, transposed)
    if chosen.aggregate == "exact" and isinstance(structure, (Partition, Groups)):
        return _exact_mask(w, neighbors, matrix, structure, chosen.keep, mask, check_finite)
    into, out = (schema.scaled([norm])[0] for norm in norms)  # a common factor changes no mask
    rows, cols = rows_and_cols(into, out, transposed)
    if w.dtype == torch.float64 and _adds(structure):
        (w,) = schema.scaled([w])
    scored = [Scored(w, rows, cols, groups)]
    return _masks(scored, [matrix], [tuple(w.shape)], chosen, [mask], check_finite)[0]


def prune_(
    w: Tensor,
    norms: tuple[Tensor, Tensor],
    chosen: Choice,
    eligible: Tensor | None,
    groups: int,
    transposed: bool,
    check_finite: bool,
    neighbors: tuple[Any, Any] = (None, None),
) -> Tensor:
    """Masks like mask, and then sets the other weights to +0.0."""
    options = eligible, groups, transposed, check_finite
    if chosen.structure is None:
        return schema.call(schema.prune_, w, *norms, chosen.keep, *options)
    kept = mask(w, norms, chosen, *options, neighbors)
    schema.call(schema.masked_zero_, w, kept)
    return kept


def _exact_mask(
    w: Tensor,
    neighbors: tuple[Any, Any],
    matrix: Matrix,
    structure: Partition | Groups,
    keep: int,
    mask: Tensor | None,
    check_finite: bool,
) -> Tensor:
    """Masks the units whose going would change the linear neighborhood most."""
    if w.is_meta:
        return torch.empty_like(w, dtype=torch.bool)
    if check_finite:
        require_finite(w, "w")
    part = units_of(structure, matrix, tuple(w.shape), w.device)
    kinds = matrix.groups, matrix.transposed, check_finite
    sides = factors.neighbor_matrices(neighbors[0], w, neighbors[1], *kinds)
    if isinstance(part, GroupUnits):
        worth = exact.group_distortions(w, part.numbers, matrix, *sides, mask)
    else:
        worth = exact.block_distortions(w, part.grid, *sides, mask).flatten()
    if check_finite and not bool(worth.isfinite().all()):
        raise LapValueError(
            "squared worths within float64's range",
            "one that leaves it",
            "Multiply w, w_prev or w_next by a power of two; a common factor changes no mask.",
        )
    return structured.unit_masks([part], [worth.nan_to_num(nan=torch.inf)], keep, [w], [mask])[0]


def of_scores(
    scores: Sequence[Tensor],
    names: Sequence[str],
    chosen: Choice,
    masks: Sequence[Tensor],
    check_finite: bool,
) -> list[Tensor]:
    """Masks what is kept of scores; units of several tensors are ranked together."""
    structure = chosen.structure
    if structure is None:
        return schema.call(schema.topk_mask, scores, chosen.keep, masks, check_finite)
    matrices = [Matrix.of(x.shape) for x in scores]
    every: Sequence[Tensor] = scores
    if _adds(structure):
        for name, x in zip(names, scores, strict=True):
            _require_not_negative(name, x)
        if scores[0].dtype == torch.float64:
            every = schema.scaled(scores)
    kept = _masks(
        [Scored.of_scores(x.reshape(m.shape)) for x, m in zip(every, matrices, strict=True)],
        matrices,
        [tuple(x.shape) for x in scores],
        chosen,
        [m.reshape(matrix.shape) for m, matrix in zip(masks, matrices, strict=False)]
        or [None] * len(scores),
        check_finite,
    )
    return [mask.view(x.shape) for mask, x in zip(kept, scores, strict=True)]


def _masks(
    every: Sequence[Scored],
    matrices: Sequence[Matrix],
    shapes: Sequence[tuple[int, ...]],
    chosen: Choice,
    masks: Sequence[Tensor | None],
    check_finite: bool,
) -> list[Tensor]:
    structure, options = chosen.structure, (chosen.aggregate, check_finite)
    if isinstance(structure, NM):
        for matrix in matrices:
            structured.require_fit(structure, matrix)
    if every[0].x.is_meta:  # a mask has a shape there, and no values
        return [torch.empty_like(scored.x, dtype=torch.bool) for scored in every]
    if not isinstance(structure, NM):
        assert isinstance(structure, (Partition, Groups))
        given = every, matrices, shapes, structure, chosen.keep, masks
        return structured.partition_masks(*given, *options)
    return [
        structured.pattern_mask(scored, matrix, structure, mask, *options)
        for scored, matrix, mask in zip(every, matrices, masks, strict=True)
    ]


def _adds(structure: Structure) -> bool:
    """Tells whether scores, or their squares, are added: only their order matters otherwise."""
    return not isinstance(structure, NM) or structure.transposable


def _require_not_negative(name: str, scores: Tensor) -> None:
    """Raises if a score is negative, where values are known."""
    if torch.compiler.is_compiling() or scores.is_meta or isinstance(scores, FakeTensor):
        return
    bad = scores < 0
    if bool(bad.any()):
        index = int(bad.flatten().to(torch.uint8).argmax())
        raise LapValueError(
            "scores >= 0 in {argument} (a unit's are added)",
            f"{float(scores.flatten()[index]):g} at flat index {index}",
            argument=name,
        )
