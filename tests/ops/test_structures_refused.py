# SPDX-License-Identifier: MIT
"""What structure= refuses: one clear error each, and nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from lap_ext.structures import Groups, Structure

CONV = torch.ones(6, 3, 2, 2)


class Own(Structure):
    """A structure that lap_ext does not know."""

    spelled = "own"


FITS = "mask: expected a weight that 2:4 fits, got shape"
PATTERN = "expected no {} with 2:4, which itself says how many are kept, got {}."


def masking(w: Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: lap_ext.mask(None, w, None, **options)


def ranking(scores: Any, **options: Any) -> Callable[[], Any]:
    return lambda: lap_ext.topk_mask(scores, **options)


EXACT = "expected aggregate to be 'energy' or 'mean', got 'exact'."
ONES = torch.ones(4, 4)
NAN = torch.tensor([[1.0, math.nan]])
FINITE = "mask: expected finite weights in w, got 1 non-finite values, the first at flat index 1."
NEGATIVE = "expected scores >= 0 in {} (a unit's are added), got -2 at flat index 1."
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (masking(ONES, structure="4:2"), ValueError, "got 4:2. Did you mean 2:4?"),
    (
        masking(torch.ones(4, 6), structure="2:4"),
        ValueError,
        f"{FITS} [4, 6], where 4 does not divide its 6 inputs.",
    ),
    (masking(torch.ones(4, 2), structure="2:4"), ValueError, "4 does not divide its 2 inputs."),
    (masking(torch.ones(1, 1), structure="2:4"), ValueError, "4 does not divide its 1 inputs."),
    (masking(torch.ones(0, 4), structure="2:4"), ValueError, "[0, 4], where it has no weights."),
    (masking(CONV, structure="2:4"), ValueError, "4 does not divide its 3 inputs."),
    (masking(CONV, structure="5:10/flat"), ValueError, "10 does not divide its 72 weights."),
    (
        masking(torch.ones(8, 4), structure="1:4/out", groups=4),
        ValueError,
        "where 4 does not divide its 2 outputs in each group.",
    ),
    (
        masking(ONES, structure="2:4", sparsity=0.5),
        ValueError,
        "mask: " + PATTERN.format("sparsity", "sparsity=0.5"),
    ),
    (masking(ONES, structure="2:4", keep=8), ValueError, PATTERN.format("keep", "keep=8")),
    (
        ranking(ONES, structure="2:4", keep=8),
        ValueError,
        "topk_mask: " + PATTERN.format("keep", "keep=8"),
    ),
    (
        masking(ONES, structure="row"),
        ValueError,
        "expected either sparsity (the fraction removed) or keep (the number kept), got neither.",
    ),
    (
        masking(ONES, structure="row", keep=1, sparsity=0.5),
        ValueError,
        "got sparsity=0.5 and keep=1.",
    ),
    (masking(ONES, structure="row", sparsity=1.5), ValueError, "expected 0 <= sparsity <= 1"),
    (
        masking(ONES, keep=3, aggregate="mean"),
        ValueError,
        "mask: expected a structure with aggregate (it says what a unit of weights is worth), got "
        "aggregate='mean' alone.",
    ),
    (
        masking(ONES, keep=3, structure="row", aggregate="sum"),
        ValueError,
        "mask: expected aggregate to be 'energy', 'mean' or 'exact', got 'sum'.",
    ),
    (
        masking(ONES, structure="2:4/transposable", aggregate="exact"),
        ValueError,
        "expected no aggregate='exact' with 2:4/transposable, which ranks single weights",
    ),
    (
        lambda: lap_ext.mask_from_norms(
            ONES, None, None, keep=3, structure="row", aggregate="exact"
        ),
        ValueError,
        f"mask_from_norms: {EXACT}",
    ),
    (ranking(ONES, keep=3, structure="row", aggregate="exact"), ValueError, f"topk_mask: {EXACT}"),
    (
        masking(ONES, keep=3, structure=4),
        TypeError,
        "mask: expected structure to be a text such as '2:4', or an object of lap_ext.structures, "
        "got int.",
    ),
    (masking(ONES, keep=3, structure="rows"), ValueError, "got 'rows'."),
    (
        masking(ONES, keep=3, structure=Own()),
        TypeError,
        "got Own. Give units of your own to Groups.",
    ),
    *(
        (masking(torch.ones(2, 2), keep=3, structure=Groups(groups)), ValueError, text)
        for groups, text in (
            ([[0, 1], [1, 2, 3]], "mask: expected groups that do not overlap"),
            ([[0, 1]], "mask: expected a group for every weight, got 2 without one"),
            ({"fc": [[0]]}, "got a dict of layers."),
        )
    ),
    *(
        (masking(NAN, **options), ValueError, FINITE)
        for options in (
            {"structure": "1:2"},
            {"structure": "1:2/flat"},
            {"structure": "row", "keep": 1},
            {"structure": "row", "keep": 1, "aggregate": "exact"},
            {"structure": Groups([[0, 1]]), "keep": 1},
        )
    ),
    (
        masking(torch.ones(1, 2).double() * 1e200, keep=1, structure="row", aggregate="exact"),
        ValueError,
        "mask: expected squared worths within float64's range, got one that leaves it.",
    ),
    (
        ranking(torch.tensor([[1.0, -2.0]]), keep=1, structure="row"),
        ValueError,
        "topk_mask: " + NEGATIVE.format("scores"),
    ),
    (
        ranking([ONES, torch.tensor([[1.0, -2.0]])], keep=1, structure="1x1"),
        ValueError,
        NEGATIVE.format("scores[1]"),
    ),
    (
        ranking([ONES, -ONES], structure="2:4/transposable"),
        ValueError,
        "expected scores >= 0 in scores[1] (a unit's are added), got -1 at flat index 0.",
    ),
    (ranking(NAN, keep=1, structure="row"), ValueError, "topk_mask: expected"),
    (ranking([ONES, torch.ones(3)], structure="2:4"), ValueError, "not divide its 3 inputs."),
]


@pytest.mark.parametrize(
    ("call", "kind", "text"), REFUSED, ids=[f"{n}-{x[2][-30:]}" for n, x in enumerate(REFUSED)]
)
def test_one_clear_error(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert isinstance(raised.value, lap_ext.LapError) and text in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "2:3"},
        {"structure": "4:2"},
        {"structure": "2:4", "sparsity": 0.5},
        {"structure": "row"},
        {"structure": "row", "keep": 3, "aggregate": "all"},
        {"structure": Groups([[0, 1]]), "keep": 3},
        {"structure": "row", "keep": 3, "mask": torch.ones(4, 3)},
        {"structure": "row", "keep": 3},
        {"structure": "2:4"},
        {"structure": Groups([[*range(16)]]), "keep": 3},
        {"structure": "row", "keep": 3, "aggregate": "exact"},
    ],
    ids=str,
)
def test_after_an_error_nothing_is_changed(options: dict[str, Any]) -> None:
    w = torch.randn(4, 4)
    w[3, 3] = math.nan
    before, version = w.clone().view(torch.int32), w._version
    calls = [lambda: lap_ext.prune_(None, w, None, **options)]
    if options.get("aggregate") != "exact":
        calls.append(lambda: lap_ext.prune_from_norms_(w, None, None, **options))
    for call in calls:
        with pytest.raises((ValueError, TypeError)):
            call()
        assert torch.equal(w.view(torch.int32), before) and w._version == version


def test_an_expanded_weight_is_not_pruned() -> None:
    w = torch.ones(1, 4).expand(4, 4)
    with pytest.raises(ValueError, match="do not share memory"):
        lap_ext.prune_(None, w, None, structure="2:4")


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 2, 0)], ids=str)
@pytest.mark.parametrize("structure", ["row", "column", "2x2", Groups([])], ids=str)
def test_units_of_no_weights(structure: Any, shape: tuple[int, ...]) -> None:
    w = torch.zeros(shape)
    for aggregate in ("energy", "mean", "exact"):
        options: dict[str, Any] = {"structure": structure, "aggregate": aggregate}
        assert lap_ext.prune_(None, w, None, sparsity=0.5, **options).shape == shape
    assert lap_ext.topk_mask([w, torch.ones(0)], keep=1, structure="row")[0].shape == shape


def test_one_weight() -> None:
    for structure in ("row", "column", "16x16", Groups([[0]])):
        got = [
            lap_ext.mask(None, torch.ones(1, 1), None, keep=k, structure=structure) for k in (0, 1)
        ]
        assert [m.tolist() for m in got] == [[[False]], [[True]]]
    assert lap_ext.topk_mask(torch.tensor(3.0), keep=1, structure="row").tolist() is True
    assert lap_ext.topk_mask([], keep=1, structure="row") == []
    assert lap_ext.topk_mask([], structure="2:4") == []
