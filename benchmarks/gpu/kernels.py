# SPDX-License-Identifier: MIT
"""Step "kernels": microseconds of every kernel of each call, as torch's profiler sees them.

    {call: {kernel: [launches of a call, median us, largest us],
            "span": [1, median us, largest us]}}

The span is from the first kernel's begin to the last one's end, the gaps between them included. The
L2 cache is overwritten before each call. Norms are given; check_finite=False.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

import lap_ext
from benchmarks import cases
from benchmarks.gpu import ptxas
from benchmarks.gpu.device import Device, clones
from benchmarks.gpu.report import SPAN
from benchmarks.gpu.steps import Save
from benchmarks.timing import Call

REPEATS = 7
WARM_UP = 2
FLUSHED = 128 << 20  # bytes, more than any L2 cache
DTYPES = (torch.float32, torch.bfloat16)
# What overwrites the cache: a kernel of torch's, or a memset. No unchecked call has one.
_FLUSH = ("Memset", "FillFunctor", "aten::zero_")

Table = dict[str, list[float]]


def run(device: Device, limit_s: float, save: Save) -> None:
    """Profiles every call; saves one by one."""
    del limit_s  # the parent keeps it
    device.require_kernels()
    flush = torch.empty(FLUSHED if device.cuda else 1024, dtype=torch.uint8, device=device.device)
    found: dict[str, Table] = {}
    with torch.no_grad():
        for name, call in calls(device):
            found[name] = kernels(device, call, flush)
            save({"calls": found})


def calls(device: Device) -> Iterator[tuple[str, Call]]:
    """Yields names and calls; the tensors of one are freed before the next."""
    for dtype in DTYPES:
        yield from _large(device, device.sizes.sides[0], dtype)
        device.free()
    for channels, side in device.sizes.small:
        shape = (channels, channels, side, side)
        w = device.normal(shape, 0, torch.float32)
        norms = device.uniform(channels, 1), device.uniform(channels, 2)
        keep = cases.keep_of(cases.DEFAULT_SPARSITY, w.numel())
        mask = partial(lap_ext.mask_from_norms, w, *norms, keep=keep, check_finite=False)
        yield f"mask {cases.DEFAULT_SPARSITY} {'x'.join(map(str, shape))}", mask


def _large(
    device: Device, shape: tuple[int, int], dtype: torch.dtype
) -> Iterator[tuple[str, Call]]:
    w = device.normal(shape, 0, dtype)
    norms = device.uniform(shape[1], 1), device.uniform(shape[0], 2)
    what = f"{str(dtype).removeprefix('torch.')} {shape[0]}x{shape[1]}"
    yield f"score {what}", partial(lap_ext.score_from_norms, w, *norms, check_finite=False)
    for sparsity in cases.SPARSITIES:
        keep = cases.keep_of(sparsity, w.numel())
        mask = partial(lap_ext.mask_from_norms, w, *norms, keep=keep, check_finite=False)
        yield f"mask {sparsity} {what}", mask
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, w.numel())
    prune = partial(lap_ext.prune_from_norms_, keep=keep, check_finite=False)
    fresh = clones(w, REPEATS + WARM_UP, lambda x: prune(x, *norms))
    yield f"prune_ {cases.DEFAULT_SPARSITY} {what}", fresh
    del fresh
    across = w.T.contiguous()
    yield (
        f"neighbor_norms {what}",
        partial(lap_ext.neighbor_norms, across, w, across, check_finite=False),
    )
    del across
    scores = w.abs()
    topk = partial(lap_ext.topk_mask, scores, keep=keep, check_finite=False)
    yield f"topk_mask {cases.DEFAULT_SPARSITY} {what}", topk


def kernels(device: Device, call: Call, flush: torch.Tensor) -> Table:
    """Lists one call's kernels (of a rehearsal: its operators)."""
    for _ in range(WARM_UP):
        call()
    activity = [ProfilerActivity.CUDA] if device.cuda else []
    with profile(activities=[ProfilerActivity.CPU, *activity]) as seen:
        for _ in range(REPEATS):
            flush.zero_()
            device.wait()
            call()
            device.wait()
    wanted = DeviceType.CUDA if device.cuda else DeviceType.CPU
    return table([event for event in seen.events() or [] if event.device_type == wanted])


def table(events: Sequence[Any]) -> Table:
    """Sums up the events of all repeats; an overwriting of the cache begins each."""
    times: dict[str, list[float]] = {}
    spans: list[list[Any]] = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        if any(name in event.name for name in _FLUSH):
            spans.append([])
        elif spans:
            spans[-1].append(event.time_range)
            times.setdefault(ptxas.short(event.name), []).append(event.time_range.elapsed_us())
    repeats = max(len(spans), 1)
    found = {
        name: [round(len(us) / repeats, 2), *_middle_and_most(us)] for name, us in times.items()
    }
    whole = [max(x.end for x in span) - span[0].start for span in spans if span]
    return {**found, SPAN: [1, *_middle_and_most(whole)]} if whole else found


def _middle_and_most(us: Sequence[float]) -> list[float]:
    return [round(statistics.median(us), 1), round(max(us), 1)]
