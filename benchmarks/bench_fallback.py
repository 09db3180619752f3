# SPDX-License-Identifier: MIT
"""The pure-PyTorch fallback (lap_ext.ops.reference, called directly) against the eager topk path.

Its result must be the native one, bit for bit.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

import lap_ext
from benchmarks import baselines, cases, checks
from benchmarks.cases import Layer, Weights
from benchmarks.rows import Bench, Contest, Target, nbytes
from lap_ext.ops import reference


def run(bench: Bench) -> None:
    """Measures all layers at all sparsities, and the list of scores at one."""
    for layer in cases.layers(bench.quick):
        weights = layer.make(bench.device)
        for sparsity in cases.SPARSITIES:
            _layer(bench, layer, weights, sparsity)
    _list(bench)


def mask(weights: Weights, keep: int) -> Tensor:
    """Runs lap_ext.mask with the kernels that serve where no native library is."""
    w_prev, w, w_next = weights
    in_norm = reference.norm([reference.row_squared_norms(w_prev, True, "w_prev")])
    out_norm = reference.norm([reference.col_squared_norms(w_next, 1, True, "w_next")])
    return reference.mask(w, in_norm, out_norm, keep, None, 1, False, True)


def _layer(bench: Bench, layer: Layer, weights: Weights, sparsity: float) -> None:
    keep = cases.keep_of(sparsity, layer.n)
    native = lap_ext.mask(*weights, keep=keep)
    checks.equal(mask(weights, keep), native)

    def eager() -> Tensor:
        return baselines.topk(baselines.eager_score(*weights), keep)

    bench.measure(
        "fallback",
        layer.name,
        "mask, pure PyTorch",
        partial(mask, weights, keep),
        [Contest("topk", eager)],
        n=layer.n,
        moved=(nbytes(*weights), layer.n),
        sparsity=sparsity,
        targets=[Target(1.0, ("topk",))],
    )


def _list(bench: Bench) -> None:
    scores = cases.score_list(bench.quick, bench.device)
    n = sum(score.numel() for score in scores)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, n)
    ours = partial(reference.topk_mask, scores, keep, [], True)
    checks.equal(ours(), lap_ext.topk_mask(scores, keep=keep))
    bench.measure(
        "fallback",
        f"{len(scores)} tensors, {n / 1e6:.0f} M",
        "topk_mask, pure PyTorch",
        ours,
        [Contest("cat + topk", partial(baselines.cat_topk, scores, keep))],
        n=n,
        moved=(nbytes(*scores), n),
        sparsity=cases.DEFAULT_SPARSITY,
        targets=[Target(1.0, ("cat + topk",))],
    )
