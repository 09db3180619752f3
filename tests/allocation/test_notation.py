# SPDX-License-Identifier: MIT
"""Sparsities as texts: read, written, and what is said of a text that is none."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest

import lap_ext
from lap_ext.allocation import notation

PAIRS: list[tuple[list[str], Any]] = [
    (["0.9"], 0.9),
    (["fc=0.5"], {"fc": 0.5}),
    (["fc*=0.5", "*=0.9"], {"fc*": 0.5, "*": 0.9}),
    (["a=b=0.5"], {"a=b": 0.5}),
    (["erk:0.9"], lap_ext.erk(0.9)),
    (["er:0.9"], lap_ext.er(0.9)),
    (["uniform:0.9"], lap_ext.uniform(0.9)),
    (["uniform_plus:0.9"], lap_ext.uniform_plus(0.9)),
]


@pytest.mark.parametrize(("texts", "sparsity"), PAIRS, ids=str)
def test_there_and_back(texts: list[str], sparsity: Any) -> None:
    result = notation.of_texts(texts)
    assert result == sparsity and type(result) is type(sparsity)
    assert notation.text_of(sparsity) == ", ".join(texts)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (
            ["90%"],
            "expected sparsity to be a number (the fraction removed), got '90%'. Did you mean 0.9?",
        ),
        (["half"], "expected sparsity to be a number (the fraction removed), got 'half'."),
        (["fc=half"], "expected sparsity to be a number (the fraction removed), got 'half'."),
        (
            ["er_k:0.9"],
            "expected sparsity 0.9, 'PATTERN=0.9' or erk:0.9, er:0.9, uniform:0.9, uniform_plu",
        ),
        (["0.5", "0.9"], "expected one sparsity, or several of the form 'PATTERN=0.9', got '0.5'."),
        (["erk:90"], "erk: expected 0 <= sparsity <= 1"),
    ],
    ids=str,
)
def test_mistakes(texts: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        notation.of_texts(texts)


def test_sparsities_without_a_notation() -> None:
    assert notation.text_of(Fraction(1, 2)) == "1/2"
    assert (
        notation.text_of(lap_ext.allocation.compounded([0.5], 2))
        == "compounded(ratios=[0.5], times=2)"
    )
    named = lap_ext.uniform_plus(0.9, last="fc")
    assert notation.text_of(named) == str(named)
