# SPDX-License-Identifier: MIT
"""Equal scores: exactly k are kept, the lower (tensor order, flat C-order index) first."""

from __future__ import annotations

import pytest
import torch

import lap_ext
from tests.helpers import layer_cases as cases
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import each_dtype, each_threads


def first(keep: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The first `keep` indices in C-order."""
    flat = torch.arange(torch.Size(shape).numel()) < keep
    return flat.view(shape)


@each_dtype
@pytest.mark.parametrize("shape", [(7, 9), (64, 65), (5, 6, 7), (9, 8, 3, 3), (4, 3, 2, 5, 2)])
def test_all_equal_in_every_layout(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """C-order of the indices, whatever the order in memory."""
    n = torch.Size(shape).numel()
    signs = torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)
    for layout in cases.layouts_of(len(shape)):
        w = cases.LAYOUTS[layout]((signs * 0.625).to(dtype).to(device))
        for keep in (0, 1, 2, 31, n // 2, n - 1, n):
            assert torch.equal(lap_ext.mask(None, w, None, keep=keep).cpu(), first(keep, shape))
            assert torch.equal(lap_ext.topk_mask(w.abs(), keep=keep).cpu(), first(keep, shape))
            pruned = w.clone()
            lap_ext.prune_(None, pruned, None, keep=keep)
            assert torch.equal((pruned != 0).cpu(), first(keep, shape)), (layout, keep)


@each_threads
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, 2.0**-149])
def test_all_equal_and_large(value: float, threads: int) -> None:
    torch.set_num_threads(threads)
    w = torch.full((1001, 2003), value)
    for keep in (1, 4095, 4097, 1_000_003, w.numel() - 1):
        assert torch.equal(lap_ext.mask(None, w, None, keep=keep), first(keep, w.shape)), keep
        got = lap_ext.topk_mask([w[:500], w[500:]], keep=keep)
        assert torch.equal(torch.cat(got), first(keep, w.shape)), keep


def test_equal_products_of_unequal_numbers(device: str) -> None:
    w = torch.tensor([[1.0, 2.0, 3.0], [6.0, 4.0, 2.0]], device=device)
    ins = torch.tensor([12.0, 6.0, 4.0], device=device)  # rows: 12 12 12, 72 24 8
    outs = torch.tensor([6.0, 1.0], device=device)  # scores: 72 72 72, 72 24 8
    for keep, expected in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])):
        got = lap_ext.mask_from_norms(w, ins, outs, keep=keep)
        assert got.flatten().nonzero().flatten().tolist() == expected


@each_dtype
def test_zeros_of_both_signs(dtype: torch.dtype, device: str) -> None:
    zeros = torch.tensor([[0.0, -0.0, -0.0], [0.0, -0.0, 5.0]], dtype=dtype, device=device)
    got = lap_ext.mask(None, zeros, None, keep=3).tolist()
    assert got == [[True, True, False], [False, False, True]]
    assert lap_ext.topk_mask(zeros, keep=3).tolist() == got


def test_zero_norm_equals_zero_weight(device: str) -> None:
    w = torch.tensor([[0.0, 9.0, -0.0, 1.0]], device=device)
    ins = torch.tensor([1.0, 0.0, 1.0, 1.0], device=device)
    got = lap_ext.mask_from_norms(w, ins, torch.ones(1, device=device), keep=3)
    assert got.tolist() == [[True, True, False, True]]


def test_threshold_among_the_zeros(device: str) -> None:
    """60 % zeros at sparsity 0.5: all nonzero weights and the first zeros."""
    w = cases.hostile("zeros_60", 300 * 301, torch.float32).view(300, 301)
    keep = oracle.keep_count(0.5, w.numel())
    got = lap_ext.mask(None, w.to(device), None, sparsity=0.5).cpu()
    assert int((w != 0).sum()) < keep
    zeros = got[w == 0]
    extra = keep - int((w != 0).sum())
    assert got[w != 0].all() and zeros[:extra].all() and not zeros[extra:].any()


def test_ineligible_ties_are_stepped_over(device: str) -> None:
    w = torch.full((9, 11), 2.0, device=device)
    allowed = torch.arange(99).view(9, 11) % 3 == 1
    got = lap_ext.mask(None, w, None, keep=5, mask=allowed.to(device)).cpu()
    assert got.flatten().nonzero().flatten().tolist() == [1, 4, 7, 10, 13]
    got = lap_ext.mask(None, 0 * w, None, keep=50, mask=allowed.to(device)).cpu()
    assert torch.equal(got, allowed)


def test_across_tensors(device: str) -> None:
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0]], device=device)
    empty = torch.zeros(0, device=device)
    scores = [x.t(), empty, torch.tensor(2.0, device=device), x]
    flat = [2.0 == v for v in [1, 2, 2, 1, 2, 1, 2, 2, 1]]
    indices = [i for i, two in enumerate(flat) if two]
    for keep in range(1, 6):
        got = torch.cat([m.flatten() for m in lap_ext.topk_mask(scores, keep=keep)])
        assert got.nonzero().flatten().tolist() == indices[:keep]


@each_threads
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16, 20, 23])
def test_equal_leading_bits(bits: int, threads: int) -> None:
    """Scores that differ in their last `bits` bits only, among ties of the rest."""
    torch.set_num_threads(threads)
    w = (0x3F800000 | torch.randint(0, 1 << bits, (400, 601), dtype=torch.int32)).view(
        torch.float32
    )
    one = torch.ones(601, dtype=torch.float64), torch.ones(400, dtype=torch.float64)
    order = oracle.rank_order(oracle.exact_score(w, *one))
    for keep in (1, 777, w.numel() // 2, w.numel() - 2):
        expected = oracle.first_of(order, keep, w.shape)
        assert torch.equal(lap_ext.mask(None, w, None, keep=keep), expected), keep
        assert torch.equal(lap_ext.topk_mask(w, keep=keep), expected), keep
