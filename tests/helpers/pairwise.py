# SPDX-License-Identifier: MIT
"""Combinations of options such that any two values of two options are together in one of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

_TRIES = 30  # rows that are drawn, of which the one with the most new pairs is taken


def covering(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Combines the values of all factors; the same ones each time."""
    drawn = random.Random(seed)
    sizes = [len(values) for values in factors.values()]
    left = {
        (a, x, b, y)
        for a, b in combinations(range(len(sizes)), 2)
        for x in range(sizes[a])
        for y in range(sizes[b])
    }
    rows = []
    while left:
        tries = [_row(sizes, left, drawn) for _ in range(_TRIES)]
        rows.append(max(tries, key=lambda x: sum(_has(x, pair) for pair in left)))
        left -= {pair for pair in left if _has(rows[-1], pair)}
    return [
        {name: values[index] for (name, values), index in zip(factors.items(), row, strict=True)}
        for row in rows
    ]


def _row(sizes: Sequence[int], left: set[tuple[int, ...]], drawn: random.Random) -> list[int]:
    """Draws a row that has one of the pairs that are left."""
    row = [drawn.randrange(size) for size in sizes]
    a, x, b, y = drawn.choice(sorted(left))
    row[a], row[b] = x, y
    return row


def _has(row: Sequence[int], pair: tuple[int, ...]) -> bool:
    a, x, b, y = pair
    return row[a] == x and row[b] == y
