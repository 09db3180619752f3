# SPDX-License-Identifier: MIT
"""Step "bits": every operator gives the CPU's bits, twice the same, in graphs and on other streams.

Data and layouts are those of the tests. The other side is the native CPU library; in a rehearsal,
where that is what is tested, the pure reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lap_ext
from benchmarks import checks
from benchmarks.gpu.device import Device, Graph
from benchmarks.gpu.steps import NotRunError, Save, each
from lap_ext.ops import reference, schema
from tests.helpers import layer_cases as cases

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def run(device: Device, limit_s: float, save: Save) -> None:
    """All checks of this step, independent of each other."""
    del limit_s  # the parent keeps it
    if device.cuda:
        checks.require(lap_ext.info().cuda_usable, f"CUDA kernels not loaded: {lap_ext.info()}")
    each({name: partial(check, device) for name, check in CHECKS.items()}, save)


class Pair:
    """One operator on the device and on the other side; compared bit for bit."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.compared = 0

    def same(self, op: str, *args: Any) -> None:
        """Calls op on both sides with the same arguments (CPU tensors)."""
        here = getattr(schema, op)(*_moved(list(args), self._device.device))
        there = getattr(reference if self._device.rehearse else schema, op)(*args)
        for got, expected in zip(_listed(here), _listed(there), strict=True):
            equal_bits(got.cpu(), expected, op)
            self.compared += 1

    def prune(self, w: Tensor, *args: Any) -> None:
        """prune_, which also changes w: mask and weights."""
        here = _like(w, self._device.device)
        there = _like(w, torch.device("cpu"))
        got = schema.prune_(here, *_moved(list(args), self._device.device))
        expected = (reference if self._device.rehearse else schema).prune_(there, *args)
        equal_bits(got.cpu(), expected, "prune_")
        equal_bits(here.cpu(), there, "prune_'s weights")
        self.compared += 2


def equal_bits(got: Tensor, expected: Tensor, what: str) -> None:
    """Equal, signs of zeros and NaNs included."""
    checks.require(got.dtype == expected.dtype, f"{what}: {got.dtype} for {expected.dtype}")
    checks.require(got.shape == expected.shape, f"{what}: {got.shape} for {expected.shape}")
    if not torch.equal(_bytes(got), _bytes(expected)):
        wrong = (got != expected).sum().item()
        checks.require(False, f"{what}: {wrong} of {got.numel()} values differ from the other side")


def _bytes(x: Tensor) -> Tensor:
    flat = x.contiguous().as_strided((x.numel(),), (1,))  # view() minds the strides of one element
    return flat.view(torch.uint8)


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, list):
        return [_moved(part, device) for part in x]
    return x.to(device) if isinstance(x, Tensor) else x


