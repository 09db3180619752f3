# SPDX-License-Identifier: MIT
"""kth_largest: the exact k-th largest value of a Tensor or of a list, by comparison with a sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lap_ext
from tests.helpers import layer_cases as cases
from tests.helpers.parameters import each_dtype, each_threads


def descending(scores: list[Tensor]) -> Tensor:
    """All values sorted, the largest first."""
    return torch.cat([x.reshape(-1) for x in scores]).double().sort(descending=True).values


def test_worked_by_hand(device: str) -> None:
    x = torch.tensor([[2.0, -1.0], [7.0, 2.0]], device=device)
    assert [lap_ext.kth_largest(x, k).item() for k in (1, 2, 3, 4)] == [7, 2, 2, -1]
    assert lap_ext.kth_largest([x, torch.tensor(5.0, device=device)], 2).item() == 5


@each_dtype
def test_value_dtype_and_shape(dtype: torch.dtype, device: str) -> None:
    """0-d, of the scores' dtype, one of the scores exactly."""
    shapes = [(3, 5), (), (0,), (4, 3, 2, 5), (2, 0), (65,)]
    scores = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    order = descending(scores)
    for layout in ("contiguous", "transposed", "sliced", "reversed_strides"):
        laid = [cases.LAYOUTS[layout](x.to(device)) if x.dim() > 1 else x for x in scores]
        laid = [x.to(device) for x in laid]
        for k in range(1, order.numel() + 1, 7):
            got = lap_ext.kth_largest(laid, k)
            assert got.shape == () and got.dtype == dtype and got.device.type == device
            assert got.double().item() == order[k - 1].item(), (layout, k)


@each_dtype
@each_threads
def test_sizes_and_threads(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    for n in cases.SIZES:
        x = torch.randn(n, dtype=torch.float64).to(dtype)
        order = descending([x])
        for k in {1, max(1, n // 10), max(1, n // 2), n}:
            assert lap_ext.kth_largest(x, k).double() == order[k - 1], (n, k)


@each_dtype
@pytest.mark.parametrize("name", list(cases.HOSTILE))
def test_hostile_data(name: str, dtype: torch.dtype, device: str) -> None:
    for n in (1, 1000, 150_001):
        x = cases.hostile(name, n, dtype)
        order = descending([x])
        for k in {1, n // 2 + 1, max(1, n // 100), n}:
            got = lap_ext.kth_largest(x.to(device), k).double().cpu()
            assert got == order[k - 1], (n, k)


@each_threads
@pytest.mark.parametrize("name", ["random", "crowd", "sorted", "leading_bits_wide"])
def test_large_list(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    scores = list(cases.hostile(name, 3_000_000, torch.float32).split(1_234_567))
    order = descending(scores)
    for k in (1, 30_000, 300_000, 1_500_000, 2_999_999, 3_000_000):
        assert lap_ext.kth_largest(scores, k).double() == order[k - 1], k


def test_signed_and_infinite(device: str) -> None:
    x = torch.tensor([-0.0, float("-inf"), float("inf"), -5.0], device=device)
    assert [lap_ext.kth_largest(x, k).item() for k in (1, 2, 3, 4)] == [
        float("inf"),
        0.0,
        -5.0,
        float("-inf"),
    ]


@each_dtype
def test_threshold_agrees_with_the_mask(dtype: torch.dtype, device: str) -> None:
    """The k-th largest is the smallest score that topk_mask keeps."""
    x = torch.randn(70, 91, dtype=torch.float64).to(dtype).to(device)
    for k in (1, 63, 3000, x.numel()):
        assert lap_ext.kth_largest(x, k) == x[lap_ext.topk_mask(x, keep=k)].min()
