# SPDX-License-Identifier: MIT
"""The operators of structures: native == reference, bit for bit, and both == loops of integers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.ops import reference, schema
from tests.helpers import structured_cases as cases
from tests.helpers.parameters import each_dtype, each_threads
from tests.helpers.structured_cases import Case, case, same_bits, variants


def agree(op: Any, x: Case, *args: Any) -> list[Tensor]:
    """What the native kernels and the reference agree on, bit for bit."""
    found, expected = op(schema, x, *args), op(reference, x, *args)
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for got, right in pairs:
        same_bits(got, right)
    return [found] if isinstance(found, Tensor) else found


# --- N:M ------------------------------------------------------------------------------------------

NM = [  # shape, groups, keep, of, rows
    ((5, 8), 1, 2, 4, False),
    ((3, 1284), 1, 2, 4, False),
    ((7, 4), 1, 2, 4, False),
    ((2, 200), 1, 1, 4, False),
    ((3, 96), 1, 4, 8, False),
    ((3, 99), 1, 2, 3, False),
    ((2, 140), 1, 3, 70, False),
    ((2, 3000), 1, 700, 1500, False),
    ((6, 8, 3, 3), 2, 2, 4, False),
    ((40, 8, 3, 3), 1, 2, 4, False),
    ((3, 12, 300), 1, 1, 4, False),
    ((8, 1100), 1, 2, 4, True),
    ((16, 33), 2, 1, 8, True),
    ((80, 67), 1, 9, 40, True),
    ((12, 5, 3, 3), 3, 2, 4, True),
    ((4, 6), 1, 0, 3, False),
    ((4, 6), 1, 5, 3, False),
    ((4, 6), 1, 1, 1, True),
]


@each_dtype
@pytest.mark.parametrize("shape, groups, keep, of, rows", NM)
def test_nm_mask(
    shape: tuple[int, ...], groups: int, keep: int, of: int, rows: bool, dtype: torch.dtype
) -> None:
    for x in variants(case(shape, dtype, groups)):
        agree(cases.nm_mask, x, keep, of, rows)
    few = replace(case(shape, dtype, groups), w=torch.randint(-1, 2, shape).to(dtype))
    for x in variants(replace(few, cols=torch.ones_like(few.cols))):  # nearly all tie
        agree(cases.nm_mask, x, keep, of, rows)


@pytest.mark.parametrize("rows", [False, True])
def test_nm_mask_is_its_definition(rows: bool) -> None:
    x = case((12, 8, 2), groups=3)
    w = torch.randint(-3, 4, x.w.shape)
    ins, outs = torch.randint(0, 3, x.cols.shape), torch.randint(0, 3, x.rows.shape)
    mask = torch.rand(w.shape) < 0.8
    given = Case(w.float(), outs.double(), ins.double(), 3, mask)
    (got,) = agree(cases.nm_mask, given, 2, 4, rows)

    def score(r: int, c: int, k: int) -> int:
        return abs(int(w[r, c, k])) * int(outs[r]) * int(ins[r // 4 * 8 + c])

    expected = torch.zeros_like(mask)
    for r, c, k in itertools.product(range(12), range(8), range(2)):
        members = [(r // 4 * 4 + i, c) if rows else (r, c // 4 * 4 + i) for i in range(4)]
        live = [m for m in members if mask[m[0], m[1], k]]
        best = sorted(live, key=lambda m, k=k: -score(m[0], m[1], k))[:2]  # type: ignore[misc]
        expected[r, c, k] = (r, c) in best
    assert torch.equal(got, expected)


# --- transposable ---------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    "shape, groups", [((4, 4), 1), ((8, 140), 1), ((12, 1000), 1), ((24, 8, 3, 3), 3)]
)
@pytest.mark.parametrize("squared", [False, True])
def test_transposable_mask(
    squared: bool, shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    for x in variants(case(shape, dtype, groups)):
        agree(cases.transposable_mask, x, squared)
        ties = replace(x, w=torch.randint(-1, 2, shape).to(dtype), cols=torch.ones_like(x.cols))
        agree(cases.transposable_mask, ties, squared)


def test_transposable_mask_is_its_definition() -> None:
    x = case((8, 8, 2), groups=2)
    w, mask = torch.randint(-3, 4, x.w.shape), torch.rand(x.w.shape) < 0.9
    outs, ins = torch.randint(0, 3, x.rows.shape), torch.randint(0, 3, x.cols.shape)
    given = Case(w.float(), outs.double(), ins.double(), 2, mask)
    (got,) = agree(cases.transposable_mask, given, True)
    scores = w.abs() * outs.view(8, 1, 1) * ins.view(2, 8).repeat_interleave(4, 0).unsqueeze(-1)
    values = scores.square() * mask
    lines = [line for line in itertools.product((0, 1), repeat=4) if sum(line) == 2]
    lines.sort(reverse=True)  # lower columns first
    patterns = [torch.tensor(p) for p in itertools.product(lines, repeat=4)]
    patterns = [p for p in patterns if p.sum(0).tolist() == [2] * 4]
    for r, c, k in itertools.product((0, 4), (0, 4), (0, 1)):
        tile, named = values[r : r + 4, c : c + 4, k], mask[r : r + 4, c : c + 4, k]
        worth = [(int((named * p).sum()), int((tile * p).sum())) for p in patterns]
        expected = patterns[worth.index(max(worth))].bool() & named
        assert torch.equal(got[r : r + 4, c : c + 4, k], expected)


# --- blocks ---------------------------------------------------------------------------------------

BLOCKS = [  # shape, groups, block
    ((32, 64), 1, (16, 16)),
    ((33, 70), 1, (16, 16)),
    ((9, 40), 1, (1, 1)),
    ((9, 40), 1, (2, 32)),
    ((9, 1100), 1, (4, 8)),
    ((9, 40), 1, (9, 40)),
    ((9, 40), 1, (90, 400)),
    ((5, 2500), 1, (2, 1025)),
    ((5, 3000), 1, (5, 3000)),
    ((5, 130), 1, (2, 33)),
    ((12, 10, 3, 3), 2, (4, 4)),
    ((12, 6, 3, 3), 3, (3, 100)),
    ((12, 7, 4), 1, (5, 2)),
]


@each_dtype
@pytest.mark.parametrize("shape, groups, block", BLOCKS)
def test_blocks(
    shape: tuple[int, ...], groups: int, block: tuple[int, int], dtype: torch.dtype
) -> None:
    for x, squared in itertools.product(variants(case(shape, dtype, groups)), (False, True)):
        agree(cases.blocks, x, block, squared)


@pytest.mark.parametrize("squared", [False, True])
def test_block_sums_are_their_definition(squared: bool) -> None:
    w, mask = torch.randint(-3, 4, (10, 7, 2)), torch.rand(10, 7, 2) < 0.8
    rows, cols = torch.randint(0, 3, (10,)).double(), torch.randint(0, 3, (14,)).double()
    sums = torch.full((4, 3), 5.0, dtype=torch.float64)
    given = (w.float(), rows, cols, 2)
    schema.block_sums_(sums, *given, (3, 3), 0, 5, squared, mask, True)
    expected = torch.full((4, 3), 5.0, dtype=torch.float64)
    for r, c, k in itertools.product(range(10), range(7), range(2)):
        score = abs(int(w[r, c, k])) * int(rows[r]) * int(cols[r // 5 * 7 + c]) * int(mask[r, c, k])
        expected[r // 5 * 2 + r % 5 // 3, c // 3] += score**2 if squared else score
    assert torch.equal(sums, expected)
    kept = sums > sums.median()
    got = schema.block_mask(kept, [10, 7, 2], (3, 3), 0, 5, mask)
    for r, c, k in itertools.product(range(10), range(7), range(2)):
        one = bool(kept[r // 5 * 2 + r % 5 // 3, c // 3]) and bool(mask[r, c, k])
        assert bool(got[r, c, k]) == one


def test_rows_in_pieces_give_the_same_sums() -> None:
    """Whatever rows come in a call: pieces end inside blocks, groups and between them."""
    x = case((26, 50))
    whole = torch.zeros(2 * 4, 4, dtype=torch.float64)
    schema.block_sums_(whole, *x.weight, (4, 16), 0, 13, True, None, True)
    for cuts in ([0, 1, 4, 13, 14, 26], [0, 12, 20, 26], list(range(27))):
        sums = torch.zeros_like(whole)
        marks = []
        for top, bottom in itertools.pairwise(cuts):
            part = (x.w[top:bottom], x.rows[top:bottom], x.cols, 1)
            schema.block_sums_(sums, *part, (4, 16), top, 13, True, None, True)
            shape = [bottom - top, 50]
            marks.append(schema.block_mask(whole > 1, shape, (4, 16), top, 13, None))
        assert torch.equal(sums, whole)
        full = schema.block_mask(whole > 1, [26, 50], (4, 16), 0, 13, None)
        assert torch.equal(torch.cat(marks), full)
    for y in (x, x.scores):
        agree(cases.blocks, y, (4, 16), True, 9, 13)
        agree(cases.blocks, y, (4, 16), True, 100, 13)


# --- values, layouts, threads ---------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("name", list(cases.HOSTILE))
def test_hostile_values(name: str, dtype: torch.dtype) -> None:
    hostile = cases.HOSTILE[name](case((16, 72), dtype))
    for x in variants(replace(hostile, w=hostile.w.to(dtype))):
        agree(cases.every_operator, x)


@pytest.mark.parametrize("layout", list(cases.LAYOUTS))
@each_dtype
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    for x in variants(case((8, 12, 3, 3), dtype, 2)):
        agree(cases.every_operator, replace(x, w=cases.LAYOUTS[layout](x.w)))


@each_threads
def test_threads_change_nothing(threads: int) -> None:
    calls: list[tuple[Any, ...]] = [
        (cases.every_operator,),
        (cases.blocks, (96, 1028), True),
        (cases.blocks, (1, 4), True),
        (cases.nm_mask, 50, 257, False),
    ]
    torch.set_num_threads(1)
    for x in variants(case((96, 1028))):
        for op, *args in calls:
            expected = agree(op, x, *args)
            torch.set_num_threads(threads)
            found = op(schema, x, *args)
            torch.set_num_threads(1)
            found = [found] if isinstance(found, Tensor) else found
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (4, 8, 0), (4, 4, 0, 3)])
def test_nothing_to_keep(shape: tuple[int, ...]) -> None:
    for x in variants(case(shape)):
        agree(cases.nm_mask, x, 2, 4, False)
        agree(cases.nm_mask, x, 2, 4, True)
        sums = torch.ones(1, -(-shape[1] // 4), dtype=torch.float64)
        for kernels in (schema, reference):
            kernels.block_sums_(sums, *x.weight, (4, 4), 0, 4, True, x.mask, True)
            kept = kernels.block_mask(sums > 0, list(shape), (4, 4), 0, 4, x.mask)
            assert kept.shape == shape and bool((sums == 1).all())


# --- errors ---------------------------------------------------------------------------------------

W, ROWS, COLS = torch.ones(4, 8), torch.ones(4).double(), torch.ones(8).double()
NONE = ROWS[:0]
SUMS = torch.zeros(2, 2, dtype=torch.float64)
NAN = W * torch.nan
SMALL = torch.ones(4, 4, dtype=torch.bool)
WRONG: list[tuple[str, tuple[Any, ...]]] = [
    ("nm_mask", (W[0], ROWS, COLS, 1, 2, 4, False, None, True)),
    ("nm_mask", (W, ROWS, COLS, 3, 2, 4, False, None, True)),
    ("nm_mask", (W, ROWS, COLS, 0, 2, 4, False, None, True)),
    ("nm_mask", (W, ROWS[1:], COLS, 1, 2, 4, False, None, True)),
    ("nm_mask", (W, ROWS, COLS[1:], 1, 2, 4, False, None, True)),
    ("nm_mask", (W, ROWS.float(), COLS, 1, 2, 4, False, None, True)),
    ("nm_mask", (W, ROWS, COLS, 1, -1, 4, False, None, True)),
    ("nm_mask", (W, ROWS, COLS, 1, 2, 0, False, None, True)),
    ("nm_mask", (W, ROWS, COLS, 1, 2, 3, False, None, True)),
    ("nm_mask", (W, NONE, NONE, 2, 2, 4, True, None, True)),
    ("nm_mask", (W, ROWS, COLS, 1, 2, 4, False, SMALL, True)),
    ("nm_mask", (W, ROWS, COLS, 1, 2, 4, False, W, True)),
    ("nm_mask", (W, ROWS, COLS, 1, 2, 4, False, (W > 0).t().contiguous().t(), True)),
    ("nm_mask", (NAN, ROWS, COLS, 1, 2, 4, False, None, True)),
    ("nm_mask", (W, ROWS * torch.nan, COLS, 1, 2, 4, False, None, True)),
    ("nm_mask", (W, ROWS, -COLS, 1, 2, 4, True, None, True)),
    ("nm_mask", (NAN, NONE, NONE, 1, 2, 4, True, None, True)),
    ("transposable_mask", (W[:3], ROWS[:3], COLS, 1, True, None, True)),
    ("transposable_mask", (W[:, :6], ROWS, COLS[:6], 1, True, None, True)),
    ("transposable_mask", (W, NONE, NONE, 2, True, None, True)),
    ("transposable_mask", (W, ROWS, COLS, 1, True, SMALL, True)),
    ("transposable_mask", (NAN, ROWS, COLS, 1, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (2, 4, 1), 0, 4, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (0, 4), 0, 4, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (2, -4), 0, 4, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (2, 4), -1, 4, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (2, 4), 0, 0, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (2, 4), 1, 8, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (1, 4), 0, 4, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (2, 2), 0, 4, True, None, True)),
    ("block_sums_", (SUMS[0], W, ROWS, COLS, 1, (4, 4), 0, 4, True, None, True)),
    ("block_sums_", (SUMS.float(), W, ROWS, COLS, 1, (2, 4), 0, 4, True, None, True)),
    ("block_sums_", (SUMS.t(), W, ROWS, COLS, 1, (2, 4), 0, 4, True, None, True)),
    ("block_sums_", (SUMS, W, ROWS, COLS, 1, (2, 4), 0, 4, True, SMALL, True)),
    ("block_sums_", (SUMS, NAN, ROWS, COLS, 1, (2, 4), 0, 4, True, None, True)),
    ("block_sums_", (SUMS, NAN, NONE, NONE, 1, (2, 4), 0, 4, True, None, True)),
    ("block_mask", (SUMS > 0, [4], (2, 4), 0, 4, None)),
    ("block_mask", (SUMS > 0, [4, 8], (2,), 0, 4, None)),
    ("block_mask", (SUMS > 0, [4, 8], (2, 0), 0, 4, None)),
    ("block_mask", (SUMS > 0, [4, 8], (2, 4), 1, 8, None)),
    ("block_mask", (SUMS > 0, [4, 8], (2, 4), -1, 8, None)),
    ("block_mask", (SUMS, [4, 8], (2, 4), 0, 4, None)),
    ("block_mask", (SUMS > 0, [4, 8], (2, 4), 0, 4, SMALL)),
]


@pytest.mark.parametrize("op, args", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_arguments_that_are_refused(op: str, args: tuple[Any, ...]) -> None:
    """The kernels name the same mistake in the same words."""
    said = []
    for kernels in (schema, reference):
        with pytest.raises(LapValueError) as raised:
            schema.call(getattr(kernels, op), *args)
        error = raised.value
        said.append((error.expected, error.got, error.cure, error.option, error.argument))
    assert said[0] == said[1] and said[0][0]
