# SPDX-License-Identifier: MIT
"""A user's groups: what is accepted, and one clear error for all else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lap_ext.errors import LapError
from lap_ext.structures import Groups

SHAPE = (2, 3)


def numbers(assignment: Any, shape: tuple[int, ...] = SHAPE, name: str | None = None) -> list[int]:
    """The group of each weight, flat."""
    found = Groups(assignment).numbers(name, shape)
    assert found.dtype == torch.int64 and found.device.type == "cpu"
    return found.tolist()


@pytest.mark.parametrize(
    "assignment",
    [
        [[0, 5], [1, 2], [3, 4]],
        ((5, 0), (2, 1), (4, 3)),
        [torch.tensor([0, 5]), torch.tensor([[1], [2]]), np.array([3, 4])],
        torch.tensor([[0, 1, 1], [2, 2, 0]]),
        torch.tensor([[0, 1, 1], [2, 2, 0]], dtype=torch.uint8),
        torch.tensor([[0, 2], [1, 2], [1, 0]], dtype=torch.int16).t(),
        lambda name, shape: torch.tensor([0, 1, 1, 2, 2, 0]).view(shape),
    ],
    ids=["lists", "tuples", "tensors", "int64", "uint8", "strided", "function"],
)
def test_what_groups_may_be(assignment: Any) -> None:
    assert numbers(assignment) == [0, 1, 1, 2, 2, 0]


@given(st.data())
def test_lists_and_numbers_are_the_same(data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, 5), min_size=6, max_size=6))
    lists = [[i for i in range(6) if wanted[i] == n] for n in range(6)]
    assert numbers(lists) == numbers(torch.tensor(wanted).view(SHAPE)) == wanted


def test_layers_of_a_model() -> None:
    seen: list[Any] = []

    def some(name: str, shape: tuple[int, ...]) -> Any:
        seen.append((name, shape))
        return [list(range(6))] if name == "fc" else None

    for groups in (Groups(some), Groups({"fc": [[0, 1, 2, 3, 4, 5]]})):
        assert groups.given("fc", SHAPE) is not None and groups.given("other", SHAPE) is None
        assert groups.numbers("fc", SHAPE).tolist() == [0] * 6
        groups.check_names(["fc", "other"])
    assert seen[:2] == [("fc", SHAPE), ("other", SHAPE)]
    with pytest.raises(ValueError, match=r"groups of the model's layers, got some for 'fc'\.$"):
        Groups({"fc": []}).check_names(["fc2"])


def test_groups_of_nothing() -> None:
    assert numbers([], (0, 3)) == numbers(torch.zeros(0, 3, dtype=torch.int64), (0, 3)) == []
    assert numbers([[], [0], []], (1, 1)) == [1]


def test_the_users_own_error_comes_out() -> None:
    def broken(name: str, shape: tuple[int, ...]) -> Tensor:
        raise KeyError(name)

    with pytest.raises(KeyError, match="fc"):
        Groups(broken).numbers("fc", SHAPE)


ALONE = "Make a group of each that shall be ranked alone."
LISTS = "a tensor of group numbers, or a list of groups, each a list of flat indices"
ERRORS: list[tuple[str, Any, type[Exception], str]] = [
    (
        "overlap",
        [[0, 1], [1, 2, 3, 4, 5]],
        ValueError,
        "groups that do not overlap, got 1 weights of group 1 in a group already.",
    ),
    (
        "twice in one",
        [[0, 0, 1], [2, 3, 4, 5]],
        ValueError,
        "groups that do not overlap, got 1 weights of group 0 in a group already.",
    ),
    (
        "left out",
        [[0, 1], [4, 5]],
        ValueError,
        f"a group for every weight, got 2 without one, the first at flat index 2. {ALONE}",
    ),
    (
        "empty list",
        [],
        ValueError,
        f"a group for every weight, got 6 without one, the first at flat index 0. {ALONE}",
    ),
    (
        "negative index",
        [[0, 1, 2], [3, 4, -1]],
        ValueError,
        "flat indices from 0 to 5 in group 1, got -1.",
    ),
    (
        "too large index",
        [[0, 1, 2, 3, 4, 6]],
        ValueError,
        "flat indices from 0 to 5 in group 0, got 6.",
    ),
    (
        "float indices",
        [[0.0, 1.0]],
        TypeError,
        "groups of integer flat indices, got torch.float32.",
    ),
    ("a mask", [[True, False]], TypeError, "groups of integer flat indices, got torch.bool."),
    (
        "negative number",
        torch.tensor([[0, 1, 2], [-1, 0, -2]]),
        ValueError,
        "a group, numbered from 0 on, for every weight, got -1 at flat index 3. Exclude a layer "
        "that has none.",
    ),
    (
        "too large number",
        torch.tensor([[0, 1, 2], [0, 0, 6]]),
        ValueError,
        "group numbers below 6, the number of weights, got 6.",
    ),
    (
        "huge number",
        torch.tensor([[0, 1, 2], [0, 0, 2**62]]),
        ValueError,
        f"group numbers below 6, the number of weights, got {2**62}.",
    ),
    (
        "another shape",
        torch.zeros(3, 2, dtype=torch.int64),
        ValueError,
        "group numbers in the weight's shape [2, 3], got [3, 2].",
    ),
    ("flat", torch.zeros(6, dtype=torch.int64), ValueError, "got [6]."),
    ("floats", torch.zeros(2, 3), TypeError, "integer group numbers, got torch.float32."),
    ("bools", torch.ones(2, 3) > 0, TypeError, "integer group numbers, got torch.bool."),
    (
        "dict",
        {"fc": [[0]]},
        ValueError,
        "groups for one weight: a tensor of its shape, or lists of flat indices, got a dict of "
        "layers.",
    ),
    (
        "a function's mistake",
        lambda name, shape: [[0, 1]],
        ValueError,
        f"a group for every weight, got 4 without one, the first at flat index 2. {ALONE}",
    ),
    ("words", ["ab", "cd"], TypeError, f"{LISTS}, got str as group 0."),
    ("ragged", [[0, 1], [[2, 3], [4]]], TypeError, f"{LISTS}, got list as group 1."),
    ("numbers, not lists", [0, 1, 1, 2, 2, 0], TypeError, f"{LISTS}, got int as group 0."),
    ("None of a function", lambda name, shape: None, ValueError, "groups for one weight"),
    ("a number of a function", lambda name, shape: 3, TypeError, f"{LISTS}, got int."),
    ("an array", lambda name, shape: np.zeros(shape), TypeError, f"{LISTS}, got ndarray."),
    ("a generator", lambda name, shape: (x for x in [[0]]), TypeError, f"{LISTS}, got generator."),
]


@pytest.mark.parametrize(
    ("assignment", "kind", "text"), [x[1:] for x in ERRORS], ids=[x[0] for x in ERRORS]
)
def test_errors(assignment: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised:
        numbers(assignment)
    assert isinstance(raised.value, LapError)
    assert text in str(raised.value)
