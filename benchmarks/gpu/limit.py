# SPDX-License-Identifier: MIT
"""Step "limit": the table of floors, each call's time and its multiple of the floor.

A row's floor is the time of a copy that reads and writes as many bytes as the call must, timed the
same way in the same run. Results are checked before they are timed. check_finite=False is what is
judged: it is the kernels and nothing else; with the check comes one wait for the device, whose time
stands beside.
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
from lap_ext.ops import schema

BUDGET_S = 0.2
BESIDE = 5  # repeats of what stands beside
DTYPES = (torch.float32, torch.bfloat16)


class Copies:
    """B: bytes per second of copy_, read and written together; by their number, timed once each."""

    def __init__(self, device: Device, timer: Timer) -> None:
        self._device, self._timer = device, timer
        self.found: dict[int, float] = {}

    def bytes_per_s(self, moved: int) -> float:
        """Measures a copy that reads half of them and writes half."""
        if moved not in self.found:
            source = torch.ones(max(moved // 8, 1), device=self._device.device)
            target = torch.empty_like(source)
            repeats = self._device.sizes.repeats
            stats = self._timer.alone(partial(target.copy_, source), repeats)
            self.found[moved] = 2 * nbytes(source) / stats.median
            del source, target
            self._device.free()
        return self.found[moved]


def row(
    target: floors.Target,
    what: dict[str, Any],
    stats: Stats,
    moved: int,
    bytes_per_s: float,
) -> dict[str, Any]:
    """Makes one line of the table."""
    found = asdict(floors.verdict(target, stats.median, moved, bytes_per_s))
    found.update(quartiles=[stats.q1, stats.q3], bytes_per_s=moved / stats.median)
    found["copy_bytes_per_s"] = bytes_per_s
    return {"call": target.call, **what, "bytes": moved, **found}


def run(device: Device, limit_s: float, save: Save) -> None:
    """Measures all rows; saves one by one."""
    del limit_s  # the parent keeps it
    device.require_kernels()
    timer = device.timer(BUDGET_S)
    copies = Copies(device, timer)
    table: list[dict[str, Any]] = []
    save({"copy_bytes_per_s": copies.bytes_per_s(2 * device.sizes.copied)})

    def add(target: floors.Target, what: dict[str, Any], stats: Stats, moved: int) -> None:
        table.append(row(target, what, stats, moved, copies.bytes_per_s(moved)))
        save({"rows": table})

    for shape in device.sizes.sides:
        for dtype in DTYPES:
            _weights(device, timer, shape, dtype, add)
            device.free()
    small: list[dict[str, Any]] = []
    for layer in device.sizes.small:
        small.append(_small(device, *layer))
        save({"small": small})
    for several in (_list, _model):
        for dtype in DTYPES:
            several(device, timer, dtype, add)
            device.free()


Add = Callable[[floors.Target, dict[str, Any], Stats, int], None]


def _weights(
    device: Device, timer: Timer, shape: tuple[int, int], dtype: torch.dtype, add: Add
) -> None:
    """Times score, mask, prune_ and neighbor_norms of one large weight."""
    repeats = device.sizes.repeats
    w = device.normal(shape, 0, dtype)
    n, item = w.numel(), w.element_size()
    norms = device.uniform(shape[1], 1), device.uniform(shape[0], 2)
    what: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
    score = partial(lap_ext.score_from_norms, w, *norms, check_finite=False)
    scores = score()
    moved = floors.floor_bytes("score", n, item)
    add(floors.SCORE, what, timer.alone(score, repeats), moved)
    for sparsity in cases.SPARSITIES:
        keep = cases.keep_of(sparsity, n)
        mask = partial(lap_ext.mask_from_norms, w, *norms, keep=keep)
        checks.is_top([mask()], [scores], keep)
        here = {**what, "sparsity": sparsity}
        stats = timer.alone(partial(mask, check_finite=False), repeats)
        here["checked_s"] = timer.alone(mask, min(BESIDE, repeats)).median
        add(floors.MASK, here, stats, floors.floor_bytes("mask", n, item))
    del scores
    device.free()
    for sparsity in cases.SPARSITIES:
        keep = cases.keep_of(sparsity, n)

        def prune(x: Tensor, keep: int = keep) -> Tensor:
            return lap_ext.prune_from_norms_(x, *norms, keep=keep, check_finite=False)

        expected = lap_ext.mask_from_norms(w, *norms, keep=keep)
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
    norms_of = partial(lap_ext.neighbor_norms, w_prev, w, w_next, check_finite=False)
    add(floors.NORMS, what, timer.alone(norms_of, repeats), nbytes(w_prev, w_next))


def _list(device: Device, timer: Timer, dtype: torch.dtype, add: Add) -> None:
    """Times topk_mask over the scores of a model."""
    count, each = device.sizes.tensors, device.sizes.per_tensor
    scores = [device.normal((each + t,), t, dtype).abs_() for t in range(count)]
    n = sum(x.numel() for x in scores)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, n)
    call = partial(lap_ext.topk_mask, scores, keep=keep, check_finite=False)
    kept = sum(int(mask.count_nonzero()) for mask in call())
    checks.require(kept == keep, f"expected {keep} kept, got {kept}")
    what = {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [count, each],
        "sparsity": cases.DEFAULT_SPARSITY,
    }
    moved = floors.floor_bytes("topk_mask", n, scores[0].element_size())
    add(floors.TOPK, what, timer.alone(call, device.sizes.repeats), moved)


def _model(device: Device, timer: Timer, dtype: torch.dtype, add: Add) -> None:
    """Times global_mask of a model's layers, as lap_ext.prune calls it (it checks)."""
    count, side = device.sizes.layers, device.sizes.layer
    w = [device.normal((side, side), t, dtype) for t in range(count)]
    rows, cols = ([device.uniform(side, s + t) for t in range(count)] for s in (100, 200))
    n = sum(x.numel() for x in w)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, n)
    ranked = partial(schema.call, schema.global_mask, w, rows, cols, [1] * count, keep, [])
    kept = sum(int(mask.count_nonzero()) for mask in ranked(True))
    checks.require(kept == keep, f"expected {keep} kept, got {kept}")
    what: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [count, side, side],
        "sparsity": cases.DEFAULT_SPARSITY,
        "checked_s": timer.alone(partial(ranked, True), min(BESIDE, device.sizes.repeats)).median,
    }
    stats = timer.alone(partial(ranked, False), device.sizes.repeats)
    moved = floors.floor_bytes("global_mask", n, w[0].element_size())
    add(floors.GLOBAL, what, stats, moved)


def _small(device: Device, channels: int, side: int) -> dict[str, Any]:
    """Counts launches of a small mask, and times it in a graph: norms given, and neighbors."""
    shape = (channels, channels, side, side)
    w_prev, w, w_next = (device.normal(shape, i, torch.float32) for i in range(3))
    norms = device.uniform(channels, 1), device.uniform(channels, 2)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, w.numel())
    given = partial(lap_ext.mask_from_norms, w, *norms, keep=keep, check_finite=False)
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
