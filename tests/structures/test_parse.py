# SPDX-License-Identifier: MIT
"""What `structure=` takes: texts and objects, and the one spelling of each."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lap_ext import structures
from lap_ext.errors import LapError, calling
from lap_ext.structures import NM, Block, Column, Groups, Row

TEXTS = {
    "2:4": NM(2, 4),
    "1:16": NM(1, 16, "in", transposable=False),
    "4:4": NM(4, 4),
    "2:4/in": NM(2, 4),
    "2:4/out": NM(2, 4, "out"),
    "3:8/flat": NM(3, 8, axis="flat"),
    "2:4/transposable": NM(2, 4, transposable=True),
    "16x16": Block(16, 16),
    "1x8": Block(rows=1, cols=8),
    "row": Row(),
    "column": Column(),
}
NUMBER = st.integers(1, 1000)
COUNTS = st.tuples(NUMBER, st.integers(2, 1000)).map(lambda x: (min(x), max(x)))
STRUCTURES = st.one_of(
    st.builds(lambda x, axis: NM(*x, axis), COUNTS, st.sampled_from(["in", "out", "flat"])),
    st.builds(lambda x: NM(*x, transposable=True), COUNTS),
    st.builds(Block, NUMBER, NUMBER),
    st.just(Row()),
    st.just(Column()),
)


@pytest.mark.parametrize(("text", "expected"), TEXTS.items(), ids=str)
def test_texts(text: str, expected: structures.Structure) -> None:
    assert structures.of(text) == expected
    assert expected.spelled == text.removesuffix("/in")


@given(STRUCTURES)
def test_a_spelling_makes_the_same_structure(structure: structures.Structure) -> None:
    assert structures.of(structure.spelled) == structure == structures.of(structure)
    assert str(structure) == structure.spelled
    assert hash(structures.of(structure.spelled)) == hash(structure)
    assert pickle.loads(pickle.dumps(structure)) == structure


@given(st.text())
def test_any_text_is_a_structure_or_one_error(text: str) -> None:
    try:
        made = structures.of(text)
    except ValueError as error:
        assert isinstance(error, LapError), text
    else:
        assert made.spelled.split("/")[0] in text or text.startswith("0"), text


def test_groups_are_no_text() -> None:
    groups = Groups([[0, 1]])
    assert structures.of(groups) is groups and groups.spelled == "groups"
    with pytest.raises(ValueError, match="'groups'"):
        structures.of("groups")


def test_sparsity_of_a_pattern() -> None:
    assert [NM(n, 4).sparsity for n in (1, 2, 3, 4)] == [0.75, 0.5, 0.25, 0.0]


SPELLED = (
    "'N:M' (such as '2:4', '2:4/out', '2:4/flat' or '2:4/transposable'), 'ROWSxCOLUMNS' (such as "
    "'16x16'), 'row', 'column', 'channel', 'head', 'expert' or 'unit'"
)
RATIO = "N:M with 1 <= N <= M and M >= 2 (N are kept of every M)"
AXIS = "axis to be 'in', 'out' or 'flat'"
BOTH = "axis='in' for a transposable pattern, which holds along both"
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: structures.of("rows"), ValueError, f"{SPELLED}, got 'rows'."),
    (lambda: structures.of(""), ValueError, f"{SPELLED}, got ''."),
    (lambda: structures.of("2:4 "), ValueError, f"{SPELLED}, got '2:4 '."),
    (lambda: structures.of("2:4/rows"), ValueError, f"{SPELLED}, got '2:4/rows'."),
    (lambda: structures.of("-2:4"), ValueError, f"{SPELLED}, got '-2:4'."),
    (lambda: structures.of("9" * 12 + "x1"), ValueError, f"{SPELLED}, got '{'9' * 12}x1'."),
    (lambda: structures.of("4:2"), ValueError, f"{RATIO}, got 4:2. Did you mean 2:4?"),
    (lambda: structures.of("0:4"), ValueError, f"{RATIO}, got 0:4."),
    (lambda: structures.of("4:0"), ValueError, f"{RATIO}, got 4:0."),
    (lambda: structures.of("1:1"), ValueError, f"{RATIO}, got 1:1."),
    (lambda: structures.of("0x4"), ValueError, "rows >= 1, got 0."),
    (lambda: Block(4, -1), ValueError, "cols >= 1, got -1."),
    (lambda: Block(4, True), TypeError, "cols to be an integer, got bool."),
    (lambda: Block(4.0, 4), TypeError, "rows to be an integer, got float."),  # type: ignore[arg-type]
    (lambda: NM("2", 4), TypeError, "keep to be an integer, got str."),  # type: ignore[arg-type]
    (lambda: NM(2, None), TypeError, "of to be an integer, got NoneType."),  # type: ignore[arg-type]
    (lambda: NM(2, 4, "row"), ValueError, f"{AXIS}, got 'row'."),  # type: ignore[arg-type]
    (lambda: NM(2, 4, "out", transposable=True), ValueError, f"{BOTH}, got axis='out'."),
    (
        lambda: structures.of(24),  # type: ignore[arg-type]
        TypeError,
        "structure to be a text such as '2:4', or an object of lap_ext.structures, got int.",
    ),
    (
        lambda: Groups("row"),
        TypeError,
        "assignment to be a tensor of group numbers, a list of groups, or a dict or function that "
        "gives them for each layer, got str.",
    ),
    (
        lambda: Groups(7),  # type: ignore[arg-type]
        TypeError,
        "assignment to be a tensor of group numbers, a list of groups, or a dict or function that "
        "gives them for each layer, got int.",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=[text[-24:] for *_, text in ERRORS])
def test_errors(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised, calling("mask"):
        call()
    expected = text.replace("'N:M'", "structure to be 'N:M'") if text.startswith("'N:M'") else text
    assert str(raised.value) == f"mask: expected {expected}"