def _listed(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def _like(w: Tensor, device: torch.device) -> Tensor:
    """The same values and strides on a device, in memory of its own."""
    span = 1 + sum((n - 1) * s for n, s in zip(w.shape, w.stride(), strict=True) if n > 0)
    memory = torch.empty(max(span, 1), dtype=w.dtype, device=device)
    return memory.as_strided(w.shape, w.stride()).copy_(w)


# --- the checks -----------------------------------------------------------------------------------


def layouts(device: Device) -> str:
    """Every shape, dtype and memory layout, ordinary data."""
    torch.manual_seed(1)
    pair = Pair(device)
    for shape in cases.SHAPES:
        for dtype in DTYPES:
            w, ins, outs = cases.random_layer(shape, dtype)
            kinds = shape.groups, shape.transposed, True
            keep, eligible = w.numel() // 3, torch.rand(w.shape) < 0.8
            for name in cases.layouts_of(w.dim()):
                laid = cases.LAYOUTS[name](w)
                pair.same("row_energy", laid, True, "w_prev")
                pair.same("col_energy", laid, shape.groups, True, "w_next")
                for scale in (1.0, 1e-25):
                    pair.same("score", laid, ins * scale, outs, *kinds)
                    pair.same("mask", laid, ins * scale, outs * scale, keep, None, *kinds)
                pair.same("mask", laid, ins, outs, keep, eligible, *kinds)
                pair.prune(laid, ins, outs, keep, eligible, *kinds)
    return f"{pair.compared} results"


def hostile(device: Device) -> str:
    """Ties, zeros of both signs, denormals, sorted and periodic data, every dtype."""
    torch.manual_seed(2)
    pair = Pair(device)
    cols = 1009 if not device.rehearse else 33
    rows = device.sizes.hostile // cols
    for name in cases.HOSTILE:
        for dtype in DTYPES:
            for width in (cols, cols // 8 * 8):  # rows of whole vectors have kernels of their own
                w = cases.hostile(name, rows * width, dtype).view(rows, width)
                ins = torch.rand(width, dtype=torch.float64)
                outs = torch.rand(rows, dtype=torch.float64)
                pair.same("score", w, ins, outs, 1, False, True)
                for keep in (w.numel() // 100, w.numel() // 2):
                    pair.same("mask", w, ins, outs, keep, None, 1, False, True)
                    pair.same("topk_mask", [w[:5].clone(), w[5:].clone()], keep, [], True)
                    pair.same("kth_largest", [w[:5].clone(), w[5:].clone()], keep, True)
    return f"{pair.compared} results"


def large(device: Device) -> str:
    """Shapes of real layers: linear, convolution, grouped, transposed."""
    torch.manual_seed(3)
    pair = Pair(device)
    scale = 1 if not device.rehearse else 32
    shapes = (
        ((4096 // scale, 3072 // scale), 1, False),
        ((512 // scale, 256 // scale, 3, 3), 1, False),
        ((512 // scale, 64 // scale, 3, 3), 4, False),
        ((256 // scale, 512 // scale, 4, 4), 1, True),
        ((1000 // scale, 2047 // scale), 1, False),
    )
    for shape, groups, transposed in shapes:
        for dtype in DTYPES:
            w = torch.randn(shape).to(dtype)
            across, along = shape[1] * groups, shape[0]
            into, out = (along, across) if transposed else (across, along)
            norms = torch.rand(into).double() + 0.5, torch.rand(out).double() + 0.5
            kinds = groups, transposed, True
            pair.same("score", w, *norms, *kinds)
            for part in (2, 10, 100):
                pair.same("mask", w, *norms, w.numel() // part, None, *kinds)
            pair.prune(w, *norms, w.numel() // 10, None, *kinds)
            pair.same("row_energy", w, True, "w_prev")
            pair.same("col_energy", w, groups, True, "w_next")
    return f"{pair.compared} results"


def errors(device: Device) -> None:
    """What is not finite: the same error on both sides, and the same bits without the check."""
    torch.manual_seed(4)
    pair = Pair(device)
    for dtype in DTYPES:
        w = torch.randn(100, 72).to(dtype)
        w[3, 4:7], w[90, 1] = float("inf"), float("nan")
        ins, outs = torch.rand(72).double(), torch.rand(100).double() + 0.1
        for keep in (0, 1, 4, 1000, w.numel()):
            pair.same("mask", w, ins, outs, keep, None, 1, False, False)
        calls: list[Callable[[Tensor], Any]] = [
            lambda x: lap_ext.score(None, x, None),
            lambda x: lap_ext.mask(None, x, None, 0.5),
            lambda x: lap_ext.prune_(None, x, None, 0.5),
            lambda x: lap_ext.factors(x, torch.ones(2, 100).to(x), None),
            lambda x: lap_ext.kth_largest(x, 5),
        ]
        for call in calls:
            texts = [_error(call, x) for x in (w.to(device.device), w)]
            checks.require(texts[0] == texts[1], f"errors differ: {texts}")


def _error(call: Callable[[Tensor], Any], x: Tensor) -> str:
    before = x.clone()
    try:
        call(x)
    except ValueError as error:
        same = torch.equal(x.nan_to_num(), before.nan_to_num())
        checks.require(same, "weights changed although an error was raised")
        return str(error)
    return "no error"


def twice(device: Device) -> None:
    """The same call again and again gives the same bits, ties or not."""
    n = device.sizes.hostile * (20 if device.cuda else 1) // 64 * 64
    for name in ("random", "three_values", "zeros_60"):
        w = cases.hostile(name, n, torch.float32).view(-1, 64).to(device.device)
        first = lap_ext.mask(None, w, None, 0.7)
        for _ in range(5):
            checks.equal(lap_ext.mask(None, w, None, 0.7), first)


def graphs(device: Device) -> None:
    """Captured once, replayed on other data: what an ordinary call gives."""
    side = 1024 if device.cuda else 32
    w, scores = (device.normal((side, side), i, torch.float32) for i in (1, 2))
    norms = device.uniform(side, 3), device.uniform(side, 4)
    keep = side * side // 5
    calls: dict[str, Callable[[], Any]] = {
        "mask": partial(lap_ext.mask, w, w, w, keep=keep, check_finite=False),
        "mask_from_factors": partial(
            lap_ext.mask_from_factors, w, *norms, keep=keep, check_finite=False
        ),
        "score": partial(lap_ext.score, w, w, w, check_finite=False),
        "topk_mask": partial(lap_ext.topk_mask, [w, scores], keep, check_finite=False),
        "kth_largest": partial(lap_ext.kth_largest, scores, keep, check_finite=False),
        "factors": partial(lap_ext.factors, w, w, w, check_finite=False),
    }
    captured = {name: Graph(device, call) for name, call in calls.items()}
    for seed in (5, 6):
        w.copy_(device.normal((side, side), seed, torch.float32))
        scores.copy_(device.normal((side, side), seed + 10, torch.float32))
        for name, graph in captured.items():
            graph.replay()
            device.wait()
            for got, expected in zip(_listed(graph.result), _listed(calls[name]()), strict=True):
                equal_bits(got, expected, f"graph of {name}")


def streams(device: Device) -> None:
    """Work enqueued on a stream of the caller's: data made there is what is read."""
    side = 2048 if device.cuda else 32
    source = device.normal((side, side), 1, torch.float32)
    expected = lap_ext.mask(None, source.neg().mul(3), None, 0.9)
    for _ in range(5):
        with device.other_stream():
            w = source.neg().mul(3)
            got = lap_ext.mask(None, w, None, 0.9, check_finite=False)
            count = got.sum()
        device.wait()
        checks.equal(got, expected)
        checks.require(int(count) == int(expected.sum()), "the count was taken too early")


def devices(device: Device) -> str:
    """Tensors of a second GPU while the first is current."""
    if not device.cuda or torch.cuda.device_count() < 2:
        raise NotRunError("one device only")
    other = torch.device("cuda", 1)
    w = device.normal((512, 512), 1, torch.float32)
    with torch.cuda.device(0):
        there = lap_ext.mask(None, w.to(other), None, 0.9)
        checks.require(there.device == other, f"the mask is on {there.device}")
        checks.equal(there.to(w.device), lap_ext.mask(None, w, None, 0.9))
        checks.require(torch.cuda.current_device() == 0, "the current device was changed")
    return "two devices"


CHECKS: dict[str, Callable[[Device], str | None]] = {
    "graphs": graphs,
    "streams": streams,
    "devices": devices,
    "errors": errors,
    "twice": twice,
    "large": large,
    "layouts": layouts,
    "hostile": hostile,
}
