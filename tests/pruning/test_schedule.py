# SPDX-License-Identifier: MIT
"""When to prune: schedules by hand, their properties, and that they remember nothing."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lap_ext import schedule
from lap_ext.schedule import Schedule, cubic, exponential, iterative, linear, one_shot

RAMPS = [linear, cubic, exponential]
Ramp = Callable[..., Schedule]
each_ramp = pytest.mark.parametrize("ramp", RAMPS, ids=lambda ramp: ramp.__name__)
densities = st.floats(1e-6, 1)


def at(plan: Schedule, steps: range) -> dict[int, float]:
    """Step -> sparsity, where it prunes."""
    sparsities = {step: plan(step) for step in steps}
    return {step: value for step, value in sparsities.items() if value is not None}


def test_one_shot() -> None:
    assert at(one_shot(0.9, at=3), range(6)) == {3: 0.9}
    assert at(one_shot(Fraction(1, 4)), range(6)) == {0: 0.25}


def test_by_hand() -> None:
    assert at(linear(0.75, 2, 8, every=2), range(12)) == {2: 0, 4: 0.25, 6: 0.5, 8: 0.75}
    # 0.5 - 0.5 * (3/4)^3 = 0.5 - 27/128, 0.5 - 0.5 / 8, 0.5 - 0.5 / 64
    steps = {0: 0.0, 1: 37 / 128, 2: 7 / 16, 3: 63 / 128, 4: 0.5}
    assert at(cubic(0.5, 0, 4), range(9)) == steps
    # densities 1, 1/2, 1/4, 1/8
    assert at(exponential(0.875, 0, 3), range(9)) == pytest.approx(
        {0: 0, 1: 0.5, 2: 0.75, 3: 0.875}
    )
    # from half of the weights on: densities 1/2, 1/4, 1/8
    plan = exponential(0.875, 0, 2, initial=0.5)
    assert at(plan, range(9)) == {0: 0.5, 1: 0.75, 2: 0.875}


def test_end_is_a_pruning_step() -> None:
    assert list(at(cubic(0.9, 10, 25, every=10), range(50))) == [10, 20, 25]
    assert cubic(0.9, 10, 25, every=10)(25) == 0.9


def test_iterative_is_the_papers() -> None:
    plan = iterative(0.15, rounds=29, every=5, start=10)
    pruned = at(plan, range(400))
    assert list(pruned) == list(range(10, 155, 5))
    assert list(pruned.values()) == pytest.approx([1 - 0.85**k for k in range(1, 30)], rel=1e-12)
    assert at(iterative(1, rounds=2), range(4)) == {0: 1.0, 1: 1.0}
    tiny = iterative(1e-12, rounds=1)(0)
    assert tiny == pytest.approx(1e-12, rel=1e-12)  # 1 - (1 - 1e-12) is 4 digits off


@given(ratio=st.floats(0, 1), rounds=st.integers(1, 40))
def test_iterative_removes_its_ratio_of_the_rest(ratio: float, rounds: int) -> None:
    values = [0.0, *at(iterative(ratio, rounds), range(50)).values()]
    assert len(values) == rounds + 1
    for before, after in pairwise(values):
        assert before <= after <= 1
        assert 1 - after == pytest.approx((1 - before) * (1 - ratio), abs=1e-14)


@each_ramp
@given(
    start=st.integers(0, 50),
    length=st.integers(1, 60),
    every=st.integers(1, 20),
    ends=st.tuples(densities, densities),
)
def test_ramps_grow_from_initial_to_sparsity(
    ramp: Ramp, start: int, length: int, every: int, ends: tuple[float, float]
) -> None:
    first, last = 1 - max(ends), 1 - min(ends)
    assume(last < 1)
    plan = ramp(last, start, start + length, every=every, initial=first)
    pruned = at(plan, range(start + length + 30))
    assert list(pruned) == sorted({*range(start, start + length, every), start + length})
    values = list(pruned.values())
    assert values[-1] == last
    assert values[0] == pytest.approx(first, abs=1e-12)
    assert all(first <= a <= b <= last for a, b in pairwise(values))


@pytest.mark.parametrize(
    "plan",
    [one_shot(0.9, 7), linear(0.5, 0, 9), cubic(0.9, 3, 30, 4), exponential(0.9, 0, 8, 3),
     iterative(0.2, 10, 3)],
    ids=lambda plan: type(plan).__name__,
)  # fmt: skip
def test_it_remembers_nothing(plan: Schedule) -> None:
    forwards = [plan(step) for step in range(40)]
    assert [plan(step) for step in reversed(range(40))] == forwards[::-1]
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan
        assert [twin(step) for step in range(40)] == forwards
    assert eval(repr(plan), vars(schedule)) == plan
    with pytest.raises(AttributeError):
        plan.sparsity = 0.1  # type: ignore[attr-defined]


def test_repr_tells_all() -> None:
    text = "cubic(sparsity=0.9, start=0, end=100, every=10, initial=0.0)"
    assert repr(cubic(0.9, 0, 100, every=10)) == text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: one_shot(90), "one_shot: expected 0 <= sparsity <= 1 (the fraction removed), got "
         "90. Did you mean 0.90?"),
        (lambda: one_shot(0.9, at=-1), "one_shot: expected at >= 0, got -1."),
        (lambda: linear(0.9, 5, 5), "linear: expected start < end, got 5 and 5. Use one_shot to "
         "prune at one step."),
        (lambda: cubic(0.9, 0, 5, every=0), "cubic: expected every >= 1, got 0."),
        (lambda: cubic(0.5, 0, 5, initial=0.6), "cubic: expected initial <= sparsity (pruned "
         "weights do not return), got 0.6 and 0.5."),
        (lambda: exponential(1, 0, 5), "exponential: expected sparsity < 1"),
        (lambda: exponential(math.nan, 0, 5), "exponential: expected 0 <= sparsity <= 1"),
        (lambda: iterative(1.5, 2), "iterative: expected 0 <= ratio <= 1"),
        (lambda: iterative(0.5, 0), "iterative: expected rounds >= 1, got 0."),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


@each_ramp
@pytest.mark.parametrize("value", [0.5, True, "3"])
def test_steps_are_whole(ramp: Ramp, value: object) -> None:
    name = type(value).__name__
    text = rf"{ramp.__name__}: expected end to be an int \(training steps\), got {name}\."
    with pytest.raises(TypeError, match=text):
        ramp(0.5, 0, value)
