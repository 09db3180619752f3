# SPDX-License-Identifier: MIT
"""Reads and writes sparsities as text, for command lines and for the record of a pruning.

    0.9             for every layer
    PATTERN=0.9     for the layers whose names match the pattern; one text for each pattern
    erk:0.9         for all layers together, by the allocation erk, er, uniform or uniform_plus

Other allocations have no such text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from lap_ext.allocation.layerwise import Allocation, Sparsity, er, erk, uniform, uniform_plus
from lap_ext.errors import LapValueError
from lap_ext.ops.check import Number

_KINDS: dict[str, Callable[[Number], Allocation]] = {
    "erk": erk,
    "er": er,
    "uniform": uniform,
    "uniform_plus": uniform_plus,
}


def of_texts(texts: Sequence[str]) -> Sparsity:
    """Reads a sparsity, in the form that `prune` accepts, from its texts.

    Args:
        texts: one text in any of the forms above, or several texts with patterns.

    Raises:
        ValueError: a text has none of these forms.

    Example:
        >>> of_texts(["0.9"]), of_texts(["fc*=0.5", "*=0.9"]), of_texts(["erk:0.9"])
        (0.9, {'fc*': 0.5, '*': 0.9}, erk(sparsity=0.9))
    """
    if len(texts) == 1 and "=" not in texts[0]:
        kind, colon, text = texts[0].rpartition(":")
        if not colon:
            return _fraction(text)
        if kind not in _KINDS:
            raise LapValueError(
                "{argument} 0.9, 'PATTERN=0.9' or erk:0.9, er:0.9, uniform:0.9, uniform_plus:0.9",
                repr(texts[0]),
                argument="sparsity",
            )
        return _KINDS[kind](_fraction(text))
    by_pattern = {}
    for item in texts:
        pattern, equals, text = item.rpartition("=")
        if not equals:
            raise LapValueError(
                "one {argument}, or several of the form 'PATTERN=0.9'",
                repr(item),
                argument="sparsity",
            )
        by_pattern[pattern] = _fraction(text)
    return by_pattern


def text_of(sparsity: Sparsity) -> str:
    """Writes a sparsity as its texts, separated by commas, and other allocations as their repr.

    Example:
        >>> text_of(0.9), text_of({"fc*": 0.5, "*": 0.9}), text_of(erk(0.9))
        ('0.9', 'fc*=0.5, *=0.9', 'erk:0.9')
        >>> text_of(uniform_plus(0.9, first="conv1"))
        "uniform_plus(sparsity=0.9, first='conv1', last=None)"
    """
    if isinstance(sparsity, Mapping):
        return ", ".join(f"{pattern}={share}" for pattern, share in sparsity.items())
    if isinstance(sparsity, er | uniform | uniform_plus):
        kind, share = type(sparsity).__name__, sparsity.sparsity
        if kind in _KINDS and sparsity == _KINDS[kind](share):
            return f"{kind}:{share}"
    return str(sparsity)


def _fraction(text: str) -> float:
    """Reads a number."""
    try:
        return float(text)
    except ValueError:
        percent = re.fullmatch(r"\d+(\.\d+)?%", text)
        cure = f"Did you mean {float(text[:-1]) / 100:g}?" if percent else ""
        raise LapValueError(
            "{argument} to be a number (the fraction removed)",
            repr(text),
            cure,
            argument="sparsity",
        ) from None
