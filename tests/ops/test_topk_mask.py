# SPDX-License-Identifier: MIT
"""topk_mask: exactly min(keep, eligible) of all scores as one ranking, Tensor or list.

Order: score descending (-0.0 equals 0.0, signed, infinities allowed), then tensor order, then flat
index. The oracle is one stable argsort of everything concatenated.
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


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Equal masks, all of them bool and contiguous."""
    assert all(x.dtype == torch.bool and x.is_contiguous() for x in got)
    return len(got) == len(expected) and all(map(torch.equal, [x.cpu() for x in got], expected))


def scores_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Signed scores in which ties within and across tensors are common, with both zeros."""
    made = []
    for shape in shapes:
        x = (torch.randn(shape, dtype=torch.float64) * 8).round() / 8
        made.append(torch.where(torch.rand(shape) < 0.1, -0.0, x).to(dtype))
    return made


def test_worked_by_hand(device: str) -> None:
    x = torch.tensor([[2.0, -1.0], [0.0, 2.0]], device=device)
    y = torch.tensor([2.0, 5.0], device=device)
    assert lap_ext.topk_mask(x, keep=1).tolist() == [[True, False], [False, False]]
    assert lap_ext.topk_mask(x, keep=3).tolist() == [[True, False], [True, True]]
    got = lap_ext.topk_mask([x, y], keep=3)  # 5, then 2 and 2 of x before the 2 of y
    assert [m.tolist() for m in got] == [[[True, False], [False, True]], [False, True]]
    got = lap_ext.topk_mask([y, x], keep=3)  # 5, the 2 of y, the first 2 of x
    assert [m.tolist() for m in got] == [[True, True], [[True, False], [False, False]]]
    assert [int(m.sum()) for m in lap_ext.topk_mask([x, y], sparsity=0.5)] == [2, 1]
    assert isinstance(lap_ext.topk_mask([x], keep=1), list)


@each_dtype
def test_lists_layouts_and_keeps(dtype: torch.dtype, device: str) -> None:
    shapes = [(3, 5), (), (0,), (4, 3, 2, 5), (1,), (2, 0, 3), (65,), (2, 3, 4, 2, 3)]
    scores = scores_of(shapes, dtype)
    n = sum(x.numel() for x in scores)
    for layout in cases.LAYOUTS:
        laid = [
            cases.LAYOUTS[layout](x.to(device))
            if x.dim() > 1 and layout in cases.layouts_of(x.dim())
            else x.to(device)
            for x in scores
        ]
        for keep in (0, 1, 2, n // 3, n - 1, n, n + 1, 10 * n):
            got = lap_ext.topk_mask(laid, keep=keep)
            assert same(got, oracle.rank_values(scores, keep)), (layout, keep)


@each_dtype
def test_eligible(dtype: torch.dtype, device: str) -> None:
    scores = scores_of([(30, 41), (), (0, 3), (7,), (5, 6, 7)], dtype)
    for share in (0.0, 0.3, 1.0):
        masks = [torch.rand(x.shape) < share for x in scores]
        for keep in (0, 1, 100, 10**6):
            got = lap_ext.topk_mask(
                [x.to(device) for x in scores], keep=keep, mask=[m.to(device) for m in masks]
            )
            assert same(got, oracle.rank_values(scores, keep, masks)), (share, keep)
    one, mask = scores[0], torch.rand(30, 41) < 0.5
    got = lap_ext.topk_mask(one.to(device), keep=99, mask=mask.to(device))
    assert same([got], oracle.rank_values([one], 99, [mask]))


@each_dtype
def test_infinities_are_numbers(dtype: torch.dtype, device: str) -> None:
    x = torch.tensor([1.0, float("-inf"), float("inf"), -2.0, float("inf")], dtype=dtype)
    rank = [2, 4, 0, 3, 1]
    for keep in range(6):
        got = lap_ext.topk_mask(x.to(device), keep=keep)
        assert got.nonzero().flatten().tolist() == sorted(rank[:keep])
    # An eligible -inf still beats everything ineligible.
    allowed = torch.tensor([False, True, False, False, False], device=device)
    assert lap_ext.topk_mask(x.to(device), keep=1, mask=allowed).tolist() == allowed.tolist()


@each_dtype
@each_threads
def test_sizes_and_threads(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    for n in cases.SIZES:
        x = torch.randn(n, dtype=torch.float64).to(dtype)
        for keep in {1, n // 10, n // 2, n - 1} if n < 5000 else {n // 10}:
            expected = oracle.rank_values([x], keep)
            assert same([lap_ext.topk_mask(x, keep=keep)], expected), (n, keep)
            cut = n // 3
            got = lap_ext.topk_mask([x[:cut], x[cut:]], keep=keep)
            assert same([torch.cat(got)], expected), (n, keep)


@each_dtype
@pytest.mark.parametrize("name", list(cases.HOSTILE))
def test_hostile_data(name: str, dtype: torch.dtype, device: str) -> None:
    for n in (1, 1000, 150_001):
        x = cases.hostile(name, n, dtype)
        for sparsity in (0.5, 0.99):
            keep = oracle.keep_count(sparsity, n)
            got = lap_ext.topk_mask(x.to(device), sparsity=sparsity)
            assert same([got], oracle.rank_values([x], keep)), (n, sparsity)


@cache
def large(name: str) -> tuple[list[Tensor], np.ndarray]:
    """Some 3 M scores over tensors of very different sizes, and their order."""
    sizes = [5, 1_000_003, 0, 70_001, 1_500_000, 333, 400_000]
    scores = list(cases.hostile(name, sum(sizes), torch.float32).split(sizes))
    flat = torch.cat(scores).double().numpy()
    return scores, np.argsort(-flat, kind="stable")


@each_threads
@pytest.mark.parametrize("name", ["random", "crowd", "sorted", "descending", "leading_bits"])
def test_large_lists(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    scores, order = large(name)
    for sparsity in (0.0, 0.5, 0.9, 0.99, 1.0):
        keep = oracle.keep_count(sparsity, order.size)
        expected = oracle.first_of(order, keep, order.shape)
        got = lap_ext.topk_mask(scores, sparsity=sparsity)
        assert torch.equal(torch.cat(got), expected), sparsity


def test_same_tensor_twice(device: str) -> None:
    x = torch.tensor([1.0, 3.0, 2.0], device=device)
    got = lap_ext.topk_mask([x, x], keep=3)
    assert [m.tolist() for m in got] == [[False, True, True], [False, True, False]]
