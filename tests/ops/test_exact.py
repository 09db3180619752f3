# SPDX-License-Identifier: MIT
"""The worth of units against the definition: the change of the product of three dense matrices."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from lap_ext.ops import exact, factors
from lap_ext.structures import Block, Column, Grid, Matrix, Row

RTOL = 1e-9  # of a worth, the root of a sum that may cancel


# ---- the definition, entry by entry --------------------------------------------------------------
def places(w: Tensor, groups: int, transposed: bool) -> list[tuple[int, int, int]]:
    """(kernel position, output, input) of every weight, in flat order."""
    rows, cols, *window = w.shape
    result = []
    for row, col, tap in product(range(rows), range(cols), range(math.prod(window))):
        channel = row // (rows // groups) * cols + col
        result.append((tap, channel, row) if transposed else (tap, row, channel))
    return result


def dense(w: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """The weight as [taps, outputs, inputs]."""
    sizes = w.shape[0], w.shape[1] * groups
    out, into = reversed(sizes) if transposed else sizes
    result = torch.zeros(math.prod(w.shape[2:]), out, into, dtype=torch.float64)
    index = torch.tensor(places(w, groups, transposed)).T
    result[tuple(index)] = w.flatten().double()
    return result


def producer(neighbor: Any, channels: int) -> Tensor:
    """[channels, all its inputs and taps]; a flatten gives every position inputs of its own."""
    if not isinstance(neighbor, lap_ext.Neighbor):
        neighbor = lap_ext.Neighbor(neighbor)
    if neighbor.weight is None:
        matrix = torch.eye(channels, dtype=torch.float64)
    else:
        matrix = torch.cat([*dense(neighbor.weight, neighbor.groups, neighbor.transposed)], dim=1)
    scale = neighbor.scale
    if scale is not None and len(scale) == len(matrix):
        matrix, scale = matrix * scale.double()[:, None], None
    if len(matrix) < channels:
        matrix = torch.kron(matrix, torch.eye(channels // len(matrix), dtype=torch.float64))
    if len(matrix) > channels:
        matrix = matrix.reshape(channels, -1)
    return matrix if scale is None else matrix * scale.double()[:, None]


def consumer(neighbor: Any, channels: int) -> Tensor:
    """[all its outputs, channels]: that of the mirrored producer, upside down."""
    if not isinstance(neighbor, lap_ext.Neighbor):
        neighbor = lap_ext.Neighbor(neighbor)
    mirrored = lap_ext.Neighbor(
        neighbor.weight, neighbor.groups, not neighbor.transposed, neighbor.scale
    )
    return producer(mirrored, channels).T


def several(neighbors: Any) -> list[Any]:
    if neighbors is None:
        return [lap_ext.IDENTITY]
    return neighbors if isinstance(neighbors, list) else [neighbors]


class Definition:
    """||W_next (W * unit) W_prev||_F for a bool unit like w."""

    def __init__(
        self, w: Tensor, prev: Any, following: Any, groups: int = 1, transposed: bool = False
    ) -> None:
        self.full = dense(w, groups, transposed)
        self.places = torch.tensor(places(w, groups, transposed)).T
        outputs, inputs = self.full.shape[1:]
        self.before = torch.cat([producer(x, inputs) for x in several(prev)], dim=1)
        self.after = torch.cat([consumer(x, outputs) for x in several(following)], dim=0)

    def of(self, unit: Tensor) -> float:
        pruned = self.full.clone()
        pruned[tuple(self.places[:, unit.flatten()])] = 0
        change = self.full - pruned
        return math.sqrt(float((self.after @ change @ self.before).square().sum()))


def units(grid: Grid) -> list[Tensor]:
    """The weights of every unit, counted here."""
    matrix, (height, width) = grid.matrix, grid.block
    result = []
    for group in range(matrix.groups):
        for top in range(0, matrix.height, height):
            for left in range(0, matrix.cols, width):
                unit = torch.zeros(matrix.shape, dtype=torch.bool)
                first = group * matrix.height
                bottom = min(top + height, matrix.height)
                unit[first + top : first + bottom, left : left + width] = True
                result.append(unit)
    return result


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def neighbor(*shape: int, scale: int = 0, **options: Any) -> lap_ext.Neighbor:
    return lap_ext.Neighbor(random(*shape), scale=random(scale) if scale else None, **options)


STRUCTURES = [Row(), Column(), Block(2, 3), Block(4, 2), Block(1, 1), Block(64, 64)]

# name: shape of w, its groups, transposed, w_prev, w_next
CASES: dict[str, Any] = {
    "dense": lambda: ((6, 5), 1, False, random(5, 3), random(4, 6)),
    "wide": lambda: ((6, 5), 1, False, random(5, 40), random(40, 6)),
    "first": lambda: ((6, 5), 1, False, None, random(4, 6)),
    "last": lambda: ((6, 5), 1, False, random(5, 3), None),
    "alone": lambda: ((6, 5), 1, False, None, None),
    "conv": lambda: ((6, 5, 2, 3), 1, False, random(5, 3, 2, 2), random(4, 6, 3, 1)),
    "grouped": lambda: ((6, 3, 2), 2, False, random(6, 4), random(4, 6)),
    "depthwise": lambda: ((6, 1, 3), 6, False, random(6, 4), random(4, 6, 2)),
    "transposed": lambda: ((6, 5, 2), 1, True, random(6, 3, 2), random(4, 5)),
    "grouped transposed": lambda: ((6, 2, 2), 3, True, random(6, 4), random(3, 6)),
    "grouped neighbors": lambda: (
        (6, 6), 1, False, neighbor(6, 2, 2, groups=2), neighbor(9, 2, 2, groups=3)
    ),
    "depthwise neighbors": lambda: (
        (6, 5, 2), 1, False, neighbor(5, 1, 3, groups=5, scale=5), neighbor(6, 1, 3, groups=6)
    ),
    "transposed neighbors": lambda: (
        (6, 4),
        1,
        False,
        neighbor(4, 2, 2, groups=2, transposed=True),
        neighbor(6, 3, transposed=True),
    ),
    "scaled": lambda: ((6, 5), 1, False, neighbor(5, 3, scale=5), neighbor(4, 6, scale=6)),
    "residual": lambda: (
        (6, 5),
        1,
        False,
        [random(5, 3), neighbor(5, 4, scale=5), lap_ext.IDENTITY],
        [random(4, 6), lap_ext.Neighbor(scale=random(6)), neighbor(6, 1, 3, groups=6)],
    ),
    "residual grouped": lambda: (
        (6, 3, 2),
        2,
        False,
        [random(6, 3), neighbor(6, 2, 2, groups=3), lap_ext.IDENTITY],
        [random(4, 6), neighbor(6, 3, groups=2, scale=6)],
    ),
    "flattened": lambda: ((3, 6), 1, False, neighbor(2, 4, 2, 2, scale=2), random(4, 3)),
    "flattened grouped": lambda: (
        (3, 12), 1, False, [neighbor(4, 2, 2, groups=2, scale=12), lap_ext.IDENTITY], random(4, 3)
    ),
    "flattens": lambda: ((3, 2, 2), 1, False, random(2, 2, 2), random(4, 12)),
    "flattens scaled": lambda: (
        (3, 2, 2), 1, False, neighbor(6, 2, scale=2), neighbor(4, 12, scale=12)
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch", [exact._BATCH, 7])
@pytest.mark.parametrize("name", CASES)
def test_blocks_change_the_product_as_defined(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(len(name))
    monkeypatch.setattr(exact, "_BATCH", batch)
    shape, groups, transposed, prev, following = CASES[name]()
    w = random(*shape)
    sides = factors.neighbor_matrices(prev, w, following, groups, transposed)
    definition = Definition(w, prev, following, groups, transposed)
    for structure in STRUCTURES:
        grid = structure.grid(Matrix.of(shape, groups, transposed))
        got = exact.block_distortions(w, grid, *sides)
        expected = [definition.of(unit) for unit in units(grid)]
        assert got.shape == grid.shape and got.dtype == torch.float64
        torch.testing.assert_close(
            got.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=RTOL, atol=0
        )


@pytest.mark.parametrize("batch", [exact._BATCH, 7])
@pytest.mark.parametrize("name", CASES)
def test_groups_change_the_product_as_defined(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random groups, which cross the groups of a convolution, and one number without a weight."""
    torch.manual_seed(len(name))
    monkeypatch.setattr(exact, "_BATCH", batch)
    shape, groups, transposed, prev, following = CASES[name]()
    w = random(*shape)
    numbers = torch.randint(5, shape)
    numbers[numbers == 2] = 3
    numbers.view(-1)[0] = 5  # alone
    sides = factors.neighbor_matrices(prev, w, following, groups, transposed)
    matrix = Matrix.of(shape, groups, transposed)
    got = exact.group_distortions(w, numbers, matrix, *sides)
    definition = Definition(w, prev, following, groups, transposed)
    for number, worth in enumerate(got.tolist()):
        assert worth == pytest.approx(definition.of(numbers == number), rel=RTOL), number
    assert got[2] == 0 and len(got) == 6


