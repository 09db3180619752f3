# SPDX-License-Identifier: MIT
"""score (norms of the neighbors included) and score_from_norms (norms given).

score_from_norms moves what w.clone() moves; score also reads both neighbors.
"""

from __future__ import annotations

from functools import partial

import torch

import lap_ext
from benchmarks import baselines, cases, checks
from benchmarks.cases import Weights
from benchmarks.rows import Bench, Contest, Target, nbytes

AT_MOST = 1.2  # times w.clone()


def run(bench: Bench) -> None:
    """Measures all layers; sparsity does not matter here."""
    layers = cases.layers(bench.quick)
    for layer in layers:
        weights = layer.make(bench.device)
        w = weights[1]
        norms = lap_ext.neighbor_norms(*weights)
        from_norms = partial(lap_ext.score_from_norms, w, *norms)
        checks.equal(lap_ext.score(*weights), from_norms())
        clone = Contest("w.clone()", w.clone)
        contests = [
            clone,
            Contest("eager formula", partial(baselines.eager_score, *weights), checks.close),
            Contest(
                "eager in place", partial(baselines.eager_score_in_place, *weights), checks.close
            ),
        ]
        if layer is layers[-1] and not bench.quick:  # it compiles for half a minute
            contests += _compiled(bench, weights)
        at_floor = [Target(1 / AT_MOST, ("w.clone()",))] if w.numel() >= cases.BIG else []
        bench.measure(
            "score",
            layer.name,
            "score",
            partial(lap_ext.score, *weights),
            contests,
            n=w.numel(),
            moved=(nbytes(*weights), nbytes(w)),
            targets=at_floor,
        )
        bench.measure(
            "score",
            layer.name,
            "score_from_norms",
            from_norms,
            [clone],
            n=w.numel(),
            moved=(nbytes(w), nbytes(w)),
            targets=at_floor,
        )


def _compiled(bench: Bench, weights: Weights) -> list[Contest]:
    """Compiles the formula, if there is a compiler."""
    call = partial(baselines.compiled_score(), *weights)
    try:
        with torch.no_grad():  # as the timer: another grad mode would compile it anew
            call()
    except Exception as error:  # whatever the compiler's back end raises
        bench.note(f"torch.compile was left out: {type(error).__name__}")
        return []
    return [Contest("torch.compile", call, checks.close)]
