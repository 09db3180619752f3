# SPDX-License-Identifier: MIT
"""Weights for the operators of structures, hostile ones among them, and what the operators give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from lap_ext.ops import schema
from tests.helpers.parameters import DTYPES


@dataclass(frozen=True)
class Case:
    """A weight [R, C, *K] with norms of rows [R] and columns [groups * C]; scores: no rows."""

    w: Tensor
    rows: Tensor
    cols: Tensor
    groups: int = 1
    mask: Tensor | None = None

    @property
    def weight(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The first arguments of the operators."""
        return self.w, self.rows, self.cols, self.groups

    @property
    def finite(self) -> bool:
        return all(bool(x.isfinite().all()) for x in (self.w, self.rows, self.cols))

    @property
    def scores(self) -> Case:
        return replace(self, rows=self.rows[:0])


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, groups: int = 1) -> Case:
    """A random weight with its norms."""
    rows, cols = torch.rand(shape[0]).double() + 0.1, torch.rand(groups * shape[1]).double() + 0.1
    return Case(torch.randn(shape).to(dtype), rows, cols, groups)


def variants(x: Case) -> Iterator[Case]:
    """With its norms and as scores, of all weights and of some."""
    for mask in (None, torch.rand(x.w.shape) < 0.7):
        yield replace(x, mask=mask)
        yield replace(x, mask=mask).scores


def nm_mask(kernels: ModuleType, x: Case, keep: int, of: int, rows: bool) -> Tensor:
    found: Tensor = kernels.nm_mask(*x.weight, keep, of, rows, x.mask, x.finite)
    return found


def transposable_mask(kernels: ModuleType, x: Case, squared: bool) -> Tensor:
    found: Tensor = kernels.transposable_mask(*x.weight, squared, x.mask, x.finite)
    return found


def blocks(
    kernels: ModuleType,
    x: Case,
    block: tuple[int, int],
    squared: bool,
    first: int = 0,
    height: int = 0,
) -> list[Tensor]:
    """The sums of the blocks of rows first, first + 1, ..., and a mask of the larger ones."""
    height = height or x.w.shape[0] // x.groups
    last = first + x.w.shape[0] - 1
    down = last // height * -(-height // block[0]) + last % height // block[0] + 1
    sums = torch.zeros(down, -(-x.w.shape[1] // block[1]), dtype=torch.float64)
    kernels.block_sums_(sums, *x.weight, block, first, height, squared, x.mask, x.finite)
    kept = sums > sums.nanmedian()
    return [sums, kernels.block_mask(kept, list(x.w.shape), block, first, height, x.mask)]


def every_operator(kernels: ModuleType, x: Case) -> list[Tensor]:
    """What all operators give for a weight whose rows (of a group) and columns 4 divides."""
    return [
        nm_mask(kernels, x, 2, 4, False),
        nm_mask(kernels, x, 2, 4, True),
        nm_mask(kernels, x, 1, 2, False),
        nm_mask(kernels, x, 3, 4, True),
        transposable_mask(kernels, x, True),
        transposable_mask(kernels, x, False),
        *blocks(kernels, x, (4, 16), True),
        *blocks(kernels, x, (3, 5), False),
    ]


def one_of_seven(x: Tensor, value: float) -> Tensor:
    changed = x.clone()
    changed.view(-1)[::7] = value
    return changed


def _rows(x: Case, factor: Tensor | float) -> Case:
    return replace(x, rows=x.rows * factor)


HOSTILE: dict[str, Callable[[Case], Case]] = {
    "zeros": lambda x: replace(x, w=x.w * (torch.rand(x.w.shape) < 0.4)),
    "zero_norms": lambda x: replace(x, rows=one_of_seven(x.rows, 0.0)),
    "signed_zeros": lambda x: replace(x, w=x.w * 0.0),
    "few_values": lambda x: replace(x, w=x.w.sign(), cols=torch.ones_like(x.cols)),
    "subnormal_weights": lambda x: replace(x, w=x.w * (torch.finfo(x.w.dtype).tiny / 8)),
    "smallest_weights": lambda x: replace(x, w=x.w * (torch.finfo(x.w.dtype).tiny * 2.0**-14)),
    "subnormal_scores": lambda x: _rows(replace(x, w=x.w * 2.0**-10), 2.0**-116),
    "vanishing_scores": lambda x: _rows(replace(x, cols=x.cols * 2.0**-100), 2.0**-100),
    "some_vanish": lambda x: _rows(replace(x, w=one_of_seven(x.w, 2.0**-140)), 2.0**-20),
    "overflowing_scores": lambda x: _rows(replace(x, cols=x.cols * 2.0**60), 2.0**90),
    "some_overflow": lambda x: _rows(replace(x, w=one_of_seven(x.w, 6e4)), 2.0**112),
    "wide_norms": lambda x: _rows(x, torch.logspace(-99, 99, len(x.rows)).double()),
    "endless_norms": lambda x: _rows(replace(x, cols=one_of_seven(x.cols * 1e300, 0.0)), 1e300),
    "largest": lambda x: replace(x, w=x.w.sign() * torch.finfo(x.w.dtype).max),
    "infinite": lambda x: replace(x, w=one_of_seven(x.w, math.inf)),
    "minus_infinite": lambda x: replace(x, w=one_of_seven(x.w, -math.inf)),
    "nan": lambda x: replace(x, w=one_of_seven(x.w, math.nan)),
    "infinite_norm": lambda x: replace(x, cols=one_of_seven(x.cols, math.inf)),
    "nan_norm": lambda x: replace(x, rows=one_of_seven(x.rows, math.nan)),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every_second": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


def results() -> list[Tensor]:
    """What the operators give for hostile weights of every dtype, without NaNs, which differ."""
    found = []
    for dtype in DTYPES:
        for change in HOSTILE.values():
            for x in variants(change(case((16, 200), dtype))):
                found += every_operator(schema, x)
    return [x.nan_to_num(-1.0) if x.is_floating_point() else x for x in found]


def same_bits(got: Tensor, right: Tensor) -> None:
    """Both are alike, and contiguous; all NaNs count as one."""
    assert got.dtype == right.dtype and got.shape == right.shape and got.is_contiguous()
    both = got, right
    if got.dtype != torch.bool:
        both = tuple(x.masked_fill(x.isnan(), torch.nan).view(torch.int64) for x in both)
    assert torch.equal(*both)
