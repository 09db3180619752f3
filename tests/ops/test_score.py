# SPDX-License-Identifier: MIT
"""score: hand-worked numbers, and every bit against the exact definition.

`score` is |w| times the rounded product of the norms, rounded once to float32 (float64 for float64
weights).
"""

from __future__ import annotations

import pytest
import torch

import lap_ext
from tests.helpers import layer_cases as cases
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import SCORE_DTYPE, each_dtype, each_threads


@each_dtype
@pytest.mark.parametrize("case", cases.WORKED, ids=lambda c: c.name)
def test_worked_by_hand(case: cases.Worked, dtype: torch.dtype, device: str) -> None:
    w_prev, w, w_next = cases.built(case, dtype, device)
    got = lap_ext.score(w_prev, w, w_next, groups=case.groups, transposed=case.transposed)
    expected = torch.tensor(case.expected, dtype=SCORE_DTYPE[dtype])
    assert torch.equal(got.cpu(), expected)
    assert got.dtype == SCORE_DTYPE[dtype] and got.device == w.device and got.is_contiguous()


@each_dtype
@pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda s: s.name)
def test_exact_definition(shape: cases.Shape, dtype: torch.dtype, device: str) -> None:
    w, in_norm, out_norm = cases.random_layer(shape, dtype)
    expected = oracle.float_score(w, in_norm, out_norm, shape.groups, shape.transposed)
    for layout in cases.layouts_of(w.dim()):
        laid = cases.LAYOUTS[layout](w.to(device))
        got = lap_ext.score_from_norms(
            laid,
            in_norm.to(device),
            out_norm.to(device),
            groups=shape.groups,
            transposed=shape.transposed,
        )
        assert torch.equal(got.cpu(), expected), layout
        assert got.is_contiguous() and not torch.signbit(got).any(), layout


@each_threads
@pytest.mark.parametrize("n", cases.SIZES)
def test_sizes_and_threads(n: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for shape in ((1, n), (n, 1), (3, n) if n < 70000 else (7, n // 7)):
        w = torch.randn(shape)
        ins = torch.rand(shape[1], dtype=torch.float64)
        outs = torch.rand(shape[0], dtype=torch.float64)
        got = lap_ext.score_from_norms(w, ins, outs)
        assert torch.equal(got, oracle.float_score(w, ins, outs))


@each_dtype
def test_overlapping_memory(dtype: torch.dtype, device: str) -> None:
    """Expanded weights (stride 0) and windows over one buffer read as what they show."""
    row = torch.randn(1, 40, dtype=torch.float64).to(dtype)
    overlapping = torch.randn(50, dtype=torch.float64).to(dtype).as_strided((11, 40), (1, 1))
    for w in (row.expand(9, 40), row.t().expand(40, 9), overlapping):
        ins = torch.rand(w.shape[1], dtype=torch.float64)
        outs = torch.rand(w.shape[0], dtype=torch.float64)
        got = lap_ext.score_from_norms(w.to(device), ins.to(device), outs.to(device))
        assert torch.equal(got.cpu(), oracle.float_score(w, ins, outs))


@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    w = torch.zeros(shape, device=device)
    w_prev, w_next = torch.ones(shape[1], 2, device=device), torch.ones(2, shape[0], device=device)
    got = lap_ext.score(w_prev, w, w_next)
    assert got.shape == shape and got.dtype == torch.float32


@each_dtype
def test_neighbors_of_other_dtypes(dtype: torch.dtype, device: str) -> None:
    """The norms are float64 whatever the neighbors' dtypes; w decides the score's."""
    w = torch.randn(5, 6, dtype=torch.float64).to(dtype)
    for other in (torch.float16, torch.float64, torch.bfloat16):
        w_prev, w_next = torch.randn(6, 3).to(other), torch.randn(4, 5).to(other)
        ins, outs = map(
            oracle.root, (oracle.row_squared_norms(w_prev), oracle.col_squared_norms(w_next))
        )
        got = lap_ext.score(w_prev.to(device), w.to(device), w_next.to(device))
        assert torch.equal(got.cpu(), oracle.float_score(w, ins, outs))


def test_norms_may_be_float32(device: str) -> None:
    """in_norm and out_norm of a lower precision mean their exact values."""
    w, ins, outs = torch.randn(5, 6), torch.rand(6), torch.rand(5)
    got = lap_ext.score_from_norms(w.to(device), ins.to(device), outs.to(device))
    expected = oracle.float_score(w, ins.double(), outs.double())
    assert torch.equal(got.cpu(), expected)
