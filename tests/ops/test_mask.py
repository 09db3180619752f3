# SPDX-License-Identifier: MIT
"""mask keeps exactly the first min(keep, eligible) of the exact rank.

Against the oracle's stable sort of exact scores, over shapes, layouts, dtypes, threads and sizes.
Ties have their own file (test_ties.py), and so has underflow (test_exponent_range.py).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import lap_ext
from tests.helpers import layer_cases as cases
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import each_dtype, each_threads


def keeps(n: int) -> list[int]:
    """Numbers to keep that touch every border, in rising order."""
    return sorted({0, 1, n // 100, n // 10, n // 2, n - 1, n, n + 1} & set(range(n + 2)))


def check(w: Tensor, ins: Tensor, outs: Tensor, shape: cases.Shape, device: str) -> None:
    """Every layout and keep against the oracle."""
    exact = oracle.exact_score(w, ins, outs, shape.groups, shape.transposed)
    kinds = {"groups": shape.groups, "transposed": shape.transposed}
    for layout in cases.layouts_of(w.dim()):
        laid = cases.LAYOUTS[layout](w.to(device))
        for keep in keeps(w.numel()):
            got = lap_ext.mask_from_norms(laid, ins.to(device), outs.to(device), keep=keep, **kinds)
            assert got.dtype == torch.bool and got.is_contiguous() and got.device == laid.device
            assert torch.equal(got.cpu(), oracle.rank_mask(exact, keep)), (layout, keep)


@each_dtype
@pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda s: s.name)
def test_shapes_and_layouts(shape: cases.Shape, dtype: torch.dtype, device: str) -> None:
    check(*cases.random_layer(shape, dtype), shape, device)


def test_worked_by_hand(device: str) -> None:
    w_prev = torch.tensor([[3.0, 4.0], [0.0, 1.0]], device=device)  # 5, 1
    w = torch.tensor([[1.0, -4.0], [-2.0, 30.0]], device=device)
    w_next = torch.tensor([[2.0, 0.5]], device=device)  # 2, 0.5
    # scores: 1 * 5 * 2 = 10, 4 * 1 * 2 = 8; 2 * 5 * 0.5 = 5, 30 * 1 * 0.5 = 15
    rank = [(1, 1), (0, 0), (0, 1), (1, 0)]
    for keep in range(6):
        expected = torch.zeros(2, 2, dtype=torch.bool)
        for index in rank[:keep]:
            expected[index] = True
        assert torch.equal(lap_ext.mask(w_prev, w, w_next, keep=keep).cpu(), expected)
    assert lap_ext.mask(w_prev, w, w_next, sparsity=0.5).tolist() == [[True, False], [False, True]]
    assert lap_ext.mask(w_prev, w, w_next, sparsity=0.75).sum() == 1


@each_dtype
@each_threads
def test_sizes_and_threads(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    for n in cases.SIZES:
        for rows, cols in ((1, n), (n, 1), (3, (n + 2) // 3)):
            w = torch.randn(rows, cols, dtype=torch.float64).to(dtype)
            ins = torch.rand(cols, dtype=torch.float64)
            outs = torch.rand(rows, dtype=torch.float64)
            exact = oracle.exact_score(w, ins, outs)
            order = oracle.rank_order(exact)
            for keep in keeps(n) if n < 5000 else (n // 10,):
                got = lap_ext.mask_from_norms(w, ins, outs, keep=keep)
                assert torch.equal(got, oracle.first_of(order, keep, w.shape)), (w.shape, keep)


@pytest.mark.parametrize("name", list(cases.HOSTILE))
@each_dtype
def test_hostile_data(name: str, dtype: torch.dtype, device: str) -> None:
    for rows, cols in ((1, 1), (2, 17), (37, 301), (101, 1009)):
        w = cases.hostile(name, rows * cols, dtype).reshape(rows, cols)
        ins, outs = torch.rand(cols, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
        for norm in (ins, torch.ones_like(ins)):
            exact = oracle.exact_score(w, norm, outs)
            for sparsity in (0.5, 0.9):
                got = lap_ext.mask_from_norms(
                    w.to(device), norm.to(device), outs.to(device), sparsity=sparsity
                )
                expected = oracle.rank_mask(exact, oracle.keep_count(sparsity, w.numel()))
                assert torch.equal(got.cpu(), expected), (rows, cols, sparsity)


@each_dtype
def test_eligible(dtype: torch.dtype, device: str) -> None:
    """What the given mask names never returns; fewer survivors than keep: all survivors."""
    w, ins, outs = cases.random_layer(cases.Shape("", (37, 129)), dtype)
    exact = oracle.exact_score(w, ins, outs)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        eligible = torch.rand(w.shape) < share
        for keep in keeps(w.numel()):
            got = lap_ext.mask_from_norms(
                w.to(device), ins.to(device), outs.to(device), keep=keep, mask=eligible.to(device)
            ).cpu()
            assert not (got & ~eligible).any()
            assert int(got.sum()) == min(keep, int(eligible.sum()))
            assert torch.equal(got, oracle.rank_mask(exact, keep, eligible)), (share, keep)


def test_eligible_of_any_layout(device: str) -> None:
    w, ins, outs = cases.random_layer(cases.Shape("", (6, 5, 4, 3)), torch.float32)
    eligible = torch.rand(w.shape) < 0.5
    expected = oracle.rank_mask(oracle.exact_score(w, ins, outs), 70, eligible)
    for w_layout in cases.layouts_of(4):
        laid = cases.LAYOUTS[w_layout](w.to(device))
        for name in ("transposed", "channels_last", "reversed_strides"):
            given = cases.LAYOUTS[name](eligible.to(device))
            got = lap_ext.mask_from_norms(
                laid, ins.to(device), outs.to(device), keep=70, mask=given
            )
            assert torch.equal(got.cpu(), expected), (w_layout, name)
            assert torch.equal(given.cpu(), eligible)


def test_pruned_negative_weight_stays_pruned(device: str) -> None:
    """A masked negative weight is -0.0; it must not beat a score by its sign bit."""
    w = torch.tensor([[-3.0, 2.0, -1.0, 1e-30]], device=device)
    w *= torch.tensor([[0.0, 1.0, 0.0, 1.0]], device=device)  # -0.0, 2, -0.0, 1e-30
    assert lap_ext.mask(None, w, None, keep=2).tolist() == [[False, True, False, True]]
    assert lap_ext.mask(None, w, None, keep=3).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    w = torch.zeros(shape, device=device)
    for keep in (0, 1, 10):
        assert lap_ext.mask(None, w, None, keep=keep).shape == shape
    assert lap_ext.mask(None, w, None, sparsity=0.5, mask=w != 0).shape == shape


@cache
def large(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Some 3 M weights, far above the size where a sample estimates the threshold."""
    w = torch.randn(shape)
    ins, outs = (torch.rand(n, dtype=torch.float64) + 0.5 for n in (shape[1], shape[0]))
    return w, ins, outs, oracle.rank_order(oracle.exact_score(w, ins, outs))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1500, 2003), (512, 653, 3, 3)], ids=str)
@each_threads
def test_large(shape: tuple[int, ...], sparsity: float, threads: int) -> None:
    torch.set_num_threads(threads)
    w, ins, outs, order = large(shape)
    expected = oracle.first_of(order, oracle.keep_count(sparsity, w.numel()), shape)
    assert torch.equal(lap_ext.mask_from_norms(w, ins, outs, sparsity=sparsity), expected)
    last = cases.LAYOUTS["channels_last" if w.dim() == 4 else "transposed"](w)
    assert torch.equal(lap_ext.mask_from_norms(last, ins, outs, sparsity=sparsity), expected)
