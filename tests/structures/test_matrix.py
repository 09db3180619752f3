# SPDX-License-Identifier: MIT
"""Matrices and grids by brute force: each weight is in one block, and blocks are where they say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lap_ext.structures import NM, Block, Column, Grid, Matrix, Partition, Row
from tests.helpers import structure_oracle as oracle

SIZE = st.integers(1, 5)


@st.composite
def layers(draw: st.DrawFn) -> oracle.Layer:
    """A linear layer or a convolution, grouped or transposed or not."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    window = draw(st.sampled_from([(), (2,), (1, 3)]))
    shape = (groups * draw(SIZE), draw(SIZE), *window)
    return oracle.Layer(shape, groups, draw(st.booleans()))


def matrix_of(layer: oracle.Layer) -> Matrix:
    return Matrix.of(layer.shape, layer.groups, layer.transposed)


def numbers(grid: Grid) -> list[int]:
    """The block of each weight, from the heights and widths that a grid says."""
    down = [n for n, height in enumerate(grid.heights()) for _ in range(height)]
    across = [n for n, width in enumerate(grid.widths()) for _ in range(width)]
    window = range(grid.matrix.window)
    return [row * grid.shape[1] + col for row in down for col in across for _ in window]


@pytest.mark.parametrize(
    ("structure", "kind", "sizes"),
    [
        (Block(1, 1), "block", (1, 1)),
        (Block(2, 3), "block", (2, 3)),
        (Block(3, 2), "block", (3, 2)),
        (Block(100, 1), "block", (100, 1)),
        (Block(100, 100), "block", (100, 100)),
        (Row(), "row", (1, 1)),
        (Column(), "column", (1, 1)),
    ],
    ids=lambda x: str(x) if isinstance(x, Partition) else "",
)
@given(layers())
def test_a_grid_is_the_definition(
    structure: Partition, kind: str, sizes: tuple[int, int], layer: oracle.Layer
) -> None:
    """Every weight is in the one block of its channels; a lower number begins earlier."""
    grid = structure.grid(matrix_of(layer))
    mine, expected = numbers(grid), oracle.members(oracle.units(layer, kind, sizes))
    assert len(mine) == math.prod(layer.shape)
    found = oracle.members(mine)
    assert list(found.values()) == list(expected.values())
    assert list(found) == list(range(grid.count)), "numbered by the first weight"
    sizes_of = [len(x) for x in found.values()]
    window = grid.matrix.window
    assert sizes_of == [h * w * window for h in grid.heights() for w in grid.widths()]


@given(layers(), st.sampled_from(["in", "out", "flat"]), st.integers(2, 6))
def test_what_a_pattern_fits(layer: oracle.Layer, axis: str, of: int) -> None:
    """It fits where all of its groups are full and begin anew with each group of channels."""
    pattern = NM(1, of, axis)  # type: ignore[arg-type]
    cut = oracle.members(oracle.lines(layer, axis, of))
    full = all(len(indices) == of for indices in cut.values())
    assert (pattern.misfit(matrix_of(layer)) == "") == full


@given(layers(), st.integers(2, 6))
def test_what_a_transposable_pattern_fits(layer: oracle.Layer, of: int) -> None:
    along = [NM(1, of, axis).misfit(matrix_of(layer)) for axis in ("in", "out")]  # type: ignore[arg-type]
    assert (NM(1, of, transposable=True).misfit(matrix_of(layer)) == "") == (along == ["", ""])


@given(layers(), st.sampled_from(["in", "out", "flat", "transposable"]), st.integers(2, 6))
def test_rows_that_are_seen_together(layer: oracle.Layer, how: str, of: int) -> None:
    """So many rows at a time hold full groups, and fewer do not."""
    transposable = how == "transposable"
    pattern = NM(1, of, "in" if transposable else how, transposable)  # type: ignore[arg-type]
    matrix = matrix_of(layer)
    if pattern.misfit(matrix):
        return
    length = matrix.cols * matrix.window
    kinds = ["in", "out"] if transposable else [how]
    cuts = [oracle.members(oracle.lines(layer, kind, of)).values() for kind in kinds]

    def whole(rows: int) -> bool:
        step = rows * length
        return all(len({i // step for i in indices}) == 1 for cut in cuts for indices in cut)

    expected = next(rows for rows in range(1, matrix.rows + 1) if whole(rows))
    assert pattern.rows_together(matrix) == expected


@pytest.mark.parametrize(
    ("pattern", "matrix", "why"),
    [
        (NM(2, 4), Matrix((4, 6)), "4 does not divide its 6 inputs"),
        (NM(2, 4), Matrix((8, 3, 3, 3), 2), "4 does not divide its 3 inputs in each group"),
        (NM(2, 4), Matrix((6, 4), 1, True), "4 does not divide its 6 inputs"),
        (NM(2, 4), Matrix((8, 4), 4, True), "4 does not divide its 2 inputs in each group"),
        (NM(2, 4, "out"), Matrix((6, 4)), "4 does not divide its 6 outputs"),
        (NM(2, 4, "out"), Matrix((4, 6), 1, True), "4 does not divide its 6 outputs"),
        (NM(2, 4, "flat"), Matrix((3, 3, 3)), "4 does not divide its 27 weights"),
        (NM(2, 4, "flat"), Matrix((2, 3, 2), 2), ""),
        (NM(2, 4, transposable=True), Matrix((6, 4)), "4 does not divide its 6 outputs"),
        (NM(2, 4, transposable=True), Matrix((4, 6)), "4 does not divide its 6 inputs"),
        (NM(2, 4), Matrix((0, 4)), "it has no weights"),
        (NM(2, 4, "flat"), Matrix((4, 4, 0)), "it has no weights"),
        (NM(2, 4), Matrix((1, 1)), "4 does not divide its 1 inputs"),
    ],
    ids=str,
)
def test_why_a_pattern_does_not_fit(pattern: NM, matrix: Matrix, why: str) -> None:
    assert pattern.misfit(matrix) == why


def test_small_shapes() -> None:
    """A vector is one row; without weights there are no blocks."""
    assert Matrix.of((5,)) == Matrix((1, 5)) and Matrix.of(()) == Matrix((1, 1))
    assert Matrix.of(torch.Size([2, 3, 4])).window == 4
    for shape in ((0, 3), (3, 0), (0, 0)):
        assert Block(2, 2).grid(Matrix(shape)).count == 0
        assert sum(Row().grid(Matrix(shape)).heights()) in (0, 3)
