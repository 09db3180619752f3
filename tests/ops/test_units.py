# SPDX-License-Identifier: MIT
"""best and best_of_all against the definition: a ranking of units, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lap_ext.ops.units import Ranked, best, best_of_all, sizes_of, worth_of
from lap_ext.structures import Grid, Matrix


@dataclass(frozen=True)
class Plain:
    """The units of a layer in plain numbers."""

    worth: list[float]
    sizes: list[int]
    live: list[bool]
    least: int

    def order(self) -> list[int]:
        """The live units, the best first."""
        units = [i for i, live in enumerate(self.live) if live]
        return sorted(units, key=lambda i: (-self.worth[i], i))

    def weights(self, count: int) -> int:
        """The weights of so many of the best units."""
        return sum(self.sizes[i] for i in self.order()[:count])

    def allowed(self, multiple_of: int) -> list[int]:
        """How many units may be kept: multiples, or all; or all that are live, if too few."""
        live = len(self.order())
        every = {len(self.worth), live} if live < multiple_of else {len(self.worth)}
        return [c for c in range(live + 1) if c % multiple_of == 0 or c in every]

    def floor(self, multiple_of: int) -> int:
        """The fewest units that have the least weights; as many as may be where none do."""
        enough = [c for c in self.allowed(multiple_of) if self.weights(c) >= self.least]
        return min(enough, default=self.allowed(multiple_of)[-1])

    def marks(self, count: int) -> list[bool]:
        """The mask of the best so many."""
        kept = set(self.order()[:count])
        return [i in kept for i in range(len(self.worth))]

    def ranked(self, one_size: bool) -> Ranked:
        """The same as the library takes it; all alive and one size can be said in short."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        return Ranked(
            torch.tensor(self.worth, dtype=torch.float64),
            self.sizes[0] if one_size and len(set(self.sizes)) == 1 else sizes,
            None if all(self.live) else torch.tensor(self.live, dtype=torch.bool),
            self.least,
        )


@st.composite
def layers(draw: st.DrawFn) -> Plain:
    """Few different worths, so that ties are common; sizes equal or ragged."""
    count = draw(st.integers(0, 9))
    one = draw(st.booleans())
    size = st.just(draw(st.integers(1, 3))) if one else st.integers(1, 4)
    alive = st.just(True) if draw(st.booleans()) else st.sampled_from([True, True, True, False])

    def several(values: Any) -> list[Any]:
        return draw(st.lists(values, min_size=count, max_size=count))

    worth = several(st.sampled_from([0.0, 1.0, 2.0, 2.5, 1e300]))
    return Plain(worth, several(size), several(alive), draw(st.sampled_from([0, 0, 1, 4, 99])))


KEEP, MULTIPLE = st.integers(0, 30), st.sampled_from([1, 1, 2, 3])


def expected_of_one(units: Plain, keep: int, multiple_of: int) -> list[bool]:
    fits = [c for c in units.allowed(multiple_of) if units.weights(c) <= keep]
    return units.marks(max(fits[-1], units.floor(multiple_of)))


def expected_of_all(every: list[Plain], keep: int, multiple_of: int) -> list[list[bool]]:
    """Floors first; then bundles of units by the least worth in each, as long as they fit."""
    counts = [units.floor(multiple_of) for units in every]
    left = keep - sum(units.weights(c) for units, c in zip(every, counts, strict=True))
    bundles = []
    for layer, (units, floor) in enumerate(zip(every, counts, strict=True)):
        steps = [c for c in units.allowed(multiple_of) if c >= floor]
        for before, after in pairwise(steps):
            worth = min(units.worth[i] for i in units.order()[before:after])
            bundles.append((-worth, layer, after, units.weights(after) - units.weights(before)))
    for _, layer, after, weights in sorted(bundles):
        if weights > left:
            break
        left -= weights
        counts[layer] = after
    return [units.marks(count) for units, count in zip(every, counts, strict=True)]


@given(layers(), KEEP, MULTIPLE, st.booleans())
def test_one_layer(units: Plain, keep: int, multiple_of: int, one_size: bool) -> None:
    expected = expected_of_one(units, keep, multiple_of)
    one_size &= bool(units.sizes)
    got = best(units.ranked(one_size), keep, multiple_of)
    assert got.dtype == torch.bool and got.tolist() == expected
    (together,) = best_of_all([units.ranked(one_size)], keep, multiple_of)
    assert together.tolist() == expected


@given(st.lists(layers(), max_size=4), KEEP, MULTIPLE, st.booleans())
def test_several_layers(every: list[Plain], keep: int, multiple_of: int, one_size: bool) -> None:
    """Of equal units, those of the earlier layer come first."""
    ranked = [units.ranked(one_size and bool(units.sizes)) for units in every]
    got = best_of_all(ranked, keep, multiple_of)
    assert [m.tolist() for m in got] == expected_of_all(every, keep, multiple_of)


@given(st.lists(layers(), min_size=1, max_size=3), KEEP)
def test_floors_that_do_not_fit(every: list[Plain], keep: int) -> None:
    needed = sum(units.weights(units.floor(1)) for units in every)
    ranked = [units.ranked(one_size=False) for units in every]
    if needed <= keep:
        best_of_all(ranked, keep, floors=True)
        return
    with pytest.raises(ValueError, match=f"it keeps {keep} weights.*one that needs {needed} in"):
        best_of_all(ranked, keep, floors=True)


def test_ties_go_to_the_earlier_layer() -> None:
    equal = Ranked(torch.ones(3, dtype=torch.float64), 2)
    got = best_of_all([equal, equal], 8)
    assert [m.tolist() for m in got] == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize(
    ("shape", "groups", "block", "sizes"),
    [
        ((4, 6), 1, (2, 3), 6),
        ((4, 6), 1, (4, 6), 24),
        ((6, 6, 3), 2, (3, 2), 18),
        ((3, 4), 1, (2, 3), [6, 2, 3, 1]),
        ((6, 2), 2, (2, 2), [4, 2, 4, 2]),
        ((2, 2, 0), 1, (1, 1), 0),
        ((0, 2), 1, (1, 1), []),
    ],
    ids=str,
)
def test_sizes(shape: tuple[int, ...], groups: int, block: tuple[int, int], sizes: Any) -> None:
    got = sizes_of(Grid.of(Matrix(shape, groups), *block))
    assert (got.tolist() if isinstance(got, torch.Tensor) else got) == sizes


def test_worth() -> None:
    sums = torch.tensor([0.0, 4.0, 2.0, torch.inf, torch.nan], dtype=torch.float64)
    most = torch.inf
    assert worth_of(sums, 2, "energy").tolist() == [0, 2, 2**0.5, most, most]
    assert worth_of(sums, 2, "mean").tolist() == [0, 2, 1, most, most]
    sizes = torch.tensor([0, 1, 4, 1, 1])
    assert worth_of(sums, sizes, "mean").tolist() == [0, 4, 0.5, most, most]
