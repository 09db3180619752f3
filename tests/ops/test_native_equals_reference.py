# SPDX-License-Identifier: MIT
"""Native == reference, bit for bit, op by op.

Each op is called once through the dispatcher and once as its reference in plain PyTorch. (Both also
meet the oracles elsewhere; here a difference names the op and not the layer.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lap_ext.ops import reference, schema
from tests.helpers import layer_cases as cases
from tests.helpers.parameters import each_dtype, each_threads

SHAPE_IDS = pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda s: s.name)


def moved(x: Any, device: str) -> Any:
    """Tensors, also inside lists, on a device."""
    if isinstance(x, list):
        return [moved(part, device) for part in x]
    return x.to(device) if isinstance(x, Tensor) else x


def both(op: str, device: str, *args: Any) -> None:
    """The native kernel on the device against the reference on the CPU."""
    native = getattr(schema, op)(*moved(list(args), device))
    plain = getattr(reference, op)(*args)
    pairs = [(native, plain)] if isinstance(plain, Tensor) else zip(native, plain, strict=True)
    for got, expected in pairs:
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert got.is_contiguous()
        assert torch.equal(got.cpu(), expected), op


@each_dtype
@SHAPE_IDS
def test_squared_norms(shape: cases.Shape, dtype: torch.dtype, device: str) -> None:
    w, *_ = cases.random_layer(shape, dtype)
    for layout in cases.layouts_of(w.dim()):
        laid = cases.LAYOUTS[layout](w)
        both("row_squared_norms", device, laid, True, "w_prev")
        both("col_squared_norms", device, laid, shape.groups, True, "w_next")


@each_dtype
@SHAPE_IDS
@pytest.mark.parametrize("magnitude", [1.0, 1e-18, 1e25, 1e-38])
def test_score_and_mask(
    shape: cases.Shape, magnitude: float, dtype: torch.dtype, device: str
) -> None:
    w, ins, outs = cases.random_layer(shape, dtype)
    kinds = (shape.groups, shape.transposed, True)
    keep, eligible = w.numel() // 3, torch.rand(w.shape) < 0.8
    for layout in cases.layouts_of(w.dim()):
        laid = cases.LAYOUTS[layout](w)
        both("score", device, laid, ins * magnitude, outs, *kinds)
        for mask in (None, eligible):
            both("mask", device, laid, ins * magnitude, outs * magnitude, keep, mask, *kinds)


@each_threads
@pytest.mark.parametrize("name", list(cases.HOSTILE))
def test_hostile_data(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    w = cases.hostile(name, 131 * 1009, torch.float32).view(131, 1009)
    ins, outs = torch.rand(1009, dtype=torch.float64), torch.rand(131, dtype=torch.float64)
    both("score", "cpu", w, ins, outs, 1, False, True)
    for keep in (w.numel() // 100, w.numel() // 2):
        both("mask", "cpu", w, ins, outs, keep, None, 1, False, True)
        both("topk_mask", "cpu", [w[:100].clone(), w[100:].clone()], keep, [], True)
        both("kth_largest", "cpu", [w[:100].clone(), w[100:].clone()], keep, True)


@each_dtype
def test_not_finite_and_unchecked(dtype: torch.dtype, device: str) -> None:
    """check_finite=False: NaN and inf rank by their bits without the sign, as in the reference."""
    w = torch.randn(33, 65, dtype=torch.float64).to(dtype)
    w[3, 4:7], w[20, 1], w[32, 64] = float("inf"), -float("inf"), float("nan")
    ins, outs = torch.rand(65, dtype=torch.float64), torch.rand(33, dtype=torch.float64) + 0.1
    for keep in (0, 1, 4, 5, 6, 1000, w.numel()):
        got = schema.mask(*moved([w, ins, outs], device), keep, None, 1, False, False)
        assert int(got.sum()) == keep
        if 5 <= keep:
            assert got.cpu()[~torch.isfinite(w)].all()
        both("mask", device, w, ins, outs, keep, None, 1, False, False)
