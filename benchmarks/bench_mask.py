# SPDX-License-Identifier: MIT
"""mask and mask_from_norms of real layers, norms of the neighbors included on both sides in mask.

mask               reads w_prev, w, w_next once, writes one byte a weight
mask_from_norms  reads w once, writes one byte a weight; norms are given
torch.gt           the same reading and writing with a threshold already known: the floor
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import lap_ext
from benchmarks import baselines, cases, checks
from benchmarks.cases import Layer, Weights
from benchmarks.rows import Bench, Contest, Target, nbytes
from benchmarks.timing import Call

FASTEST_OF = ("topk", "kthvalue", "sort")
SLOW_ONES_UP_TO = 4_000_000  # elements; above, sort runs at one sparsity only: k does not matter
AT_MOST = 2.0  # times torch.gt


def run(bench: Bench) -> None:
    """Measures all layers at all sparsities, then the 16-bit types."""
    for layer in cases.layers(bench.quick):
        weights = layer.make(bench.device)
        w_prev, w, w_next = weights
        scores = lap_ext.score(*weights)
        checks.close(scores, baselines.eager_score(*weights))
        norms = lap_ext.neighbor_norms(w_prev, w, w_next)
        for sparsity in cases.SPARSITIES:
            _one(bench, layer, weights, norms, scores, sparsity)
    _sixteen_bits(bench, cases.layers(bench.quick)[-1])


def _one(
    bench: Bench,
    layer: Layer,
    weights: Weights,
    norms: tuple[Tensor, Tensor],
    scores: Tensor,
    sparsity: float,
) -> None:
    _, w, _ = weights
    keep = cases.keep_of(sparsity, w.numel())
    ours = partial(lap_ext.mask, *weights, keep=keep)
    mask = ours()
    threshold = checks.is_top([mask], [scores], keep)
    from_norms = partial(lap_ext.mask_from_norms, w, *norms, keep=keep)
    checks.equal(mask, from_norms())
    exact = checks.same_choice([scores], threshold, 0)
    about = checks.same_choice([scores], threshold, None)  # a threshold keeps all that tie
    contests = [
        Contest(name, call, exact if name in {"topk", "sort"} else about)
        for name, call in _eager(weights, keep, sparsity).items()
    ]
    if sparsity == cases.DEFAULT_SPARSITY:
        public = partial(baselines.public_code, *weights, keep)
        contests.append(Contest("public code", public, about))
        contests.append(Contest("prune.l1_unstructured", _l1(weights, keep), exact))
    ready = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    floor = Contest("torch.gt", partial(torch.gt, w, threshold, out=ready))
    big = w.numel() >= cases.BIG
    at_floor = [Target(1 / AT_MOST, ("torch.gt",))] if big else []
    bench.measure(
        "mask",
        layer.name,
        "mask",
        ours,
        [*contests, floor],
        n=w.numel(),
        moved=(nbytes(*weights), w.numel()),
        sparsity=sparsity,
        targets=[Target(layer.faster, FASTEST_OF), *at_floor],
    )
    bench.measure(
        "mask",
        layer.name,
        "mask_from_norms",
        from_norms,
        [floor],
        n=w.numel(),
        moved=(nbytes(w), w.numel()),
        sparsity=sparsity,
        targets=at_floor,
    )


def _eager(weights: Weights, keep: int, sparsity: float) -> dict[str, Call]:
    """Returns calls of the eager score with each selection that works here."""
    w = weights[1]
    once = sparsity == cases.DEFAULT_SPARSITY
    names = ["topk", "kthvalue"]
    if once or w.numel() <= SLOW_ONES_UP_TO:
        names.append("sort")
    if once and w.numel() <= baselines.QUANTILE_MAX:
        names.append("quantile")
    if w.device.type == "cpu":
        names.append("numpy.partition")

    def path(name: str) -> Tensor:
        return baselines.SELECTIONS[name](baselines.eager_score(*weights), keep)

    return {name: partial(path, name) for name in names}


def _l1(weights: Weights, keep: int) -> Call:
    return lambda: baselines.l1_unstructured(weights[1], baselines.eager_score(*weights), keep)


def _sixteen_bits(bench: Bench, layer: Layer) -> None:
    """Compares bfloat16 and float16 with float32, the same layer."""
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, layer.n)
    wide = layer.make(bench.device)
    wide_norms = lap_ext.neighbor_norms(*wide)
    for dtype in (torch.bfloat16, torch.float16):
        weights = layer.make(bench.device, dtype)
        norms = lap_ext.neighbor_norms(*weights)
        name = str(dtype).removeprefix("torch.")
        targets = [Target(1.0, ("float32",))] if dtype == torch.bfloat16 else []
        mask = lap_ext.mask(*weights, keep=keep)
        checks.is_top([mask], [lap_ext.score(*weights)], keep)
        checks.equal(mask, lap_ext.mask_from_norms(weights[1], *norms, keep=keep))
        for call, ours, baseline, read in (
            (
                "mask",
                partial(lap_ext.mask, *weights, keep=keep),
                partial(lap_ext.mask, *wide, keep=keep),
                nbytes(*weights),
            ),
            (
                "mask_from_norms",
                partial(lap_ext.mask_from_norms, weights[1], *norms, keep=keep),
                partial(lap_ext.mask_from_norms, wide[1], *wide_norms, keep=keep),
                nbytes(weights[1]),
            ),
        ):
            bench.measure(
                "mask",
                f"{layer.name}, {name}",
                call,
                ours,
                [Contest("float32", baseline)],
                n=layer.n,
                moved=(read, layer.n),
                sparsity=cases.DEFAULT_SPARSITY,
                targets=targets,
            )
