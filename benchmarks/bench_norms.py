# SPDX-License-Identifier: MIT
"""squared norms: the squared norms of a weight's rows and columns from one reading.

Whole-model pruning needs both of every layer. Its baselines read the weight twice, or write it out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, cases, checks
from benchmarks.rows import Bench, Contest, Target, nbytes
from lap_ext.ops import schema

DTYPES = (torch.float32, torch.bfloat16)
APART = "row_squared_norms, col_squared_norms"
LEAST = 1.5  # times faster than the two operators


def run(bench: Bench) -> None:
    """Measures the two largest layers, in the two dtypes that weights mostly have."""
    for layer in cases.layers(bench.quick)[-2:]:
        for dtype in DTYPES:
            w = layer.make(bench.device, dtype)[1]
            ours = partial(schema.squared_norms, w, 1, True, "w")
            judged = w.numel() >= cases.BIG and w.device.type == "cpu"  # CUDA: two passes
            bench.measure(
                "norms",
                f"{layer.name}, {str(dtype).removeprefix('torch.')}",
                "squared_norms",
                ours,
                [
                    Contest(APART, partial(_apart, w), checks.equal),
                    Contest("eager float64", partial(baselines.eager_squared_norms, w), _close),
                    Contest("vector_norm twice", partial(baselines.vector_norms, w), _close_norms),
                ],
                n=w.numel(),
                moved=(nbytes(w), nbytes(*ours())),
                targets=[Target(LEAST, (APART,))] if judged else [],
            )


def _apart(w: Tensor) -> tuple[Tensor, Tensor]:
    return schema.row_squared_norms(w, True, "w"), schema.col_squared_norms(w, 1, True, "w")


def _close(ours: Any, theirs: Any) -> None:
    for mine, baseline in zip(ours, theirs, strict=True):
        checks.close(mine, baseline)


def _close_norms(ours: Any, theirs: Any) -> None:
    _close([squared_norm.sqrt().float() for squared_norm in ours], theirs)
