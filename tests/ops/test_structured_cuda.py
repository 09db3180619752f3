# SPDX-License-Identifier: MIT
"""The CUDA kernels of structures: the reference's bits, its errors, and nothing that waits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.ops import reference, schema
from tests.helpers import structured_cases as cases
from tests.helpers.parameters import each_dtype, needs_cuda
from tests.helpers.structured_cases import Case, case, same_bits, variants

pytestmark = needs_cuda

DEVICE = "cuda"
NM = [  # shape, groups, keep, of, rows
    ((64, 512), 1, 2, 4, False),
    ((7, 96), 1, 4, 8, False),
    ((3, 99), 1, 2, 3, False),
    ((5, 160), 1, 3, 32, False),
    ((2, 3000), 1, 700, 1500, False),
    ((40, 8, 3, 3), 1, 2, 4, False),
    ((64, 1100), 1, 2, 4, True),
    ((80, 67), 1, 9, 40, True),
    ((12, 8, 3, 3), 3, 2, 4, True),
]
BLOCKS = [  # shape, groups, block
    ((256, 640), 1, (16, 16)),
    ((33, 70), 1, (16, 16)),
    ((9, 1100), 1, (4, 8)),
    ((300, 70), 1, (300, 1)),
    ((9, 40), 1, (2, 32)),
    ((5, 3000), 1, (2, 1025)),
    ((12, 10, 3, 3), 2, (4, 4)),
    ((12, 7, 4), 1, (5, 2)),
]


def moved(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def on_device(op: str) -> Any:
    """The operator by its CUDA kernel, for arguments on a CPU; what it changes is copied back."""

    def run(*args: Any) -> Tensor | None:
        there = [moved(x) for x in args]
        found: Tensor | None = getattr(schema, op)(*there)
        if found is None:
            args[0].copy_(there[0])
        return None if found is None else found.cpu()

    return run


OPERATORS = ("nm_mask", "transposable_mask", "block_sums_", "block_mask")
CUDA: Any = SimpleNamespace(**{op: on_device(op) for op in OPERATORS})


def agree(op: Any, x: Case, *args: Any) -> None:
    found, expected = op(CUDA, x, *args), op(reference, x, *args)
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for got, right in pairs:
        same_bits(got, right)


def tiles(kernels: Any, x: Case) -> Tensor:
    found: Tensor = kernels.transposable_mask(*x.weight, True, x.mask, x.finite)
    return found


@each_dtype
def test_patterns_and_blocks_of_every_shape(dtype: torch.dtype) -> None:
    for shape, groups, keep, of, rows in NM:
        for x in variants(case(shape, dtype, groups)):
            agree(cases.nm_mask, x, keep, of, rows)
    for shape, groups, block in BLOCKS:
        for x in variants(case(shape, dtype, groups)):
            agree(cases.blocks, x, block, True)


@each_dtype
@pytest.mark.parametrize("name", list(cases.HOSTILE))
def test_hostile_values(name: str, dtype: torch.dtype) -> None:
    hostile = cases.HOSTILE[name](case((16, 72), dtype))
    for x in variants(replace(hostile, w=hostile.w.to(dtype))):
        agree(cases.every_operator, x)
        agree(tiles, x)


@each_dtype
@pytest.mark.parametrize("layout", list(cases.LAYOUTS))
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    for x in variants(case((8, 12, 3, 3), dtype, 2)):
        laid = replace(x, w=cases.LAYOUTS[layout](x.w))
        agree(cases.every_operator, laid)
        agree(tiles, laid)
    shifted = torch.randn(1 + 16 * 72).to(dtype)[1:].view(16, 72)  # no word begins at an element
    agree(cases.every_operator, replace(case((16, 72), dtype), w=shifted))


def test_rows_in_pieces_give_the_same_sums() -> None:
    x = case((26, 50))
    for block in ((4, 4), (4, 16), (4, 50)):
        whole = torch.zeros(8, -(-50 // block[1]), dtype=torch.float64, device=DEVICE)
        pieces = torch.zeros_like(whole)
        weight = [moved(y) for y in x.weight]
        schema.block_sums_(whole, *weight, block, 0, 13, True, None, True)
        for top, bottom in ((0, 1), (1, 12), (12, 13), (13, 20), (20, 26)):
            part = (weight[0][top:bottom], weight[1][top:bottom], weight[2], 1)
            schema.block_sums_(pieces, *part, block, top, 13, True, None, True)
        assert torch.equal(whole, pieces)


@pytest.mark.parametrize("bad", ["weight", "score", "row_norm", "col_norm"])
@pytest.mark.parametrize("op", ["nm_mask", "transposable_mask", "block_sums_"])
def test_errors_are_those_of_the_reference(op: str, bad: str) -> None:
    """And sums are as they were."""
    x = case((8, 40))
    w, rows, cols = x.w.clone(), x.rows.clone(), x.cols.clone()
    w.view(-1)[[77, 200]] = torch.nan if bad in ("weight", "score") else 1.0
    rows[5] = -1.0 if bad == "row_norm" else 1.0
    cols[33] = torch.inf if bad == "col_norm" else 1.0
    weight = (w, rows[:0] if bad == "score" else rows, cols, 1)
    sums = torch.ones(2, 10, dtype=torch.float64)
    calls: dict[str, tuple[Any, ...]] = {
        "nm_mask": (*weight, 2, 4, False, None, True),
        "transposable_mask": (*weight, True, None, True),
        "block_sums_": (sums, *weight, (4, 4), 0, 8, True, None, True),
    }
    said = []
    for kernels in (CUDA, reference):
        with pytest.raises(LapValueError) as raised:
            schema.call(getattr(kernels, op), *calls[op])
        error = raised.value
        said.append((error.expected, error.got, error.cure, error.option, error.argument))
    assert said[0] == said[1] and said[0][0]
    there = [moved(y) for y in calls["block_sums_"]]
    with pytest.raises(LapValueError):
        schema.call(schema.block_sums_, *there)
    assert torch.equal(there[0].cpu(), sums)


def test_unchecked_calls_can_be_captured() -> None:
    x = case((16, 72))
    weight = [moved(y) for y in x.weight]
    sums = torch.zeros(4, 5, dtype=torch.float64, device=DEVICE)

    def run() -> list[Tensor]:
        sums.zero_()
        schema.block_sums_(sums, *weight, (4, 16), 0, 16, True, None, False)
        return [
            schema.nm_mask(*weight, 2, 4, False, None, False),
            schema.transposable_mask(*weight, True, None, False),
            schema.block_mask(sums > 1, [16, 72], (4, 16), 0, 16, None),
            sums.clone(),
        ]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))
