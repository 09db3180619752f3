# SPDX-License-Identifier: MIT
"""Structures by their definition, in plain Python: loops over single weights and exact numbers.

Nothing here is taken from lap_ext, and nothing is fast. A weight is [R, C, *K]; its scores are a
flat list of numbers without rounding. A mask is a flat list of bools.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, product
from typing import Any


@dataclass(frozen=True)
class Layer:
    """A weight's shape, [outputs, inputs of a group, *K], or the other way round if transposed."""

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    def places(self) -> list[tuple[int, int, int, int]]:
        """(group, output channel in it, input channel in it, kernel position) of each weight."""
        (rows, cols), window = self.shape[:2], math.prod(self.shape[2:])
        height = rows // self.groups
        found = []
        for row in range(rows):
            for col in range(cols):
                for position in range(window):
                    pair = (col, row % height) if self.transposed else (row % height, col)
                    found.append((row // height, *pair, position))
        return found

    def channels(self) -> list[tuple[int, int]]:
        """(output channel, input channel) of each weight, counted over all groups."""
        cols, height = self.shape[1], self.shape[0] // self.groups
        outputs, inputs = (cols, height) if self.transposed else (height, cols)
        return [(g * outputs + o, g * inputs + i) for g, o, i, _ in self.places()]


def units(layer: Layer, kind: str, sizes: tuple[int, int] = (1, 1)) -> list[Hashable]:
    """The unit of each weight: blocks of sizes (outputs, inputs), rows or columns."""
    names: list[Hashable] = []
    for group, output, into, _ in layer.places():
        if kind == "row":
            names.append((group, output))
        elif kind == "column":
            names.append((group, into))
        else:
            names.append((group, output // sizes[0], into // sizes[1]))
    return names


def lines(layer: Layer, axis: str, of: int) -> list[Hashable]:
    """The N:M group of each weight."""
    names: list[Hashable] = []
    for index, (group, output, into, position) in enumerate(layer.places()):
        if axis == "in":
            names.append((group, output, position, into // of))
        elif axis == "out":
            names.append((group, into, position, output // of))
        else:
            names.append(index // of)
    return names


def members(names: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The flat indices of each unit, units in the order of their first weight."""
    found: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    return found


def pattern(scores: Sequence[Any], names: Sequence[Hashable], keep: int, live: Any) -> list[bool]:
    """Keeps the best of each group, among the live ones."""
    mask = [False] * len(scores)
    for indices in members(names).values():
        ranked = sorted((i for i in indices if live[i]), key=lambda i: (-scores[i], i))
        for index in ranked[:keep]:
            mask[index] = True
    return mask


def partition(
    every: Sequence[tuple[Sequence[Any], Sequence[Hashable], Sequence[bool]]],
    keep: int,
    aggregate: str = "energy",
    numbered: bool = False,
) -> list[list[bool]]:
    """Keeps the best units of (scores, units, live weights), in one ranking, as long as they fit.

    Units are numbered by their first weight, or by their names.
    """
    ranked = []
    for tensor, (scores, names, live) in enumerate(every):
        found = members(names)
        order = sorted(found) if numbered else list(found)  # type: ignore[type-var]
        for number, name in enumerate(order):
            indices = found[name]
            values = [scores[i] if live[i] else 0 for i in indices]
            worth = sum(Fraction(v) ** 2 if aggregate == "energy" else Fraction(v) for v in values)
            if aggregate == "mean":
                worth = Fraction(worth) / len(indices)
            if any(live[i] for i in indices):
                ranked.append((-worth, tensor, number, indices))
    masks = [[False] * len(scores) for scores, _, _ in every]
    left = keep
    for _, tensor, _, indices in sorted(ranked, key=lambda unit: unit[:3]):
        if len(indices) > left:
            break
        left -= len(indices)
        for index in indices:
            masks[tensor][index] = bool(every[tensor][2][index])
    return masks


@lru_cache(1)
def transposable_patterns() -> list[tuple[tuple[int, int], ...]]:
    """The kept columns of each row of a tile of 4 by 4: 90 choices, in rising order."""
    pairs = list(combinations(range(4), 2))
    return [
        rows
        for rows in product(pairs, repeat=4)
        if all(sum(col in row for row in rows) == 2 for col in range(4))
    ]


def transposable(
    scores: Sequence[Any], layer: Layer, live: Sequence[bool], squared: bool = True
) -> list[bool]:
    """Keeps 2:4 along rows and columns of the matrix, by the first of the best of 90 patterns.

    First counts how many live scores a pattern keeps, then their sum.
    """
    (rows, cols), window = layer.shape[:2], math.prod(layer.shape[2:])
    mask, choices = [False] * len(scores), transposable_patterns()
    for top, left, position in product(range(0, rows, 4), range(0, cols, 4), range(window)):
        tile = [
            [((top + row) * cols + left + col) * window + position for col in range(4)]
            for row in range(4)
        ]
        counted = [[scores[i] if live[i] else 0 for i in row] for row in tile]
        values = [[x * x if squared else x for x in row] for row in counted]
        may = [[bool(live[i]) for i in row] for row in tile]

        def rank(choice: Any, may: Any = may, values: Any = values) -> tuple[int, Any]:
            count, total = (
                sum(v[a] + v[b] for v, (a, b) in zip(x, choice, strict=True)) for x in (may, values)
            )
            return count, total

        best = max(choices, key=rank)
        for row, pair in zip(tile, best, strict=True):
            for col in pair:
                mask[row[col]] = bool(live[row[col]])
    return mask
