# SPDX-License-Identifier: MIT
"""Options that functions share: each tuple is its type's, and the checks say what is wrong."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from lap_ext import options
from lap_ext.errors import LapTypeError, LapValueError

PAIRS = {
    "SCOPES": options.Scope,
    "NORMALIZATIONS": options.Normalize,
    "ORDERS": options.Order,
    "BATCH_NORMS": options.BatchNorm,
    "RESIDUALS": options.Residual,
    "ON_UNSUPPORTED": options.OnUnsupported,
    "BYS": options.By,
    "COSTS": options.Cost,
}


def test_words_are_those_of_the_types() -> None:
    tuples = {name for name, value in vars(options).items() if isinstance(value, tuple)}
    assert tuples == set(PAIRS)
    for name, kind in PAIRS.items():
        assert getattr(options, name) == get_args(kind)
    assert options.SCOPES == ("layer", "global")
    assert options.NORMALIZATIONS == ("auto", "none", "norm", "lamp")
    assert options.ORDERS == ("parallel", "forward", "backward")
    assert options.BATCH_NORMS == ("edge", "fold", "ignore")
    assert options.RESIDUALS == ("sum", "chain")
    assert options.ON_UNSUPPORTED == ("raise", "cut")
    assert options.BYS == ("layer", "parameter")


@pytest.mark.parametrize("name", PAIRS)
def test_known_words_pass(name: str) -> None:
    known = getattr(options, name)
    for word in known:
        options.one_of("option", word, known)


@pytest.mark.parametrize(
    ("value", "known", "text"),
    [
        ("all", options.SCOPES, "expected scope to be 'layer' or 'global', got 'all'."),
        (
            "l2",
            options.NORMALIZATIONS,
            "expected scope to be 'auto', 'none', 'norm' or 'lamp', got 'l2'.",
        ),
        (None, options.SCOPES, "expected scope to be 'layer' or 'global', got None."),
        (3, options.RESIDUALS, "expected scope to be 'sum' or 'chain', got 3."),
        (["layer"], options.SCOPES, "expected scope to be 'layer' or 'global', got ['layer']."),
    ],
)
def test_one_of(value: Any, known: tuple[str, ...], text: str) -> None:
    with pytest.raises(LapValueError) as caught:
        options.one_of("scope", value, known)
    assert str(caught.value) == text and caught.value.argument == "scope"
    assert caught.value.text(lambda name: f"--{name}").startswith("expected --scope to be ")


@pytest.mark.parametrize("value", [1, 2, 10**9])
def test_positive(value: int) -> None:
    options.positive("rounds", value)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0, LapValueError, "expected rounds >= 1, got 0."),
        (-3, LapValueError, "expected rounds >= 1, got -3."),
        (True, LapTypeError, "expected rounds to be an integer, got bool."),
        (2.0, LapTypeError, "expected rounds to be an integer, got float."),
        ("2", LapTypeError, "expected rounds to be an integer, got str."),
        (None, LapTypeError, "expected rounds to be an integer, got NoneType."),
    ],
)
def test_not_positive(value: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        options.positive("rounds", value)
    assert str(caught.value) == text and type(caught.value) is kind
