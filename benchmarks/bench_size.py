# SPDX-License-Identifier: MIT
"""Time against size, for the plot: mask_from_norms of square layers, float32, one sparsity."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import lap_ext
from benchmarks import baselines, cases, checks
from benchmarks.rows import Bench, Contest, nbytes

SIDES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_SIDES = SIDES[:6]


def run(bench: Bench) -> None:
    """Measures one row a size."""
    for side in QUICK_SIDES if bench.quick else SIDES:
        w = cases.normal((side, side), cases.SEED, bench.device)
        in_norm, out_norm = (
            cases.normal((side,), cases.SEED + i, bench.device).abs() + 1.0 for i in (1, 2)
        )
        _size(bench, w, in_norm, out_norm)


def _size(bench: Bench, w: Tensor, in_norm: Tensor, out_norm: Tensor) -> None:
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, w.numel())
    ours = partial(lap_ext.mask_from_norms, w, in_norm, out_norm, keep=keep)
    scores = lap_ext.score_from_norms(w, in_norm, out_norm)
    threshold = checks.is_top([ours()], [scores], keep)
    ready = torch.empty(w.shape, dtype=torch.bool, device=w.device)

    def path(name: str) -> Tensor:
        score = baselines.eager_score_from_norms(w, in_norm, out_norm)
        return baselines.SELECTIONS[name](score, keep)

    names = ["topk", "kthvalue"] + (["numpy.partition"] if w.device.type == "cpu" else [])
    contests = [
        Contest(
            name,
            partial(path, name),
            checks.same_choice([scores], threshold, 0 if name == "topk" else None),
        )
        for name in names
    ]
    contests.append(Contest("torch.gt", partial(torch.gt, w, threshold, out=ready)))
    bench.measure(
        "size",
        f"{w.shape[0]}x{w.shape[1]}",
        "mask_from_norms",
        ours,
        contests,
        n=w.numel(),
        moved=(nbytes(w), w.numel()),
        sparsity=cases.DEFAULT_SPARSITY,
    )
