# SPDX-License-Identifier: MIT
"""Step "limit": the table of floors. B first, then each call's time and its multiple of the floor.

Results are checked before they are timed. check_finite=False is what is judged: it is the kernels and
nothing else; with the check comes one wait for the device, whose time stands beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lap_ext
from benchmarks import cases, checks
from benchmarks.gpu import floors
from benchmarks.gpu.device import Device, Graph, clones, launches
from benchmarks.gpu.steps import Save
from benchmarks.rows import nbytes
from benchmarks.timing import Stats, Timer

BUDGET_S = 0.2
DTYPES = (torch.float32, torch.bfloat16)


def copy_bandwidth(device: Device, timer: Timer) -> float:
    """B: bytes read and written per second by copy_ of a large tensor."""
    source = torch.ones(device.sizes.copied // 4, device=device.device)
    target = torch.empty_like(source)
    stats = timer.alone(partial(target.copy_, source), device.sizes.repeats)
    return 2 * nbytes(source) / stats.median


def row(
    target: floors.Target,
    what: dict[str, Any],
    stats: Stats,
    moved: int,
    bytes_per_s: float,
) -> dict[str, Any]:
    """One line of the table."""
    found = asdict(floors.verdict(target, stats.median, moved, bytes_per_s))
    found.update(quartiles=[stats.q1, stats.q3], bytes_per_s=moved / stats.median)
    return {"call": target.call, **what, "bytes": moved, **found}


def run(device: Device, limit_s: float, save: Save) -> None:
    """All rows; saved one by one."""
    del limit_s  # the parent keeps it
    timer = device.timer(BUDGET_S)
    bytes_per_s = copy_bandwidth(device, timer)
    table: list[dict[str, Any]] = []
    save({"copy_bytes_per_s": bytes_per_s})

    def add(target: floors.Target, what: dict[str, Any], stats: Stats, moved: int) -> None:
        table.append(row(target, what, stats, moved, bytes_per_s))
        save({"rows": table})

    for shape in device.sizes.sides:
        for dtype in DTYPES:
            _weights(device, timer, shape, dtype, add)
            device.free()
    for dtype in DTYPES:
        _list(device, timer, dtype, add)
        device.free()
    small = [_small(device, *layer) for layer in device.sizes.small]
    save({"small": small})


Add = Callable[[floors.Target, dict[str, Any], Stats, int], None]


def _weights(
    device: Device, timer: Timer, shape: tuple[int, int], dtype: torch.dtype, add: Add
) -> None:
    """score, mask, prune_ and factors of one large weight."""
    repeats = device.sizes.repeats
    w = device.normal(shape, 0, dtype)
    n, item = w.numel(), w.element_size()
    norms = device.uniform(shape[1], 1), device.uniform(shape[0], 2)
    what: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
    score = partial(lap_ext.score_from_factors, w, *norms, check_finite=False)
    scores = score()
    moved = floors.floor_bytes("score", n, item)
    add(floors.SCORE, what, timer.alone(score, repeats), moved)
    for sparsity in cases.SPARSITIES:
        keep = cases.keep_of(sparsity, n)
        mask = partial(lap_ext.mask_from_factors, w, *norms, keep=keep)
        checks.is_top([mask()], [scores], keep)
        here = {**what, "sparsity": sparsity}
        stats = timer.alone(partial(mask, check_finite=False), repeats)
        here["checked_s"] = timer.alone(mask, repeats).median
        add(floors.MASK, here, stats, floors.floor_bytes("mask", n, item))
    del scores
    device.free()
    for sparsity in cases.SPARSITIES:
        keep = cases.keep_of(sparsity, n)

        def prune(x: Tensor, keep: int = keep) -> Tensor:
            return lap_ext.prune_from_factors_(x, *norms, keep=keep, check_finite=False)

        expected = lap_ext.mask_from_factors(w, *norms, keep=keep)
        pruned = w.clone()
        checks.equal(prune(pruned), expected)
        checks.equal(pruned, w.masked_fill(~expected, 0.0))
        del expected, pruned
        stats = timer.alone(clones(w, repeats + 2, prune), repeats)
        here = {**what, "sparsity": sparsity}
        add(floors.PRUNE, here, stats, floors.floor_bytes("prune_", n, item))
        device.free()
    w_prev = device.normal((shape[1], shape[0]), 3, dtype)
    w_next = device.normal((shape[1], shape[0]), 4, dtype)
    factors = partial(lap_ext.factors, w_prev, w, w_next, check_finite=False)
    add(floors.FACTORS, what, timer.alone(factors, repeats), nbytes(w_prev, w_next))


def _list(device: Device, timer: Timer, dtype: torch.dtype, add: Add) -> None:
    """topk_mask over the scores of a model."""
    count, each = device.sizes.tensors, device.sizes.per_tensor
    scores = [device.normal((each + t,), t, dtype).abs_() for t in range(count)]
    n = sum(x.numel() for x in scores)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, n)
    call = partial(lap_ext.topk_mask, scores, keep, check_finite=False)
    kept = sum(int(mask.count_nonzero()) for mask in call())
    checks.require(kept == keep, f"expected {keep} kept, got {kept}")
    what = {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [count, each],
        "sparsity": cases.DEFAULT_SPARSITY,
    }
    moved = floors.floor_bytes("topk_mask", n, scores[0].element_size())
    add(floors.TOPK, what, timer.alone(call, device.sizes.repeats), moved)


def _small(device: Device, channels: int, side: int) -> dict[str, Any]:
    """Launches of a small mask and its time in a graph, norms given; with neighbors beside."""
    shape = (channels, channels, side, side)
    w_prev, w, w_next = (device.normal(shape, i, torch.float32) for i in range(3))
    norms = device.uniform(channels, 1), device.uniform(channels, 2)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, w.numel())
    given = partial(lap_ext.mask_from_factors, w, *norms, keep=keep, check_finite=False)
    whole = partial(lap_ext.mask, w_prev, w, w_next, keep=keep, check_finite=False)
    found: dict[str, Any] = {"shape": list(shape)}
    for name, call in (("given_norms", given), ("with_neighbors", whole)):
        names = launches(device, call)
        graph = Graph(device, call)
        graph.replay()
        device.wait()
        checks.equal(graph.result, call())
        found[name] = {"launches": len(names), "names": names, "graph_s": graph.seconds()}
    one = found["given_norms"]
    found["reached"] = floors.small_verdict(one["launches"], one["graph_s"])
    return found
