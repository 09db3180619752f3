# SPDX-License-Identifier: MIT
"""Tables, enumerations, suggestions, patterns and names of layers."""

from __future__ import annotations

import pytest

from lap_ext import _text

HOSTILE = "\x1b[31m\x07\x7f\x9b\u202e\u2066\u200f\u061c\u2028\ud800\r\na\tb"
SHOWN = r"\x1b[31m\x07\x7f\x9b\u202e\u2066\u200f\u061c\u2028\ud800\r\na\tb"


def test_visible() -> None:
    """Controls of a terminal, of writing direction and of lines, and halves of characters."""
    assert _text.visible(HOSTILE) == SHOWN
    assert _text.visible(SHOWN) == SHOWN  # once is enough, twice does no harm
    assert _text.visible("a\n\x1bb", keep="\n") == "a\n\\x1bb"


@pytest.mark.parametrize(
    "name",
    ["", "conv1", "a b", "$\\frac$", "Überschrift", "層.权重", "שכבה", "می\u200cخواهم"],
)
def test_ordinary_text_is_not_changed(name: str) -> None:
    assert _text.visible(name) is name or _text.visible(name) == name


def test_hostile_names_in_tables_and_lists() -> None:
    assert _text.columns([("layer", "n"), (HOSTILE, "1")]).split("\n")[2].split("  ") == [
        SHOWN,
        "1",
    ]
    assert SHOWN in _text.html_table([("layer",), (HOSTILE,)])
    assert _text.some([HOSTILE, "b"], 1) == f"{SHOWN} and 1 more"
    assert _text.lines([HOSTILE], 1) == f"\n  {SHOWN}."
    assert _text.in_html("<b>&\x1b") == r"&lt;b&gt;&amp;\x1b"


def test_a_name_of_any_length_leaves_the_other_rows_short() -> None:
    table = _text.columns([("layer", "n"), ("a" * 10_000, "1"), ("b", "2")]).split("\n")
    assert table[2] == f"{'a' * 10_000}  1"
    assert len(table[3]) < 200 and table[3].split() == ["b", "2"]


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
