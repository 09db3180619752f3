# SPDX-License-Identifier: MIT
"""scaled and wide_score: what keeps overflow and underflow out of sums of scores."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, library

from lap_ext.ops import schema
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import DTYPES, each_dtype

ANY = st.floats(allow_nan=True, allow_infinity=True)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(st.lists(st.lists(ANY, max_size=4), max_size=3))
def test_scaled_is_one_power_of_two(lists: list[list[float]]) -> None:
    """The largest finite entry of all comes into [0.5, 1); what is not tiny is only multiplied."""
    got = [x.tolist() for x in schema.scaled([doubles(*x) for x in lists])]
    assert [len(x) for x in got] == [len(x) for x in lists]
    finite = [abs(x) for values in lists for x in values if math.isfinite(x)]
    exponent = math.frexp(max(finite, default=0.0))[1]
    for before, after in zip(sum(lists, []), sum(got, []), strict=True):  # noqa: RUF017
        if not math.isfinite(before):
            assert str(after) == str(before)
            continue
        wanted = Fraction(before) * Fraction(2) ** -exponent
        assert abs(wanted) < 1
        if abs(wanted) >= 2.0**-1022 or wanted == 0:
            assert Fraction(after) == wanted
        else:
            assert abs(Fraction(after) - wanted) <= 2.0**-1074


def test_scaled_by_hand(device: str) -> None:
    first, second = schema.scaled([doubles(3, -8).to(device), doubles(0.5, 2).to(device)])
    assert first.tolist() == [3 / 16, -0.5] and second.tolist() == [1 / 32, 1 / 8]
    assert schema.scaled([doubles(0, -0.0).to(device)])[0].tolist() == [0, 0]
    (tiny,) = schema.scaled([doubles(5e-324).to(device)])
    (huge,) = schema.scaled([doubles(1.7e308, 5e-324).to(device)])
    assert tiny.tolist() == [0.5] and 0.5 <= float(huge[0]) < 1


def rounded(x: Fraction, digits: int) -> Fraction:
    """The nearest number with so many binary digits, ties to even, and any exponent."""
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent += Fraction(2) ** exponent <= x
    unit = Fraction(2) ** (exponent - digits)
    return round(x / unit) * unit


@each_dtype
@pytest.mark.parametrize("groups", [1, 2])
def test_wide_scores_are_rounded_like_scores_without_a_least_exponent(
    groups: int, dtype: torch.dtype, device: str
) -> None:
    digits = 53 if dtype == torch.float64 else 24
    w = (torch.randn(4, 3, 2) * 2.0 ** torch.randint(-9, 9, (4, 3, 2))).to(dtype)
    rows = torch.rand(4, dtype=torch.float64) * doubles(1, 2.0**-200, 2.0**-140, 0)
    cols = torch.rand(3 * groups, dtype=torch.float64) * 2.0**-100
    got = schema.wide_score(w.to(device), rows.to(device), cols.to(device), groups, True)
    assert got.dtype == torch.float64 and got.is_contiguous() and got.shape == w.shape
    for r in range(4):
        for c in range(3):
            norms = [float(rows[r]), float(cols[r // (4 // groups) * 3 + c])]
            row, col = (rounded(Fraction(x), digits) for x in norms)
            for k in range(2):
                score = abs(Fraction(float(w[r, c, k]))) * rounded(row * col, digits)
                assert Fraction(float(got[r, c, k])) == rounded(score, digits)


@each_dtype
def test_wide_scores_are_scores_where_these_have_room(dtype: torch.dtype, device: str) -> None:
    w = torch.randn(5, 7).to(dtype)
    rows, cols = torch.rand(5, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    got = schema.wide_score(
        w.t().contiguous().t().to(device), rows.to(device), cols.to(device), 1, True
    )
    assert torch.equal(got.cpu(), oracle.float_score(w, cols, rows).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_wide_scores_of_numbers_only(bad: float) -> None:
    ones = torch.ones(1, dtype=torch.float64)
    w = torch.tensor([[bad]])
    with pytest.raises(ValueError, match="finite weights in w"):
        schema.call(schema.wide_score, w, ones, ones, 1, True)
    assert str(float(schema.wide_score(w, ones, ones, 1, False))) == str(bad)


def test_opcheck(device: str) -> None:
    rows, cols = torch.rand(4, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    for dtype in DTYPES:
        args = torch.randn(4, 6).to(dtype), rows, cols, 1, True
        library.opcheck(
            schema.wide_score, [x.to(device) if isinstance(x, Tensor) else x for x in args]
        )
    grouped = torch.randn(4, 3, 2).to(device), rows.to(device), cols.to(device), 2, True
    library.opcheck(schema.wide_score, grouped)
    library.opcheck(schema.scaled, ([rows.to(device), cols.view(2, 3).t().to(device)],))