@pytest.mark.parametrize("batch", [exact._BATCH, 7])
@pytest.mark.parametrize("name", CASES)
def test_channels_change_the_product_as_defined(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random groups of whole output channels, some in none, with a mask or without."""
    torch.manual_seed(len(name))
    monkeypatch.setattr(exact, "_BATCH", batch)
    shape, groups, transposed, prev, following = CASES[name]()
    w, mask = random(*shape), torch.rand(shape) < 0.7
    sides = factors.neighbor_matrices(prev, w, following, groups, transposed)
    matrix = Matrix.of(shape, groups, transposed)
    output = torch.tensor(places(w, groups, transposed))[:, 1]
    for _ in range(3):
        numbers = torch.randint(-1, 4, (int(output.max()) + 1,))
        numbers[numbers == 1] = 2
        numbers[0] = 3
        for given in (None, mask):
            got = exact.channel_distortions(w, numbers, matrix, *sides, given)
            counted = w if given is None else w * given
            definition = Definition(counted, prev, following, groups, transposed)
            expected = [definition.of(numbers[output] == number) for number in range(4)]
            assert got.tolist() == pytest.approx(expected, rel=RTOL) and got[1] == 0


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_channels_of_an_empty_weight(shape: tuple[int, int]) -> None:
    numbers = torch.arange(shape[0])
    matrix = Matrix.of(shape)
    got = exact.channel_distortions(torch.ones(shape), numbers, matrix, None, None)
    assert torch.equal(got, torch.zeros(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_a_grid_is_groups(name: str) -> None:
    shape, groups, transposed, prev, following = CASES[name]()
    w = random(*shape)
    sides = factors.neighbor_matrices(prev, w, following, groups, transposed)
    matrix = Matrix.of(shape, groups, transposed)
    grid = Block(4, 3).grid(matrix)
    numbers = sum(number * unit.long() for number, unit in enumerate(units(grid)))
    got = exact.group_distortions(w, numbers, matrix, *sides)
    torch.testing.assert_close(got, exact.block_distortions(w, grid, *sides).flatten())


@pytest.mark.parametrize("name", CASES)
def test_units_of_one_weight_have_its_score(name: str) -> None:
    shape, groups, transposed, prev, following = CASES[name]()
    if len(shape) > 2:
        shape = (*shape[:2], *[1] * (len(shape) - 2))
    w = random(*shape)
    score = lap_ext.score(prev, w, following, groups=groups, transposed=transposed)
    sides = factors.neighbor_matrices(prev, w, following, groups, transposed)
    grid = Block(1, 1).grid(Matrix.of(shape, groups, transposed))
    got = exact.block_distortions(w, grid, *sides)
    torch.testing.assert_close(got, score.reshape(got.shape), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_diagonals_are_the_norms(name: str) -> None:
    shape, groups, transposed, prev, following = CASES[name]()
    w = random(*shape)
    sides = factors.neighbor_matrices(prev, w, following, groups, transposed)
    norms = lap_ext.neighbor_norms(prev, w, following, groups=groups, transposed=transposed)
    for side, norm in zip(sides, norms, strict=True):
        gram = sum(x.gram() for x in side) if side else torch.eye(len(norm)).double()
        torch.testing.assert_close(gram.diagonal().sqrt(), norm, rtol=1e-13, atol=0)


def test_worked_by_hand() -> None:
    """Two inputs that carry the same signal cancel: no sum of squares knows it."""
    w, prev = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[3.0], [3.0]])
    following = torch.tensor([[1.0, 2.0]])
    grid = Row().grid(Matrix.of(w.shape))
    assert exact.block_distortions(w, grid, [prev], [following]).flatten().tolist() == [0.0, 12.0]
    grid = Column().grid(Matrix.of(w.shape))  # 3 * (1 + 2), 3 * (-1 + 2)
    assert exact.block_distortions(w, grid, [prev], [following]).flatten().tolist() == [9.0, 3.0]
    grid = Block(2, 2).grid(Matrix.of(w.shape))  # 3 * (1 - 1 + 2 + 2)
    assert exact.block_distortions(w, grid, [prev], [following]).flatten().tolist() == [12.0]


def test_what_cancels_but_for_rounding_is_a_number() -> None:
    """Rows that the consumer adds up to nothing: sums of products may come out below 0."""
    for seed in range(10):
        torch.manual_seed(seed)
        following, prev = random(3, 6), random(30, 30)
        w = torch.linalg.svd(following).Vh[-1:].T @ random(1, 30)
        grid, numbers = Block(6, 30).grid(Matrix.of(w.shape)), torch.zeros(w.shape).long()
        block = exact.block_distortions(w, grid, [prev], [following])
        group = exact.group_distortions(w, numbers, grid.matrix, [prev], [following])
        for worth in (float(block), float(group)):
            assert 0 <= worth < 1e-5


def test_units_that_are_cut_apart_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three units at once, which need more room after they are cut: one at a time."""
    monkeypatch.setattr(exact, "_BATCH", 3 * (2 * 8 + 1 + 2 * 2))
    w, prev = random(1, 6, 8), neighbor(6, 2, groups=3)
    numbers = torch.tensor([0, 0, 1, 2, 1, 2])[None, :, None].expand(w.shape)
    sides = factors.neighbor_matrices(prev, w, None, 1, False)
    got = exact.group_distortions(w, numbers, Matrix.of(w.shape), *sides)
    definition = Definition(w, prev, None)
    expected = [definition.of(numbers == number) for number in range(3)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_masked_weights_count_nothing() -> None:
    torch.manual_seed(1)
    w, prev, following, mask = (
        random(4, 5, 2),
        random(5, 3),
        random(3, 4),
        torch.rand(4, 5, 2) < 0.6,
    )
    matrix = Matrix.of(w.shape)
    grid, numbers = Block(2, 2).grid(matrix), torch.randint(4, w.shape)
    got = exact.block_distortions(w, grid, [prev], [following], mask)
    torch.testing.assert_close(got, exact.block_distortions(w * mask, grid, [prev], [following]))
    got = exact.group_distortions(w, numbers, matrix, [prev], [following], mask)
    expected = exact.group_distortions(w * mask, numbers, matrix, [prev], [following])
    torch.testing.assert_close(got, expected)


def test_low_precision_and_strides() -> None:
    torch.manual_seed(2)
    w, prev = random(4, 5).bfloat16(), random(3, 5).half().T
    grid = Block(2, 3).grid(Matrix.of(w.shape))
    got = exact.block_distortions(w.T.contiguous().T, grid, [prev], None)
    expected = exact.block_distortions(w.double(), grid, [prev.double().contiguous()], None)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0, 2)])
