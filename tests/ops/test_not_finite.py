# SPDX-License-Identifier: MIT
"""inf, NaN and overflow: an error with the tensor's name, count, first index; nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from lap_ext import IDENTITY, Neighbor
from tests.helpers import layer_cases as cases
from tests.helpers.parameters import each_dtype, each_threads

NAN, INF = float("nan"), float("inf")
REPAIR = "Repair them, or pass check_finite=False to rank them as they come."
CALLS: dict[str, Callable[..., Any]] = {
    "score": lap_ext.score,
    "mask": lambda *args, **kw: lap_ext.mask(*args, keep=3, **kw),
    "prune_": lambda *args, **kw: lap_ext.prune_(*args, keep=3, **kw),
}
each_call = pytest.mark.parametrize("name", list(CALLS))


def message(name: str, where: str, count: int, first: int) -> str:
    return (
        f"{name}: expected finite weights in {where}, got {count} non-finite values, the first at "
        f"flat index {first}. {REPAIR}"
    )


def raised(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@each_dtype
@each_call
def test_in_w(name: str, dtype: torch.dtype, device: str) -> None:
    """Counted and found in C-order of the indices, in every layout; w keeps its bits."""
    w = torch.randn(4, 5, 3, 2, dtype=torch.float64).to(dtype)
    w[1, 2, 0, 1], w[3, 0, 1, 0], w[3, 4, 2, 1] = NAN, -INF, INF
    for layout in cases.layouts_of(4):
        laid = cases.LAYOUTS[layout](w.to(device))
        text = raised(CALLS[name], None, laid, None)
        assert text == message(name, "w", 3, 1 * 30 + 2 * 6 + 0 * 2 + 1), layout
        assert torch.equal(laid.cpu().nan_to_num(7), w.nan_to_num(7)), layout


@each_call
def test_in_neighbors(name: str, device: str) -> None:
    """The name says which of several neighbors, in the order of the arguments."""
    w = torch.ones(2, 3, device=device)
    good = torch.ones(3, 4, device=device)
    bad = torch.tensor([[1, 2], [NAN, INF], [3, -INF]], device=device)
    assert raised(CALLS[name], bad, w, None) == message(name, "w_prev", 3, 2)
    text = raised(CALLS[name], [good, IDENTITY, Neighbor(bad)], w, None)
    assert text == message(name, "w_prev[2]", 3, 2)
    sinks = torch.tensor([[1, INF]], device=device)
    assert raised(CALLS[name], good, w, (sinks,)) == message(name, "w_next[0]", 1, 1)
    assert raised(CALLS[name], None, w, Neighbor(sinks)) == message(name, "w_next", 1, 1)
    assert torch.equal(w, torch.ones_like(w))


@each_call
def test_in_a_scale(name: str) -> None:
    """A NaN scale is called a scale, not a range of norms."""
    neighbor = Neighbor(torch.ones(3, 2), scale=torch.tensor([1.0, NAN, INF]))
    text = raised(CALLS[name], neighbor, torch.ones(2, 3), None)
    assert text.startswith(f"{name}: expected finite") and "w_prev.scale" in text, text


@pytest.mark.parametrize("function", ["score", "mask", "prune"])
def test_in_norms(function: str, device: str) -> None:
    w = torch.ones(2, 3, device=device)
    call = {
        "score": lap_ext.score_from_norms,
        "mask": lambda *args: lap_ext.mask_from_norms(*args, keep=3),
        "prune": lambda *args: lap_ext.prune_from_norms_(*args, keep=3),
    }[function]
    name = f"{function}_from_norms{'_' if function == 'prune' else ''}"
    for value, shown in ((NAN, "nan"), (INF, "inf"), (-2.0, "-2")):
        ins = torch.tensor([1.0, value, value], device=device)
        text = raised(call, w, ins, None)
        assert text.startswith(f"{name}: expected finite"), text
        assert ">= 0 in in_norm" in text and f"got {shown}" in text and "index 1" in text, text
        outs = torch.tensor([value, 1.0], device=device)
        text = raised(call, w, None, outs)
        assert "in out_norm" in text and "index 0" in text, text
    assert torch.equal(w, torch.ones_like(w))


@each_threads
@pytest.mark.parametrize("n", [1, 33, 4097, 300_000, 2_000_003])
def test_count_and_first_of_many(n: int, threads: int) -> None:
    """The first index does not depend on which thread meets it."""
    torch.set_num_threads(threads)
    for indices in ({0}, {n - 1}, {n // 2, n - 1}, set(range(n // 3, n // 3 + 1 + n // 5))):
        w = torch.ones(1, n)
        w[0, sorted(indices)] = INF
        text = raised(lap_ext.mask, None, w, None, sparsity=0.5)
        assert text == message("mask", "w", len(indices), min(indices))


@each_dtype
def test_nan_in_scores(dtype: torch.dtype, device: str) -> None:
    x = torch.ones(3, 4, dtype=dtype, device=device)
    bad = x.clone()
    bad[1, 1] = bad[2, 0] = NAN
    tail = f"got 2 NaN values, the first at flat index 5. {REPAIR}"
    topk = lambda scores, keep: lap_ext.topk_mask(scores, keep=keep)  # noqa: E731
    for name, call in (("topk_mask", topk), ("kth_largest", lap_ext.kth_largest)):
        assert raised(call, bad, 2) == f"{name}: expected scores without NaN in scores, {tail}"
        text = raised(call, [x, x[:0], bad], 2)
        assert text == f"{name}: expected scores without NaN in scores[2], {tail}"
    assert int(lap_ext.topk_mask(bad, keep=2, check_finite=False).sum()) == 2


@each_call
def test_float64_squares_that_leave_the_range(name: str, device: str) -> None:
    """Overflow and total underflow of float64 squares are errors, not wrong norms."""
    w = torch.ones(2, 3, dtype=torch.float64, device=device)
    for value in (1e200, 1e-200, 5e-324):
        weight = torch.ones(3, 2, dtype=torch.float64, device=device)
        weight[1] = value
        text = raised(CALLS[name], weight, w, None)
        assert text.startswith(f"{name}: expected squared norms within float64's range"), text
        assert "w_prev" in text and "power of two" in text, text
        text = raised(CALLS[name], None, w.t().contiguous(), [IDENTITY, weight.t()])
        assert "w_next[1]" in text, text
    big = torch.full((3, 1), 1.2e154, dtype=torch.float64, device=device)  # squares 1.44e308
    for several in ([big, big], Neighbor(big, scale=torch.full_like(big[:, 0], 2.0))):
        text = raised(CALLS[name], several, w, None)
        assert text.startswith(f"{name}: expected squared norms within float64's range"), text


def test_prune_that_fails_changes_nothing(device: str) -> None:
    """Not one bit, whichever check fails, also on the path that needs wide keys."""
    w = torch.randn(40, 50, device=device)
    before = w.clone()
    version = w._version
    span = torch.full((50,), 1e-300, dtype=torch.float64, device=device)
    span[0] = 1e300
    bad: list[Callable[[], Tensor]] = [
        lambda: lap_ext.prune_(None, w, None, sparsity=90),
        lambda: lap_ext.prune_(torch.ones(51, 2, device=device), w, None, sparsity=0.5),
        lambda: lap_ext.prune_(None, w, None, sparsity=0.5, mask=w[:1] > 0),
        lambda: lap_ext.prune_(torch.full((50, 1), NAN, device=device), w, None, sparsity=0.5),
        lambda: lap_ext.prune_from_norms_(w, -torch.ones(50, device=device), None, sparsity=0.5),
        lambda: lap_ext.prune_from_norms_(w, span, span[:40].clone(), keep=1900),
    ]
    for call in bad:
        with pytest.raises(ValueError):
            call()
        assert torch.equal(w, before) and w._version == version


@each_dtype
def test_unchecked_keeps_exactly_k(dtype: torch.dtype, device: str) -> None:
    w = torch.randn(20, 30, dtype=torch.float64).to(dtype).to(device)
    w[3, 3], w[4, 4], w[5, 5] = NAN, INF, -INF
    for keep in (0, 1, 3, 300, 600):
        got = lap_ext.mask(None, w, None, keep=keep, check_finite=False)
        assert int(got.sum()) == keep
    assert not got.logical_not().any()
