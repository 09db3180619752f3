# SPDX-License-Identifier: MIT
"""energies: the squared norms of a weight's rows and columns from one reading.

Whole-model pruning needs both of every layer. Its rivals read the weight twice, or write it out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, checks, rivals
from benchmarks.rows import Bench, Contest, Target, nbytes
from lap_ext.ops import schema

DTYPES = (torch.float32, torch.bfloat16)
APART = "row_energy, col_energy"
LEAST = 1.5  # times faster than the two operators


def run(bench: Bench) -> None:
    """The two largest layers, in the two dtypes that weights mostly have."""
    for layer in cases.layers(bench.quick)[-2:]:
        for dtype in DTYPES:
            w = layer.make(bench.device, dtype)[1]
            ours = partial(schema.energies, w, 1, True, "w")
            judged = w.numel() >= cases.BIG and w.device.type == "cpu"  # CUDA: two passes
            bench.measure(
                "norms",
                f"{layer.name}, {str(dtype).removeprefix('torch.')}",
                "energies",
                ours,
                [
                    Contest(APART, partial(_apart, w), checks.equal),
                    Contest("eager float64", partial(rivals.eager_energies, w), _close),
                    Contest("vector_norm twice", partial(rivals.vector_norms, w), _close_norms),
                ],
                n=w.numel(),
                moved=(nbytes(w), nbytes(*ours())),
                targets=[Target(LEAST, (APART,))] if judged else [],
            )


def _apart(w: Tensor) -> tuple[Tensor, Tensor]:
    return schema.row_energy(w, True, "w"), schema.col_energy(w, 1, True, "w")


def _close(ours: Any, theirs: Any) -> None:
    for mine, rival in zip(ours, theirs, strict=True):
        checks.close(mine, rival)


def _close_norms(ours: Any, theirs: Any) -> None:
    _close([energy.sqrt().float() for energy in ours], theirs)
