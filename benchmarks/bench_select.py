# SPDX-License-Identifier: MIT
"""topk_mask of a list of tensors, kth_largest, and selection from data that is hard to select from.

topk_mask    reads the scores once, writes one byte a score
kth_largest  reads the scores once
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import lap_ext
from benchmarks import baselines, cases, checks
from benchmarks.cases import Hard
from benchmarks.rows import Bench, Contest, Target, nbytes


def run(bench: Bench) -> None:
    """Measures the list, the single value, the hard data."""
    scores = cases.score_list(bench.quick, bench.device)
    for sparsity in cases.SPARSITIES:
        _list(bench, scores, sparsity)
    del scores
    side = 1024 if bench.quick else 4096
    flat = cases.normal((side * side,), cases.SEED, bench.device).abs_()
    for sparsity in cases.SPARSITIES:
        _kth(bench, flat, sparsity)
    for hard in cases.HARD:
        _hard(bench, hard, side)


def _list(bench: Bench, scores: list[Tensor], sparsity: float) -> None:
    n = sum(score.numel() for score in scores)
    keep = cases.keep_of(sparsity, n)
    ours = partial(lap_ext.topk_mask, scores, keep=keep)
    threshold = checks.is_top(lap_ext.topk_mask(scores, keep=keep), scores, keep)
    exact = checks.same_choice(scores, threshold, 0)
    about = checks.same_choice(scores, threshold, None)
    # half a minute a call: little is left to chance in it
    pairs = None if bench.quick else 2 if sparsity == cases.DEFAULT_SPARSITY else 1
    contests = [
        Contest("cat + kthvalue", partial(baselines.cat_kthvalue, scores, keep), about),
        Contest("cat + topk", partial(baselines.cat_topk, scores, keep), exact),
        Contest(
            "prune.global_unstructured",
            partial(baselines.global_unstructured, scores, keep),
            exact,
            pairs,
        ),
    ]
    bench.measure(
        "select",
        f"{len(scores)} tensors, {n / 1e6:.0f} M",
        "topk_mask",
        ours,
        contests,
        n=n,
        moved=(nbytes(*scores), n),
        sparsity=sparsity,
        targets=[Target(30, ("cat + kthvalue",)), Target(60, ("prune.global_unstructured",))],
    )


def _kth(bench: Bench, flat: Tensor, sparsity: float) -> None:
    n = flat.numel()
    keep = cases.keep_of(sparsity, n)

    def kthvalue() -> Tensor:
        return flat.kthvalue(n - keep + 1).values

    bench.measure(
        "select",
        f"{n / 1e6:.1f} M scores",
        "kth_largest",
        partial(lap_ext.kth_largest, flat, keep),
        [Contest("kthvalue", kthvalue, checks.equal)],
        n=n,
        moved=(nbytes(flat), 0),
        sparsity=sparsity,
    )


def _hard(bench: Bench, hard: Hard, side: int) -> None:
    """Measures mask_from_norms with norms of ones: the scores are |w|."""
    w = hard.change(cases.normal((side, side), cases.SEED, bench.device)).contiguous()
    scores = w.abs()
    keep = cases.keep_of(hard.sparsity, w.numel())
    eligible = w != 0 if hard.half_eligible else None
    ours = partial(lap_ext.mask_from_norms, w, None, None, keep=keep, mask=eligible)
    threshold = checks.is_top([ours()], [scores], keep, eligible)
    ready = torch.empty(w.shape, dtype=torch.bool, device=w.device)

    def eager_topk() -> Tensor:
        return baselines.topk(w.abs(), keep)

    def eager_kthvalue() -> Tensor:
        return baselines.kthvalue(w.abs(), keep)

    bench.measure(
        "select",
        f"{side}x{side}, {hard.name}",
        "mask_from_norms",
        ours,
        [
            Contest("torch.gt", partial(torch.gt, w, threshold, out=ready)),
            Contest("topk", eager_topk, checks.same_choice([scores], threshold, 0)),
            Contest("kthvalue", eager_kthvalue, checks.same_choice([scores], threshold, None)),
        ],
        n=w.numel(),
        moved=(nbytes(w) + (w.numel() if hard.half_eligible else 0), w.numel()),
        sparsity=hard.sparsity,
    )
