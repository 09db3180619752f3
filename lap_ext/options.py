# SPDX-License-Identifier: MIT
"""Defines types and checks of options that prune, scores, Pruner, adapters and checkpoint share.

`lap_ext.prune` documents each option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from lap_ext.errors import LapTypeError, LapValueError

if TYPE_CHECKING:
    from torch import Tensor, nn

Scope: TypeAlias = Literal["layer", "global"]
Normalize: TypeAlias = Literal["auto", "none", "norm", "lamp"]
Order: TypeAlias = Literal["parallel", "forward", "backward"]
BatchNorm: TypeAlias = Literal["edge", "fold", "ignore"]
Residual: TypeAlias = Literal["sum", "chain"]
OnUnsupported: TypeAlias = Literal["raise", "cut"]
By: TypeAlias = Literal["layer", "parameter"]  # whose names are the keys of scores
Cost: TypeAlias = Literal["weights", "flops"]  # of units across layers
MinKeep: TypeAlias = int | float | None  # of each layer: a count, or a fraction
# layers by their names (exact, or with *, ? and [abc]), or by the parts of a model that hold them
Pattern: TypeAlias = "str | nn.Module | type[nn.Module] | Tensor"
Patterns: TypeAlias = "Pattern | Iterable[Pattern]"
# batches, or the path of a file of statistics
Data: TypeAlias = Iterable[Any] | str | PathLike[str]
Inputs: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"  # of model.forward

SCOPES: tuple[str, ...] = get_args(Scope)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalize)
ORDERS: tuple[str, ...] = get_args(Order)
BATCH_NORMS: tuple[str, ...] = get_args(BatchNorm)
RESIDUALS: tuple[str, ...] = get_args(Residual)
ON_UNSUPPORTED: tuple[str, ...] = get_args(OnUnsupported)
COSTS: tuple[str, ...] = get_args(Cost)
BYS: tuple[str, ...] = get_args(By)


def normalize_for(normalize: Normalize, scope: Scope) -> Normalize:
    """Resolves "auto": "lamp" where layers are ranked together, otherwise "none"."""
    one_of("normalize", normalize, NORMALIZATIONS)
    if normalize == "auto":
        return "lamp" if scope == "global" else "none"
    return normalize


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Checks that an option has one of its known values."""
    if value not in known:
        choices = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise LapValueError(f"{{argument}} to be {choices}", repr(value), argument=name)


def listed(patterns: Patterns) -> tuple[Pattern, ...]:
    """Lists one pattern, or several, which may come from a generator.

    Example:
        >>> listed("fc*"), listed(name for name in ("a", "b"))
        (('fc*',), ('a', 'b'))
    """
    # without torch: modules and parameters can be iterated over too
    alone = isinstance(patterns, (str, type)) or not isinstance(patterns, Iterable)
    if alone or hasattr(patterns, "parameters") or hasattr(patterns, "requires_grad"):
        return (cast("Pattern", patterns),)
    return tuple(cast("Iterable[Pattern]", patterns))


def positive(name: str, value: object) -> None:
    """Checks that a count is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise LapTypeError("{argument} to be an integer", type(value).__name__, argument=name)
    if value < 1:
        raise LapValueError("{argument} >= 1", value, argument=name)
