# SPDX-License-Identifier: MIT
"""squared_norms: those of rows and columns from one pass, with the bits of one operator each.

What those bits are, test_norms.py asks an oracle; here native, reference and the two operators are
compared with each other.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lap_ext
from lap_ext.errors import calling
from lap_ext.ops import reference, schema
from tests.helpers import layer_cases as cases
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import each_dtype, each_threads

# Around rows at once (4), row segments (1024), column segments (64 rows) and lanes (32).
SHAPES = [(1, 5), (3, 1025), (4, 31), (5, 33), (64, 1024), (65, 1023), (68, 2049), (129, 7)]
GROUPED = [((6, 5), 6), ((8, 40), 2), ((134, 3, 3, 3), 2), ((195, 130, 2), 3), ((12, 1, 3, 3), 12)]
RANGE = (
    "neighbor_norms: expected squared norms within float64's range in w, got one that leaves it. "
    "Multiply w by a power of two; a common factor changes no mask."
)


def check(weight: Tensor, groups: int = 1) -> None:
    """Bits of both results against the reference and against one operator each."""
    row, col = schema.squared_norms(weight, groups, True, "w")
    assert row.dtype == col.dtype == torch.float64
    assert row.device == col.device == weight.device
    assert torch.equal(row, schema.row_squared_norms(weight, True, "w"))
    assert torch.equal(col, schema.col_squared_norms(weight, groups, True, "w"))
    expected = reference.squared_norms(weight.cpu(), groups, True, "w")
    assert torch.equal(row.cpu(), expected[0]) and torch.equal(col.cpu(), expected[1])


def test_worked_by_hand(device: str) -> None:
    weight = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[1.0, 2.0], [-2.0, 0.0]]], device=device)
    row, col = schema.squared_norms(weight, 1, True, "w")
    assert row.tolist() == [9 + 16 + 0 + 1, 1 + 4 + 4 + 0]
    assert col.tolist() == [(9 + 1) + (16 + 4), (0 + 4) + (1 + 0)]
    row, col = schema.squared_norms(weight, 2, True, "w")
    assert row.tolist() == [26, 9] and col.tolist() == [9 + 16, 0 + 1, 1 + 4, 4 + 0]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    check(weight.to(device))
    row, col = schema.squared_norms(weight.to(device), 1, True, "w")
    assert torch.equal(row.cpu(), oracle.row_squared_norms(weight))
    assert torch.equal(col.cpu(), oracle.col_squared_norms(weight))


@each_dtype
@pytest.mark.parametrize(("shape", "groups"), GROUPED, ids=str)
def test_groups_and_windows(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, device: str
) -> None:
    check(torch.randn(shape, dtype=torch.float64).to(dtype).to(device), groups)


@pytest.mark.parametrize("shape", [(66, 70), (68, 3, 2, 2), (5, 4, 3)], ids=str)
def test_layouts(shape: tuple[int, ...], device: str) -> None:
    weight = torch.randn(shape)
    for name in cases.layouts_of(len(shape)):
        laid = cases.LAYOUTS[name](weight.to(device))
        assert torch.equal(laid.cpu(), weight), name
        check(laid)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (5, 0, 2), (5, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    row, col = schema.squared_norms(torch.zeros(shape, device=device), 1, True, "w")
    assert row.tolist() == [0.0] * shape[0] and col.tolist() == [0.0] * shape[1]


@each_threads
def test_threads_do_not_matter(threads: int) -> None:
    """Enough columns' sums for two waves; shares of threads that end inside of everything."""
    torch.set_num_threads(threads)
    check(torch.randn(1500, 1024), groups=300)
    check(torch.randn(700, 1100))
    check(torch.randn(260, 65, 3, 3), groups=4)


@each_dtype
def test_not_finite(dtype: torch.dtype, device: str) -> None:
    weight = torch.ones(70, 9, dtype=dtype, device=device)
    weight[66, 2], weight[69, 8] = float("inf"), float("nan")
    with pytest.raises(ValueError) as caught, calling("prune"):
        schema.call(schema.squared_norms, weight, 1, True, "fc1")
    assert str(caught.value) == (
        f"prune: expected finite weights in fc1, got 2 non-finite values, the first at flat index "
        f"{66 * 9 + 2}. Repair them, or pass check_finite=False to rank them as they come."
    )
    row, col = schema.squared_norms(weight, 1, False, "fc1")
    assert row[66] == torch.inf and row[69].isnan() and row[:66].eq(9).all()
    assert col[2] == torch.inf and col[8].isnan() and col[3:8].eq(70).all()


@pytest.mark.parametrize("value", [1e200, 1e-200])
@pytest.mark.parametrize("many", ["rows", "columns"])
def test_out_of_range(value: float, many: str, device: str) -> None:
    """A square that overflows or vanishes, whichever of the two squared norms shows it."""
    weight = torch.ones(5, 6, dtype=torch.float64, device=device)
    weight[:, 4 if many == "columns" else slice(None)] *= value
    with pytest.raises(ValueError) as caught, calling("neighbor_norms"):
        schema.call(schema.squared_norms, weight, 1, True, "w")
    assert str(caught.value) == RANGE
    schema.squared_norms(weight, 1, False, "w")


class _Count(TorchDispatchMode):
    """Counts the operators of lap_ext that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, _, op = func._schema.name.partition("::")
        self.calls[op] += name == "lap_ext"
        return func(*args, **(kwargs or {}))


def test_a_model_is_read_once() -> None:
    """Both squared norms of every layer come from one call."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    with _Count() as count:
        lap_ext.scores(model, torch.randn(1, 3, 6, 6))
    assert count.calls["squared_norms"] == 2
    assert count.calls["row_squared_norms"] == count.calls["col_squared_norms"] == 0
