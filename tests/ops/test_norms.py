# SPDX-License-Identifier: MIT
"""neighbor_norms: the sums of squares are added in the documented order, bit for bit.

in_norm = sqrt(row squared norm of a plain producer),
out_norm = sqrt(column squared norm of a plain consumer);
a transposed convolution swaps the two. The oracle adds in plain Python loops.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import lap_ext
from tests.helpers import layer_cases as cases
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import each_dtype, each_threads

# Lengths and counts around lanes (32), row segments (1024) and column segments (64 rows).
ROWS = [(3, 1), (2, 31), (2, 33), (1, 1023), (1, 1024), (2, 1025), (3, 2111), (1, 65537)]
COLS = [(1, 3), (2, 1), (63, 5), (64, 1), (65, 7), (129, 33), (700, 3), (5, 1031)]
WINDOWS = [(5, 4, 3), (66, 3, 2, 2), (4, 7, 3, 3), (3, 2, 2, 1, 2), (2, 40, 5, 5)]


def as_producer(weight: Tensor, **kwargs: object) -> Tensor:
    """in_norm of a linear layer fed by `weight`."""
    neighbor = lap_ext.Neighbor(weight, **kwargs)
    groups = int(kwargs.get("groups", 1))
    channels = weight.shape[1] * groups if kwargs.get("transposed") else weight.shape[0]
    w = torch.zeros(1, channels, device=weight.device)
    return lap_ext.neighbor_norms(neighbor, w, None)[0]


def as_consumer(weight: Tensor, **kwargs: object) -> Tensor:
    """out_norm of a linear layer read by `weight`."""
    neighbor = lap_ext.Neighbor(weight, **kwargs)
    groups = int(kwargs.get("groups", 1))
    channels = weight.shape[0] if kwargs.get("transposed") else weight.shape[1] * groups
    w = torch.zeros(channels, 1, device=weight.device)
    return lap_ext.neighbor_norms(None, w, neighbor)[1]


def same(got: Tensor, squared_norm: Tensor) -> bool:
    """Bits of a norm against an squared norm of the oracle."""
    return got.dtype == torch.float64 and torch.equal(got.cpu(), oracle.root(squared_norm))


@each_dtype
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows_in_order(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    expected = oracle.row_squared_norms(weight)
    assert same(as_producer(weight.to(device)), expected)
    assert same(as_consumer(weight.to(device), transposed=True), expected)


@each_dtype
@pytest.mark.parametrize("shape", COLS, ids=str)
def test_columns_in_order(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    expected = oracle.col_squared_norms(weight)
    assert same(as_consumer(weight.to(device)), expected)
    assert same(as_producer(weight.to(device), transposed=True), expected)


@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_windows_and_layouts(shape: tuple[int, ...], device: str) -> None:
    weight = torch.randn(shape)
    rows, cols = oracle.row_squared_norms(weight), oracle.col_squared_norms(weight)
    for name in cases.layouts_of(len(shape)):
        laid = cases.LAYOUTS[name](weight.to(device))
        assert torch.equal(laid.cpu(), weight), name
        assert same(as_producer(laid), rows), name
        assert same(as_consumer(laid), cols), name


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(groups: int, device: str) -> None:
    weight = torch.randn(groups * 67, 5, 3)
    expected = oracle.col_squared_norms(weight, groups)
    assert same(as_consumer(weight.to(device), groups=groups), expected)
    assert same(as_producer(weight.to(device), groups=groups, transposed=True), expected)
    rows = oracle.row_squared_norms(weight)
    assert same(as_producer(weight.to(device), groups=groups), rows)
    assert same(as_consumer(weight.to(device), groups=groups, transposed=True), rows)


@cache
def large(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, row squared norms, column squared norms), enough for several threads."""
    weight = torch.randn(shape)
    return weight, oracle.row_squared_norms(weight), oracle.col_squared_norms(weight)


@each_threads
@pytest.mark.parametrize("shape", [(257, 1100), (1100, 257), (4, 40000), (9000, 3, 3)], ids=str)
def test_threads_do_not_matter(threads: int, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(threads)
    weight, rows, cols = large(shape)
    assert same(as_producer(weight), rows)
    assert same(as_consumer(weight), cols)


def test_order_is_felt() -> None:
    """The data above would not pass by luck: another order gives other bits."""
    weight = torch.randn(1, 1025, dtype=torch.float64)
    one_by_one = sum(x * x for x in weight[0].tolist())
    assert oracle.row_squared_norms(weight).item() != one_by_one
    weight = torch.randn(700, 1, dtype=torch.float64)
    assert oracle.col_squared_norms(weight).item() != sum(x * x for x in weight[:, 0].tolist())


def test_flatten_and_scale_order(device: str) -> None:
    """The squared norm is multiplied by scale * scale; a flatten repeats or joins channels."""
    w_prev, a = torch.randn(6, 40, 3), torch.randn(6)
    squared = a.double() * a.double()
    neighbor = lap_ext.Neighbor(w_prev.to(device), scale=a.to(device))
    w = torch.zeros(1, 6 * 5, device=device)
    expected = (oracle.row_squared_norms(w_prev) * squared).repeat_interleave(5)
    assert same(lap_ext.neighbor_norms(neighbor, w, None)[0], expected)
    w_next, out = torch.randn(70, 6 * 5), torch.zeros(6, 2, 3, device=device)
    neighbor = lap_ext.Neighbor(w_next.to(device), scale=a.to(device))
    expected = oracle.col_squared_norms(w_next.reshape(70, 6, 5)) * squared
    assert same(lap_ext.neighbor_norms(None, out, neighbor)[1], expected)
    fine = torch.randn(6 * 5, 70)
    conv = torch.zeros(1, 6, 3, device=device)
    assert same(
        lap_ext.neighbor_norms(fine.to(device), conv, None)[0],
        oracle.row_squared_norms(fine.view(6, -1)),
    )


def test_several_add_in_their_order(device: str) -> None:
    sources = [torch.randn(7, n, dtype=torch.float64) for n in (3, 50, 9)]
    squared_norms = [oracle.row_squared_norms(x) for x in sources]
    w = torch.zeros(1, 7, dtype=torch.float64, device=device)
    got = lap_ext.neighbor_norms([x.to(device) for x in sources] + [lap_ext.IDENTITY], w, None)[0]
    assert same(got, ((squared_norms[0] + squared_norms[1]) + squared_norms[2]) + 1.0)


@pytest.mark.parametrize("shape", [(4, 0), (4, 3, 0), (0, 4)], ids=str)
def test_empty_neighbors(shape: tuple[int, ...], device: str) -> None:
    weight = torch.zeros(shape, device=device)
    assert same(as_producer(weight), torch.zeros(shape[0], dtype=torch.float64))
    assert same(as_consumer(weight), torch.zeros(shape[1], dtype=torch.float64))


@each_dtype
def test_extremes_do_not_overflow(dtype: torch.dtype, device: str) -> None:
    """float64 sums: the largest and the smallest float32 numbers still have a norm."""
    if dtype == torch.float64:
        weight = torch.tensor([[1e150, 1e150], [1e-130, 0.0]], dtype=dtype)
    else:
        top, low = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 4
        weight = torch.tensor([[top, top], [low, 0.0]], dtype=dtype)
    got = as_producer(weight.to(device))
    assert same(got, oracle.row_squared_norms(weight))
    assert torch.isfinite(got).all() and (got > 0).all()