def test_nothing(shape: tuple[int, ...]) -> None:
    w, matrix = torch.zeros(shape), Matrix.of(shape)
    grid = Row().grid(matrix)
    sides = factors.neighbor_matrices(None, w, lap_ext.IDENTITY, 1, False)
    assert exact.block_distortions(w, grid, *sides).shape == grid.shape
    assert (
        exact.group_distortions(
            w, torch.zeros(shape, dtype=torch.int64), matrix, None, None
        ).numel()
        == 0
    )


def test_neighbors_are_checked() -> None:
    w = torch.ones(4, 5)
    for prev, following, text in (
        (torch.ones(4, 5), None, r"w_prev\.shape\[0\] == w\.shape\[1\]"),
        (None, [torch.ones(3, 4), torch.ones(3, 3)], r"w_next\[1\]"),
        (None, [], "one neighbor or more"),
        (lap_ext.Neighbor(torch.ones(5, 2), scale=torch.ones(4)), None, r"w_prev\.scale \[5\]"),
        (torch.full((5, 2), torch.inf), None, "finite"),
    ):
        with pytest.raises(ValueError, match=text):
            factors.neighbor_matrices(prev, w, following, 1, False)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product has more numbers than a batch, however large the weight and its neighbors."""
    sizes = []
    einsum = torch.einsum

    def watched(equation: str, *operands: Tensor) -> Tensor:
        result = einsum(equation, *operands)
        sizes.append(max(x.numel() for x in (result, *operands)))
        return result

    monkeypatch.setattr(torch, "einsum", watched)
    monkeypatch.setattr(exact, "_BATCH", 1 << 10)
    w, prev, following = random(64, 48), random(48, 80), random(96, 64)
    matrix = Matrix.of(w.shape)
    for structure in (Row(), Column(), Block(8, 8)):
        exact.block_distortions(w, structure.grid(matrix), [prev], [following])
    assert sizes and max(sizes) <= 4 << 10
