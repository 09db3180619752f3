# SPDX-License-Identifier: MIT
"""The device under test: sizes, timing, graphs, streams, launches; with stand-ins on the CPU.

A rehearsal (--device cpu --rehearse) runs the same lines on small tensors, so that the first hour
on a GPU does not go to typing errors. Its stand-ins: the clock for events, calling again for
replaying a graph, nothing for a stream, operators for launches. Its numbers mean nothing and are
not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

import lap_ext
from benchmarks.cases import SEED
from benchmarks.checks import require
from benchmarks.timing import Call, Timer

_HEAD_START = 20_000_000  # cycles that the GPU sleeps while the host enqueues: about 11 ms
REPLAYS = 50  # of a graph, in one measurement


class GpuTimer(Timer):
    """The benchmarks' timer, with a head start for the host.

    The GPU sleeps before the first event: else a call of several launches would be charged for the
    time in which Python enqueues them.
    """

    def _sample_cuda(self, call: Call) -> tuple[float, Any]:
        assert self._flush is not None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, result


@dataclass(frozen=True)
class Sizes:
    """Elements of the tensors that are measured and compared."""

    copied: int  # bytes
    sides: tuple[tuple[int, int], ...]  # of the large weights, [rows, cols]
    tensors: int  # in the list of scores
    per_tensor: int
    layers: int  # of the model that is ranked as one
    layer: int  # rows and columns of each
    small: tuple[tuple[int, int], ...]  # [channels, window's side] of the small layers
    baselines: tuple[int, int]
    issue_75599: int
    issue_77049: int
    huge: int  # more than 2^31
    hostile: int
    repeats: int


FULL = Sizes(
    copied=1 << 30,
    sides=((8192, 12288), (16384, 16384)),  # 100.7 M, 268 M
    tensors=200,
    per_tensor=5_368_709,  # 1.07 G in all
    layers=24,
    layer=4096,  # 403 M in all
    small=((64, 3), (128, 3), (256, 3), (512, 3)),
    baselines=(8192, 8192),
    issue_75599=100_000_000,
    issue_77049=402_653_184,  # 1.5 GiB of float32
    huge=(1 << 31) + (1 << 20) + 3,
    hostile=300_007,
    repeats=9,
)
SMALL = Sizes(
    copied=1 << 20,
    sides=((64, 96),),
    tensors=5,
    per_tensor=1003,
    layers=3,
    layer=40,
    small=((8, 3),),
    baselines=(64, 64),
    issue_75599=10_000,
    issue_77049=10_000,
    huge=4099,
    hostile=2049,
    repeats=1,
)


@dataclass(frozen=True)
class Device:
    """Where a step runs."""

    device: torch.device
    rehearse: bool

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def sizes(self) -> Sizes:
        """Large ones on a GPU."""
        return SMALL if self.rehearse else FULL

    def require_kernels(self) -> None:
        """Raises on a GPU whose kernels are not loaded: PyTorch's would be measured instead."""
        info = lap_ext.info()
        require(not self.cuda or info.cuda_usable, f"CUDA kernels not loaded: {info}")

    def timer(self, budget_s: float) -> Timer:
        """Makes a timer by CUDA events, or by the clock."""
        return GpuTimer(self.device, budget_s) if self.cuda else Timer(self.device, budget_s)

    def normal(self, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
        """Draws weights on the device: a billion of them take too long on the CPU."""
        generator = torch.Generator(self.device).manual_seed(SEED + seed)
        drawn = torch.empty(shape, dtype=torch.float32, device=self.device)
        return drawn.normal_(0.0, 0.02, generator=generator).to(dtype)

    def uniform(self, n: int, seed: int) -> Tensor:
        """Draws norms: float64 in [0.5, 1.5)."""
        generator = torch.Generator(self.device).manual_seed(SEED + seed)
        drawn = torch.empty(n, dtype=torch.float64, device=self.device)
        return drawn.uniform_(0.5, 1.5, generator=generator)

    def wait(self) -> None:
        """Waits until all enqueued work is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Gives cached memory back before the next large tensors."""
        if self.cuda:
            torch.cuda.empty_cache()

    def other_stream(self) -> AbstractContextManager[Any]:
        """Makes a stream that is not the default one."""
        if not self.cuda:
            return nullcontext()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def peak(self, call: Callable[[], object]) -> int | None:
        """Measures the bytes that a call holds at most, beyond what was held; None on the CPU."""
        if not self.cuda:
            call()
            return None
        self.wait()
        self.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before


class Graph:
    """A call captured once and replayed; on the CPU it is called again.

    replay() changes the tensors of `result` in place, as a CUDA graph does.
    """

    def __init__(self, device: Device, call: Call) -> None:
        self._device = device
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        for _ in range(2):  # what a first call does (loading, allocating) cannot be captured
            with device.other_stream():
                call()
            device.wait()
        if not device.cuda:
            self.result = call()
            return
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.result = call()

    def replay(self) -> None:
        """Runs it once more."""
        if self._graph is not None:
            self._graph.replay()
            return
        for old, new in zip(_tensors(self.result), _tensors(self._call()), strict=True):
            old.copy_(new)

    def seconds(self) -> float:
        """Measures the seconds of one replay, among many in a row."""
        if self._graph is None:
            return self._device.timer(0.0).alone(self._call, 1).median
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            self._graph.replay()
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        for _ in range(REPLAYS):
            self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / REPLAYS


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def launches(device: Device, call: Call) -> list[str]:
    """Names what a call runs on the device: kernels, memory sets and copies (CPU: operators)."""
    call()
    device.wait()
    activity = torch.profiler.ProfilerActivity
    chosen = [activity.CPU, activity.CUDA] if device.cuda else [activity.CPU]
    with torch.profiler.profile(activities=chosen) as profile:
        call()
        device.wait()
    events = profile.events() or []
    if device.cuda:
        return [e.name for e in events if e.device_type == torch.profiler.DeviceType.CUDA]
    return [e.name for e in events if e.name.startswith(("lap_ext::", "aten::"))]


def once(calls: Sequence[Call], again: bool) -> Call:
    """Makes a call that runs the next of `calls` each time, for what changes its tensors.

    again: from the start once all have run, as a clock needs it that repeats short calls.
    """
    remaining = cycle(calls) if again else iter(calls)

    def call() -> Any:
        return next(remaining)()

    return call


def clones(x: Tensor, count: int, call: Callable[[Tensor], Any]) -> Call:
    """Makes a call on a fresh copy of x each time; on a GPU count times at most."""
    return once([partial(call, x.clone()) for _ in range(count)], not x.is_cuda)
