# SPDX-License-Identifier: MIT
"""Budgets of what remains: what they come to, and what is said of targets that are none."""

from __future__ import annotations

import dataclasses
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import lap_ext
from lap_ext import allocation

BOTH = pytest.mark.parametrize("make", [allocation.flops, allocation.params])


@BOTH
@pytest.mark.parametrize(
    ("target", "dense", "limit"),
    [
        (0.5, 10, 5),
        (0.5, 11, 5),  # no more than half
        (0.7, 10, 7),  # 0.7 as a double is a little less
        (0.29, 100, 29),
        (1e-9, 100, 0),
        (0.999, 10**18 + 1, 999 * 10**15),
        (Fraction(1, 3), 9, 3),
        (Decimal("0.7"), 10, 7),
        (np.float64(0.7), 10, 7),
        (np.float32(0.5), 10, 5),
        (1, 10, 1),
        (7, 10, 7),
        (10, 10, 10),
        (np.int64(7), 10, 7),
        (3 * 10**18, 4 * 10**18, 3 * 10**18),
    ],
)
def test_limit(make: Any, target: Any, dense: int, limit: int) -> None:
    result = make(target).limit(dense)
    assert result == limit and type(result) is int


@BOTH
def test_more_than_there_is(make: Any) -> None:
    words = {"flops": "FLOPs", "params": "parameters"}[make.__name__]
    said = (
        f"{make.__name__}: expected target <= 1,000, the {words} of the dense model, got 1,001. "
        "It is what remains; a float is a fraction."
    )
    with pytest.raises(lap_ext.LapError, match=f"^{re.escape(said)}$") as raised:
        make(1001).limit(1000)
    assert isinstance(raised.value, ValueError)


@BOTH
@pytest.mark.parametrize(
    ("target", "got"),
    [
        (0, "0"),
        (-3, "-3"),
        (0.0, "0.0"),
        (-0.5, "-0.5"),
        (float("nan"), "nan"),
        (Decimal("nan"), "NaN"),
        (Decimal("-inf"), "-Infinity"),
        (Fraction(3, 2), "3/2. Did you mean 0.015, 1.5 %?"),
        (float("inf"), "inf"),
        (1.0, "1.0. 1.0 would remove nothing."),
        (50.0, "50.0. Did you mean 0.5, 50 %?"),
    ],
)
def test_numbers_that_are_no_target(make: Any, target: Any, got: str) -> None:
    refused(make, target, got, ValueError)


@BOTH
@pytest.mark.parametrize("target", [True, "0.5", None, [0.5], {"fc": 0.5}])
def test_what_is_no_number(make: Any, target: Any) -> None:
    refused(make, target, type(target).__name__, TypeError)


def test_an_absolute_number_is_an_integer() -> None:
    cure = "1000000000.0. Write a number of FLOPs as an integer: flops(1000000000)."
    refused(allocation.flops, 1e9, cure, ValueError)
    cure = "2000.0. Write a number of parameters as an integer: params(2000)."
    refused(allocation.params, 2000.0, cure, ValueError)


def refused(make: Any, target: Any, got: str, kind: type[Exception]) -> None:
    words = {"flops": "FLOPs", "params": "parameters"}[make.__name__]
    said = (
        f"{make.__name__}: expected target to be what remains: a fraction between 0 and 1 (a "
        f"float), or a number of {words} (an integer >= 1), got {got}"
    )
    with pytest.raises(lap_ext.LapError, match=f"^{re.escape(said)}\\.?$") as raised:
        make(target)
    assert isinstance(raised.value, kind)


def test_a_target_is_a_value() -> None:
    assert allocation.flops(0.5) == allocation.flops(0.5) != allocation.params(0.5)
    assert str(allocation.params(7)) == "params:7" and hash(allocation.params(7))
    with pytest.raises(dataclasses.FrozenInstanceError):
        allocation.flops(0.5).target = 0.7  # type: ignore[misc]


def test_it_is_no_allocation_to_layers() -> None:
    assert not isinstance(allocation.flops(0.5), allocation.Allocation)
    with pytest.raises(lap_ext.LapError, match=r"structure across layers.* got flops\(0.5\)"):
        allocation.of(allocation.flops(0.5))
