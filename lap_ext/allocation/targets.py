# SPDX-License-Identifier: MIT
"""Budgets of what remains: so many FLOPs or parameters of the whole model, not of each layer.

    flops(0.5)                half of the FLOPs
    params(25_000_000)        at most 25 million parameters

Units that go through several layers (structure="channel", "head", "expert", "unit") are removed
from the least on, until no more is left than that. What a unit costs is counted on all sides of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, SupportsIndex, TypeAlias

from lap_ext.errors import LapTypeError, LapValueError, calling
from lap_ext.ops.check import Number

Counted: TypeAlias = Literal["flops", "params"]
_WORDS: dict[Counted, str] = {"flops": "FLOPs", "params": "parameters"}


@dataclass(frozen=True)
class Target:
    """What remains of a model; `flops` and `params` make one.

    Attributes:
        counted: what is counted, "flops" or "params".
        target: a fraction between 0 and 1, or a number of 1 or more.
    """

    counted: Counted
    target: Number

    def __str__(self) -> str:
        return f"{self.counted}:{self.target}"

    def limit(self, dense: int) -> int:
        """Computes the most that may remain of a model that has this many, rounded down.

        A float is taken for what its digits say: 0.7 is seven tenths.

        Raises:
            ValueError: the target is a number larger than dense.

        Example:
            >>> flops(0.7).limit(1000), params(640).limit(1000)
            (700, 640)
        """
        if isinstance(self.target, int):
            with calling(self.counted):
                _check_size(self.target, dense, self.counted)
            return self.target
        if isinstance(self.target, float):
            return math.floor(Fraction(repr(self.target)) * dense)
        return math.floor(Fraction(*self.target.as_integer_ratio()) * dense)


@calling("flops")
def flops(target: Number | SupportsIndex) -> Target:
    """Leaves at most so many FLOPs, counted through the graph for the example inputs.

    Multiplications and additions count one each, in layers and in products of activations, as in
    torch.utils.flop_counter. It goes in the place of a sparsity, with a structure across layers.

    Args:
        target: what remains. A float between 0 and 1 is a fraction of the dense model's FLOPs, an
            integer a number of them. Twice as many example inputs have twice as many.

    Raises:
        TypeError: target is no number.
        ValueError: target is neither a fraction between 0 and 1 nor an integer of 1 or more.

    Example:
        >>> flops(0.5)
        Target(counted='flops', target=0.5)
    """
    return Target("flops", _checked(target, "flops"))


@calling("params")
def params(target: Number | SupportsIndex) -> Target:
    """Leaves at most so many parameters, with biases, norms and all that is never pruned.

    It goes in the place of a sparsity, with a structure across layers. Tied weights count once.

    Args:
        target: what remains. A float between 0 and 1 is a fraction of the dense model's parameters,
            an integer a number of them.

    Raises:
        TypeError: target is no number.
        ValueError: target is neither a fraction between 0 and 1 nor an integer of 1 or more.

    Example:
        >>> params(25_000_000).limit(40_000_000)
        25000000
    """
    return Target("params", _checked(target, "params"))


def _checked(target: object, counted: Counted) -> Number:
    """Returns a valid target: an int for a number, or what was given for a fraction."""
    words = _WORDS[counted]
    expected = (
        f"{{argument}} to be what remains: a fraction between 0 and 1 (a float), or a number of "
        f"{words} (an integer >= 1)"
    )
    is_number = hasattr(target, "as_integer_ratio") or hasattr(target, "__index__")
    if isinstance(target, bool) or not is_number:
        raise LapTypeError(expected, type(target).__name__, argument="target")
    if hasattr(target, "__index__"):
        number = target.__index__()
        if number < 1:
            raise LapValueError(expected, number, argument="target")
        return int(number)
    fraction: Any = float(target) if isinstance(target, float) else target
    if fraction != fraction or not 0 < fraction < 1:  # noqa: PLR0124 (a NaN of any number type)
        raise LapValueError(expected, fraction, _cure(fraction, counted), argument="target")
    checked: Number = fraction
    return checked


def _check_size(target: int, dense: int, counted: Counted) -> None:
    if target > dense:
        raise LapValueError(
            f"{{argument}} <= {dense:,}, the {_WORDS[counted]} of the dense model",
            f"{target:,}",
            "It is what remains; a float is a fraction.",
            argument="target",
        )


def _cure(given: Any, counted: Counted) -> str:
    """Says what a number outside of (0, 1) may have been meant for."""
    if not math.isfinite(given):
        return ""
    if given == 1:
        return "1.0 would remove nothing."
    if 1 < given <= 100:
        return f"Did you mean {float(given) / 100:g}, {float(given):g} %?"
    if given > 1 and given == int(given):
        return f"Write a number of {_WORDS[counted]} as an integer: {counted}({int(given)})."
    return ""
