# SPDX-License-Identifier: MIT
"""Sums of tensors have the bits of math.fsum, and norms that leave float64 are an error."""

from __future__ import annotations

import math
import re
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import lap_ext
from lap_ext.ops import schema
from lap_ext.pruning import normalization
from lap_ext.pruning.exact_sum import ExactSum
from tests.helpers.checkpoints import prune, write

LEAST, MOST = 5e-324, 1.7976931348623157e308
ANY = st.floats(allow_nan=False, allow_infinity=False)
HOSTILE = st.sampled_from([0.0, -0.0, LEAST, -LEAST, 2.0**-1022, 1.0, 2.0**53, 1e308, MOST, -MOST])


def total(numbers: list[float], cut: int) -> float:
    """The sum in two tensors."""
    result = ExactSum()
    values = torch.tensor(numbers, dtype=torch.float64)
    for part in (values[:cut], values[cut:]):
        result.add(part)
    return result.value()


def nearest(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


@given(st.lists(ANY | HOSTILE | st.floats(0, 1e-300), max_size=60), st.integers(0, 60))
@example([MOST, MOST, -MOST], 1)
@example([2.0**53, 1.0, LEAST], 0)  # a tie, broken by the least number
@example([2.0**-1022, LEAST, LEAST], 2)
def test_bits_of_fsum(numbers: list[float], cut: int) -> None:
    found = total(numbers, cut)
    try:
        expected = math.fsum(numbers)
    except OverflowError:  # fsum gives up on the way, even if the sum is within the range
        expected = nearest(sum(map(Fraction, numbers)))
    assert struct.pack("d", found) == struct.pack("d", expected)


def test_more_than_a_batch() -> None:
    values = torch.randn(100_000, dtype=torch.float64) * torch.randn(100_000).mul(20).exp()
    result = ExactSum()
    result.add(values)
    assert result.value() == math.fsum(values.tolist())


def test_numbers_that_are_not_finite() -> None:
    assert total([1.0, math.inf, -MOST], 1) == math.inf
    assert math.isnan(total([math.inf, math.nan], 1))
    assert math.isnan(total([math.inf, -math.inf], 1))
    assert total([MOST, MOST], 1) == math.inf
    assert total([-MOST, -MOST], 2) == -math.inf
    assert total([], 0) == 0.0


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 3, 3), (7, 1), (2, 0), (6,), ()], ids=str)
def test_squares_by_rows(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch ends between rows; whatever its size, the sum is that of all rows."""
    scores = torch.rand(shape)
    rows = scores.reshape(-1, shape[-1] if shape else 1) if scores.numel() else scores
    expected = math.fsum(schema.row_squared_norms(rows, False, "scores").tolist())
    for size in (1, 4, 1 << 18):
        monkeypatch.setattr(normalization, "_SQUARED", size)
        assert normalization.squares_of(scores).value() == expected


@pytest.mark.parametrize("value", [1e200, 1.2e154], ids=str)  # squares, and their sum, overflow
def test_a_norm_that_is_not_finite(value: float, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 2, bias=False)).double()
    net[1].weight.data.fill_(value)
    source, inputs = write(tmp_path / "dense", net.state_dict(), 1), torch.zeros(1, 6).double()
    options: dict[str, Any] = {"criterion": "magnitude", "normalize": "norm", "scope": "global"}
    said = "layer '1': expected scores with a finite norm, got inf."
    with pytest.raises(ValueError, match=f"^{re.escape(f'prune, {said}')}$"):
        lap_ext.prune(net, inputs, 0.5, **options)
    with pytest.raises(ValueError, match=f"^{re.escape(f'checkpoint.prune, {said}')}$"):
        prune(source, tmp_path / "out", 0.5, model=net, example_inputs=inputs, **options)
