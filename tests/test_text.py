# SPDX-License-Identifier: MIT
"""Tables, enumerations, suggestions, patterns and names of layers."""

from __future__ import annotations

import pytest

from lap_ext import _text


def test_columns_are_aligned() -> None:
    rows = [("name", "n"), ("a", "1000"), ("longer", "2")]
    assert _text.columns(rows, right=[1]).splitlines() == [
        "name       n",
        "------  ----",
        "a       1000",
        "longer     2",
    ]
    assert _text.columns([("only", "a head")]) == "only  a head\n----  ------"


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more")]
)
def test_some(count: int, text: str) -> None:
    assert _text.some(map(str, range(count)), 3) == text
    assert _text.some({str(i): None for i in range(count)}, 3) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (2, "\n  0.\n  1."), (3, "\n  0.\n  1.\n  and 1 more.")]
)
def test_lines(count: int, text: str) -> None:
    assert _text.lines([str(i) for i in range(count)], 2) == text


def test_did_you_mean() -> None:
    known = ["lookahead", "lookback", "magnitude"]
    assert _text.did_you_mean("lookahed", known) == "Did you mean 'lookahead'?"
    both = _text.did_you_mean("lookaback", known, most=3)
    assert both == "Did you mean 'lookback' or 'lookahead'?"
    assert _text.did_you_mean("wanda", known) == ""
    assert _text.did_you_mean("x", []) == ""


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("layer1.conv", "layer1.*", True),
        ("layer1.conv", "layer1", False),
        ("Head", "head", False),
        ("a[0]", "a[0]", True),  # a name is its own pattern, whatever letters it has
        ("a0", "a[0]", True),
        ("fc", "*", True),
    ],
)
def test_matches(name: str, pattern: str, fits: bool) -> None:
    assert _text.matches(name, pattern) == fits


@pytest.mark.parametrize(
    "parameter", ["conv.weight", "attn.in_proj_weight", "weight", "a.weight.weight"]
)
def test_a_layer_stands_for_its_parameter(parameter: str) -> None:
    layer = _text.layer_name(parameter)
    assert parameter in _text.parameter_names(layer)
    assert _text.parameter_in(layer, [parameter]) == parameter
    assert _text.parameter_in(layer, []) is None
