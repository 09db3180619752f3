# SPDX-License-Identifier: MIT
"""Defines types and checks of options that prune, scores, Pruner, adapters and checkpoint share.

`lap_ext.prune` documents each option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lap_ext.errors import LapTypeError, LapValueError

if TYPE_CHECKING:
    from torch import Tensor

Scope: TypeAlias = Literal["layer", "global"]
Normalize: TypeAlias = Literal["none", "norm", "lamp"]
Order: TypeAlias = Literal["parallel", "forward", "backward"]
BatchNorm: TypeAlias = Literal["edge", "fold", "ignore"]
Residual: TypeAlias = Literal["sum", "chain"]
OnUnsupported: TypeAlias = Literal["raise", "cut"]
By: TypeAlias = Literal["layer", "parameter"]  # whose names are the keys of scores
Patterns: TypeAlias = str | Sequence[str]  # of layer names: exact, or with *, ? and [abc]
Inputs: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"  # of model.forward

SCOPES: tuple[str, ...] = get_args(Scope)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalize)
ORDERS: tuple[str, ...] = get_args(Order)
BATCH_NORMS: tuple[str, ...] = get_args(BatchNorm)
RESIDUALS: tuple[str, ...] = get_args(Residual)
ON_UNSUPPORTED: tuple[str, ...] = get_args(OnUnsupported)
BYS: tuple[str, ...] = get_args(By)


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Checks that an option has one of its known values."""
    if value not in known:
        choices = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise LapValueError(f"{{argument}} to be {choices}", repr(value), argument=name)


def positive(name: str, value: object) -> None:
    """Checks that a count is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise LapTypeError("{argument} to be an integer", type(value).__name__, argument=name)
    if value < 1:
        raise LapValueError("{argument} >= 1", value, argument=name)
