# SPDX-License-Identifier: MIT
"""Underflow and overflow never decide a mask; a score is the exact product, rounded once.

The oracle has no limit on exponents. Powers of two in the norms change no mask at all.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import lap_ext
from tests.helpers import layer_cases as cases
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import each_dtype

HALF = (torch.float16, torch.bfloat16)


def norms(n: int, spread: int) -> Tensor:
    """Float64 norms with exponents in [-spread, spread]."""
    return torch.rand(n, dtype=torch.float64) * torch.pow(
        torch.tensor(2.0, dtype=torch.float64), torch.randint(-spread, spread + 1, (n,))
    )


def check_mask(w: Tensor, ins: Tensor, outs: Tensor, device: str) -> None:
    """All sparsities against the oracle."""
    order = oracle.rank_order(oracle.exact_score(w, ins, outs))
    for keep in (1, w.numel() // 10, w.numel() // 2, w.numel() * 9 // 10, w.numel() - 1):
        got = lap_ext.mask_from_norms(w.to(device), ins.to(device), outs.to(device), keep=keep)
        assert torch.equal(got.cpu(), oracle.first_of(order, keep, w.shape)), keep


@each_dtype
@pytest.mark.parametrize("powers", [(-140, 0), (-140, -140), (-75, -74), (120, 0), (120, 120)])
def test_power_of_two_in_the_norms(
    powers: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    w, ins, outs = cases.random_layer(cases.Shape("", (67, 129)), dtype)
    expected = lap_ext.mask_from_norms(w, ins, outs, sparsity=0.8)
    got = lap_ext.mask_from_norms(
        w.to(device),
        ins.to(device) * 2.0 ** powers[0],
        outs.to(device) * 2.0 ** powers[1],
        sparsity=0.8,
    )
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("power", [-149, -140, -126, -60, 60, 100, 119])
def test_power_of_two_in_the_weights(power: int, device: str) -> None:
    """Weights of 8 bits stay exact down to denormals."""
    w = torch.randint(-255, 256, (50, 90)).float()
    ins, outs = torch.rand(90, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    expected = lap_ext.mask_from_norms(w, ins, outs, sparsity=0.7)
    for norm_power in (-140, 0, 120):
        scaled = (w.double() * 2.0**power).float()
        assert torch.equal(scaled.double(), w.double() * 2.0**power)
        got = lap_ext.mask_from_norms(
            scaled.to(device), ins.to(device) * 2.0**norm_power, outs.to(device), sparsity=0.7
        )
        assert torch.equal(got.cpu(), expected), norm_power


@pytest.mark.parametrize("neighbor_power", [-70, -100, -126, 60, 120])
def test_power_of_two_in_the_neighbors(neighbor_power: int, device: str) -> None:
    """Through float32 neighbors, whose squares leave float32's range."""
    w_prev = torch.randint(-8, 9, (30, 20)).float()
    w, w_next = torch.randn(40, 30), torch.randint(-8, 9, (25, 40)).float()
    expected = lap_ext.mask(w_prev, w, w_next, sparsity=0.9)
    scaled = [x.to(device) * 2.0**neighbor_power for x in (w_prev, w_next)]
    assert torch.equal(
        lap_ext.mask(scaled[0], w.to(device), scaled[1], sparsity=0.9).cpu(), expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("spread", [10, 40, 63, 100, 150, 200])
def test_mixed_ranges(spread: int, dtype: torch.dtype, device: str) -> None:
    """Products of norms from far below to far above what float32 holds, in one layer."""
    w = torch.randn(70, 110, dtype=torch.float64).to(dtype)
    check_mask(w, norms(110, spread), norms(70, spread), device)


@pytest.mark.parametrize("name", ["wide", "denormal", "tiny", "huge", "zeros_60"])
def test_hostile_weights_and_mixed_ranges(name: str, device: str) -> None:
    w = cases.hostile(name, 64 * 257, torch.float32).view(64, 257)
    for spread in (0, 60, 130):
        check_mask(w, norms(257, spread), norms(64, spread), device)


def test_large_and_wide(device: str) -> None:
    """The second selection, on wide keys, above the size of the sampled plan."""
    w = torch.randn(1024, 1300) * torch.pow(2.0, torch.randint(-60, 60, (1024, 1300)).float())
    check_mask(w, norms(1300, 100), norms(1024, 100), device)


def test_a_smaller_product_never_wins(device: str) -> None:
    """In plain float32 both products are 0 and the lower index would win."""
    w = torch.tensor([[1.0, 2.0]], device=device)
    ins = torch.full((2,), 2.0**-100, dtype=torch.float64, device=device)
    big = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    outs = torch.tensor([2.0**-100], dtype=torch.float64, device=device)
    assert lap_ext.mask_from_norms(w, ins, outs, keep=1).tolist() == [[False, True]]
    outs = torch.tensor([2.0**-100, 1.0], dtype=torch.float64, device=device)
    got = lap_ext.mask_from_norms(big, ins, outs, keep=3)
    assert got.tolist() == [[False, True], [True, True]]


def test_float16_tiny(device: str) -> None:
    """The smallest halves: their squares are 0 in half precision, not here."""
    w = (torch.arange(1, 41).view(5, 8) * 2.0**-24).half()
    w_prev = (torch.arange(1, 17).view(8, 2) * 2.0**-24).half()
    w_next = (torch.arange(1, 11).view(2, 5) * 2.0**-24).half()
    ins, outs = map(
        oracle.root, (oracle.row_squared_norms(w_prev), oracle.col_squared_norms(w_next))
    )
    exact = oracle.exact_score(w, ins, outs)
    args = [x.to(device) for x in (w_prev, w, w_next)]
    assert torch.equal(lap_ext.score(*args).cpu(), oracle.float_score(w, ins, outs))
    for keep in range(41):
        assert torch.equal(lap_ext.mask(*args, keep=keep).cpu(), oracle.rank_mask(exact, keep))


@each_dtype
@pytest.mark.parametrize("powers", list(itertools.product([-200, -140, 0, 130], [-90, 0, 100])))
def test_score_is_rounded_once(powers: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Denormal, 0 or inf where the exact score lies there, even if a norm alone leaves it."""
    w, ins, outs = cases.random_layer(cases.Shape("", (33, 65)), dtype)
    ins, outs = ins * 2.0 ** powers[0], outs * 2.0 ** powers[1]
    if dtype == torch.float32:
        w = w * torch.pow(2.0, torch.randint(-100, 100, w.shape).float())
    got = lap_ext.score_from_norms(w.to(device), ins.to(device), outs.to(device))
    assert torch.equal(got.cpu(), oracle.float_score(w, ins, outs))


def test_denormal_scores(device: str) -> None:
    """Rounded once, from the exact product: not to 24 bits and then to a denormal."""
    w = (0x3F800000 | torch.randint(0, 1 << 23, (64, 1024), dtype=torch.int32)).view(torch.float32)
    ins = torch.rand(1024, dtype=torch.float64) * 2.0**-130
    outs = 1 + torch.rand(64, dtype=torch.float64)
    got = lap_ext.score_from_norms(w.to(device), ins.to(device), outs.to(device))
    assert torch.equal(got.cpu(), oracle.float_score(w, ins, outs))


def test_float64_is_exact_or_an_error(device: str) -> None:
    """float64 has no wider keys: within the range exact, beyond it a ValueError."""
    w = torch.randn(20, 30, dtype=torch.float64)
    check_mask(w, norms(30, 200), norms(20, 200), device)
    ins = torch.full((30,), 1e-300, dtype=torch.float64, device=device)
    ins[0] = 1e300
    with pytest.raises(ValueError, match=r"^mask_from_norms: .*float64's range"):
        lap_ext.mask_from_norms(w.to(device), ins, ins[:20].clone(), keep=590)


@each_dtype
def test_no_error_where_nothing_is_ranked(dtype: torch.dtype, device: str) -> None:
    """Keeping nothing, or all that may be kept, needs no score, however far the norms are apart."""
    w = torch.randn(20, 30, dtype=torch.float64).to(dtype).to(device)
    ins = torch.full((30,), 1e-300, dtype=torch.float64, device=device)
    ins[0] = 1e300
    outs = ins[:20].clone()
    eligible = torch.rand(20, 30, device=device) < 0.5
    count = int(eligible.sum())
    assert not lap_ext.mask_from_norms(w, ins, outs, keep=0).any()
    for keep in (600, 601):
        assert lap_ext.mask_from_norms(w, ins, outs, keep=keep).all()
    for keep in (count, count + 1, 600):
        got = lap_ext.mask_from_norms(w, ins, outs, keep=keep, mask=eligible)
        assert torch.equal(got, eligible)


@each_dtype
@pytest.mark.parametrize("spread", [210, 300, 500, 900, 1020])
def test_exact_or_an_error(spread: int, dtype: torch.dtype, device: str) -> None:
    """Norms over all of float64's range: never a mask that an underflow has decided."""
    w = torch.randn(30, 40, dtype=torch.float64).to(dtype)
    ins, outs = norms(40, spread), norms(30, spread)
    order = oracle.rank_order(oracle.exact_score(w, ins, outs))
    for keep in (1, 100, 600, 1000, 1199):
        try:
            got = lap_ext.mask_from_norms(w.to(device), ins.to(device), outs.to(device), keep=keep)
        except ValueError as error:
            assert "float64's range" in str(error)
            assert spread > 210, "4 * 210 powers of two are less than float64 spans"
            continue
        assert torch.equal(got.cpu(), oracle.first_of(order, keep, w.shape)), keep


def test_float64_denormal_scores(device: str) -> None:
    w = torch.rand(8, 40, dtype=torch.float64) + 0.5
    ins = (torch.rand(40, dtype=torch.float64) + 0.5) * 2.0**-700
    outs = (torch.rand(8, dtype=torch.float64) + 0.5) * 2.0**-340
    got = lap_ext.score_from_norms(w.to(device), ins.to(device), outs.to(device))
    expected = oracle.float_score(w, ins, outs)
    assert torch.equal(got.cpu(), expected) and 0 < expected.max() < 2.0**-1022


def test_the_oracle_rounds_once() -> None:
    """The oracle itself against rational numbers, one by one."""
    w = torch.randn(40, 50) * torch.pow(2.0, torch.randint(-140, 20, (40, 50)).float())
    ins, outs = norms(50, 60), norms(40, 30)
    got = oracle.float_score(w, ins, outs)
    for o, i in itertools.product(range(0, 40, 3), range(0, 50, 7)):
        c = ins[i].float().double() * outs[o].float().double()  # 24 bits each: exact
        m, e = math.frexp(c.item())
        exact = Fraction(float(np.float32(m))) * Fraction(2) ** e * Fraction(w[o, i].abs().item())
        assert abs(Fraction(got[o, i].item()) - exact) <= Fraction(spacing(got[o, i])) / 2


def spacing(x: Tensor) -> float:
    """The distance of neighboring float32 numbers at x."""
    return float(np.spacing(np.float32(x.item())))
