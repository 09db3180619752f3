# SPDX-License-Identifier: MIT
"""How many are kept: exact from any sparsity, and counted in int64 above 2**24 and 2**31.

Large tensors are expanded (stride 0): many elements, little memory.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lap_ext
from lap_ext.ops import check
from tests.helpers import layer_oracle as oracle

# floor((1 - s) * n + 1/2), worked by hand; s is exactly the number given.
TABLE: list[tuple[Any, int, int]] = [
    (0, 7, 7),  # 7.5
    (1, 7, 0),  # 0.5
    (0.5, 1, 1),  # 1.0
    (0.5, 2, 1),  # 1.5
    (0.5, 3, 2),  # 2.0
    (0.5, 5, 3),  # 3.0
    (0.25, 6, 5),  # 4.5 + 0.5
    (0.75, 2, 1),  # 0.5 + 0.5
    (0.9, 5, 0),  # the double 0.9 is above 9/10: just below 0.5 + 0.5
    (Fraction(9, 10), 5, 1),  # 0.5 + 0.5
    (Decimal("0.9"), 5, 1),
    (0.9, 10, 1),
    (0.99, 50, 1),  # the double 0.99 is below 99/100: just above 0.5 + 0.5
    (0.1, 5, 4),  # the double 0.1 is above 1/10: just below 4.5 + 0.5
    (0.3, 5, 4),  # below 3/10: just above 3.5 + 0.5
    (2.0**-60, 2**60, 2**60 - 1),
    (0.5, 2**60 + 1, 2**59 + 1),  # 2**59 + 0.5 + 0.5
    (1 - 2.0**-53, 2**53, 1),
    (1 - 2.0**-53, 2**52, 1),  # 0.5 + 0.5
    (5e-324, 2**60, 2**60),
    (0.5, 0, 0),
    (1, 0, 0),
]


@pytest.mark.parametrize(("sparsity", "n", "kept"), TABLE, ids=str)
def test_table(sparsity: Any, n: int, kept: int) -> None:
    assert check.keep_count(sparsity, None, n) == kept


@pytest.mark.parametrize("n", [3, 10, 1000, 2**24 + 1, 2**31 + 1, 10**12 + 7, 2**60])
def test_every_per_mille(n: int) -> None:
    for thousandth in range(1001):
        s = thousandth / 1000
        assert check.keep_count(s, None, n) == oracle.keep_count(s, n)
        exact = Fraction(thousandth, 1000)
        assert check.keep_count(exact, None, n) == oracle.keep_count(exact, n)


def test_number_types() -> None:
    w = torch.arange(1.0, 9).view(2, 4)
    for half in (0.5, Fraction(1, 2), Decimal("0.5"), np.float32(0.5), np.float64(0.5)):
        assert int(lap_ext.mask(None, w, None, sparsity=half).sum()) == 4
    for three in (3, np.int32(3), np.int64(3)):
        assert int(lap_ext.mask(None, w, None, keep=three).sum()) == 3
        assert int(lap_ext.topk_mask(w, keep=three).sum()) == 3


def test_functions_agree() -> None:
    """One rule for all: masks of scores, of weights, of lists."""
    w = torch.randn(7, 11)
    for sparsity in (0.0, 0.123, 0.5, 0.9, 0.999, 1.0):
        kept = oracle.keep_count(sparsity, 77)
        assert int(lap_ext.mask(None, w, None, sparsity=sparsity).sum()) == kept
        assert int(lap_ext.mask_from_norms(w, None, None, sparsity=sparsity).sum()) == kept
        assert int(lap_ext.prune_(None, w.clone(), None, sparsity=sparsity).sum()) == kept
        assert int(lap_ext.topk_mask(w, sparsity=sparsity).sum()) == kept
        parts = lap_ext.topk_mask(list(w), sparsity=sparsity)
        assert sum(int(m.sum()) for m in parts) == kept


@pytest.mark.parametrize("keep", [2**31, 2**62, 2**63 - 1, 2**63, 2**70])
def test_keep_beyond_everything(keep: int) -> None:
    """More than there are means all, however large the number."""
    w = torch.randn(3, 5)
    assert lap_ext.mask(None, w, None, keep=keep).all()
    assert lap_ext.topk_mask([w, w], keep=keep)[1].all()


def test_above_2_to_24() -> None:
    """Where float32 can no longer count: n is odd, all scores are equal."""
    rows, cols = 4099, 4097  # 2**24 + 16387
    n = rows * cols
    w = torch.full((1, 1), -2.0).expand(rows, cols)
    for keep in (2**24 + 1, 2**24 + 3, n - 1):
        for got in (lap_ext.mask(None, w, None, keep=keep), lap_ext.topk_mask(w, keep=keep)):
            flat = got.view(-1)
            assert int(got.sum()) == keep and flat[:keep].all() and not flat[keep:].any()
    assert lap_ext.kth_largest(w, n).item() == -2.0


def test_rank_above_2_to_24() -> None:
    """One larger value among equal ones, at the very end."""
    w = torch.full((4099, 4097), 1.0)
    w[-1, -1] = 2.0
    got = lap_ext.mask(None, w, None, keep=2**24 + 2).view(-1)
    assert got[: 2**24 + 1].all() and got[-1] and int(got.sum()) == 2**24 + 2
    assert lap_ext.kth_largest(w, 1) == 2 and lap_ext.kth_largest(w, 2) == 1


@pytest.mark.big
def test_above_2_to_31() -> None:
    """Indices and counts beyond int32, float16 to save memory: the mask alone is 2.2 GB."""
    rows, cols = 32771, 65539
    assert rows * cols > 2**31 + 100
    w = torch.ones(1, cols, dtype=torch.float16)
    w[0, -1] = 2
    w = w.expand(rows, cols)
    keep = 2**31 + 5
    full_rows, rest = divmod(keep - rows, cols - 1)  # all twos, then the ones in C-order
    expected = torch.zeros(rows, cols, dtype=torch.bool)
    expected[:full_rows], expected[full_rows, :rest], expected[:, -1] = True, True, True
    assert torch.equal(lap_ext.mask(None, w, None, keep=keep), expected)
    assert lap_ext.kth_largest(w, rows) == 2 and lap_ext.kth_largest(w, rows + 1) == 1


@pytest.mark.big
def test_list_above_2_to_31() -> None:
    """No tensor of the list is that long, but their ranking is."""
    part = torch.ones(1, 1, dtype=torch.float16).expand(27000, 27000)
    scores = [part, part, part]
    keep = 2**31 + 1
    got = lap_ext.topk_mask(scores, keep=keep)
    counts = [int(m.count_nonzero()) for m in got]
    assert counts == [27000**2, 27000**2, keep - 2 * 27000**2]
    assert got[2].view(-1)[: counts[2]].all()
    assert lap_ext.kth_largest(scores, 3 * 27000**2) == 1
