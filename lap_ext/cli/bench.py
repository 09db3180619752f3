# SPDX-License-Identifier: MIT
"""lap-ext bench: times lap_ext.mask on this machine against baselines.

    lap_ext      lap_ext.mask(w_prev, w, w_next)
    baselines    |w| * ||w_prev[i]|| * ||w_next[:, o]|| in eager PyTorch, then topk, kthvalue or a
                 stable sort

The weights are random; their neighbors have as many weights (those of a convolution are 1x1).
Results are compared first. The two calls are timed in pairs, one right after the other, by
torch.utils.benchmark, so that a machine that slows down slows both; ratio = median over the pairs
of (baseline's time / lap_ext's time). Memory is the peak of one call above what was in use before:
of the process, or of the CUDA allocator.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import lap_ext
from lap_ext._text import columns
from lap_ext.checkpoint.files import DTYPES, open_directory
from lap_ext.checkpoint.structure import structure_of
from lap_ext.cli import models
from lap_ext.cli.output import Progress, result
from lap_ext.errors import LapValueError
from lap_ext.ops import check

Shape = tuple[tuple[int, ...], torch.dtype]
Call = Callable[[], Tensor]

_STANDARD = ((500, 500), (512, 512, 3, 3), (4096, 4096))  # the paper's net, ResNet-18, Llama-2-7B
_MOST_SHAPES, _MOST_WEIGHTS = 4, 1 << 26  # a sort takes six times the weights' bytes
_PAIRS, _LEAST_PAIRS, _SECONDS = 9, 3, 6.0  # of a comparison
_BUSY = 0.5  # load average of other programs that is worth a word
_SAMPLE_S = 0.02  # seconds that a sample lasts at least
_TOLERANCE = 1e-5  # relative, of scores with float32 norms
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Baseline:
    """Holds one comparison; seconds are medians, memory is in bytes, or None if not measurable."""

    name: str
    seconds: float
    lap_ext_seconds: float
    ratio: float  # of the seconds of pairs, the median and the quartiles
    q1: float
    q3: float
    pairs: int
    differ: int  # weights that only one of the two keeps: their scores are at the threshold
    memory: int | None
    lap_ext_memory: int | None


def bench(options: Any, is_directory: bool) -> int:
    """Measures standard shapes, or those of the layers of a model."""
    device = _device(options.device)
    load = _load()
    with Progress(not options.quiet) as progress, torch.no_grad():
        counts = _shapes(options, is_directory, progress)
        fitting = [x for x in counts if torch.Size(x[0]).numel() <= _MOST_WEIGHTS]
        chosen = fitting[:_MOST_SHAPES]
        progress.step("bench", len(_SELECT) * sum(torch.Size(x[0]).numel() for x in chosen))
        cases, ratios = [], []
        for shape, kind in chosen:
            baselines = _measured(shape, kind, device, options.sparsity, progress)
            ratios += [x.ratio for x in baselines]
            case = {"shape": list(shape), "dtype": str(kind).removeprefix("torch.")}
            rest = {"layers": counts[shape, kind], "baselines": [asdict(x) for x in baselines]}
            cases.append(case | rest)
    shown = {"model": options.model, "sparsity": options.sparsity, "device": str(device)}
    shown |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    shown |= {"load": load, "cores": os.cpu_count()}
    shown |= {
        "lap_ext": asdict(lap_ext.info()),
        "left_out": len(counts) - len(chosen),
        "cases": cases,
    }
    brief = f"{len(cases)} shapes: the baselines take "
    brief += f"{_short(min(ratios))} to {_short(max(ratios))} times the time of lap_ext"
    result(options, shown, _text(shown), brief if cases else "no shapes")
    return 0


def _load() -> float | None:
    """Reads the load average of the last minute; None where there is none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _device(given: str) -> torch.device:
    """Makes a device that is available."""
    try:
        return torch.empty(0, device=given).device
    except (RuntimeError, AssertionError) as error:  # torch's first line says why
        why = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise LapValueError(
            "{argument} to be one that torch has", f"{given!r}: {why}", argument="device"
        ) from None


def _shapes(options: Any, is_directory: bool, progress: Progress) -> Mapping[Shape, int]:
    """Counts the layers of each shape; shapes with the most weights in all layers come first."""
    if options.model is None:
        for name in ("checkpoint", "input"):
            if getattr(options, name):
                raise LapValueError("a MODEL with {argument}", "none", argument=name)
        return {(shape, torch.float32): 1 for shape in _STANDARD}
    counts: Counter[Shape] = Counter()
    if is_directory:
        progress.step("trace")
        files = open_directory(Path(options.model))
        given = models.examples(options.input)
        known = structure_of(files, None, given, options.on_unsupported)
        stored = {x: DTYPES[copies[0][0].entry.dtype] for x, copies in known.copies.items()}
        counts.update((x.shape, stored[name]) for name, x in known.topology.layers.items())
    else:
        layers = models.traced(options, progress)[1].layers.values()
        counts.update((x.shape, x.weight.dtype) for x in layers)
    shapes = [x for x in counts if len(x[0]) > 1 and torch.Size(x[0]).numel() > 1]
    shapes.sort(key=lambda x: -counts[x] * torch.Size(x[0]).numel())
    return {x: counts[x] for x in shapes}


# --- baselines ----------------------------------------------------------------------------------


def _eager(w_prev: Tensor, w: Tensor, w_next: Tensor) -> Tensor:
    """Scores w with norms of its dtype, float32 at least."""
    kind = torch.promote_types(w.dtype, torch.float32)
    rest = tuple(range(2, w.dim()))
    into = torch.linalg.vector_norm(w_prev, dim=(1, *rest), dtype=kind)
    out = torch.linalg.vector_norm(w_next, dim=(0, *rest), dtype=kind)
    ones = [1] * len(rest)
    return w.abs() * into.view(1, -1, *ones) * out.view(-1, 1, *ones)


def _first(scores: Tensor, index: Tensor) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[index] = True
    return mask.view(scores.shape)


def _topk(scores: Tensor, keep: int) -> Tensor:
    return _first(scores, scores.flatten().topk(keep, sorted=False).indices)


def _kthvalue(scores: Tensor, keep: int) -> Tensor:
    return scores >= scores.flatten().kthvalue(scores.numel() - keep + 1).values


def _sort(scores: Tensor, keep: int) -> Tensor:
    """Sorts stably: of equal scores the lower index is kept, as in lap_ext."""
    return _first(scores, scores.flatten().sort(descending=True, stable=True).indices[:keep])


_SELECT: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "topk": _topk,
    "kthvalue": _kthvalue,
    "sort": _sort,
}


# --- measuring ----------------------------------------------------------------------------------


def _measured(
    shape: tuple[int, ...],
    kind: torch.dtype,
    device: torch.device,
    sparsity: float,
    progress: Progress,
) -> list[Baseline]:
    """Compares lap_ext with every baseline on one shape."""
    beside = (shape[1], shape[0], *[1] * (len(shape) - 2))
    weights = [
        torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(device, kind)
        for seed, size in enumerate((beside, shape, beside))
    ]
    w_prev, w, w_next = weights
    keep = max(1, check.keep_count(sparsity, None, w.numel()))

    def ours() -> Tensor:
        return lap_ext.mask(w_prev, w, w_next, keep=keep)

    mine, scores = ours(), lap_ext.score(w_prev, w, w_next)
    if not torch.equal(mine, _sort(scores, keep)):
        raise RuntimeError(f"lap_ext.mask is not the sort of lap_ext.score on {list(shape)}")
    used, baselines = _extra_memory(ours, device), []
    for name, select in _SELECT.items():

        def other(select: Callable[[Tensor, int], Tensor] = select) -> Tensor:
            return select(_eager(w_prev, w, w_next), keep)

        differ = _difference(name, mine, other(), scores)
        samples = _pairs(ours, other)
        q1, ratio, q3 = statistics.quantiles([b / a for a, b in samples], method="inclusive")
        seconds = [statistics.median(x) for x in zip(*samples, strict=True)]
        memory = _extra_memory(other, device), used
        baselines.append(
            Baseline(name, seconds[1], seconds[0], ratio, q1, q3, len(samples), differ, *memory)
        )
        progress.advance(w.numel())
    return baselines


def _difference(name: str, mine: Tensor, other: Tensor, scores: Tensor) -> int:
    """Counts the weights that only one keeps; RuntimeError if one is far from the threshold."""
    off = scores[mine ^ other]
    threshold = scores[mine].min()
    if off.numel() and bool(((off - threshold).abs() > _TOLERANCE * threshold).any()):
        raise RuntimeError(f"lap_ext.mask and {name} keep different weights of {list(mine.shape)}")
    return off.numel()


def _pairs(ours: Call, other: Call) -> list[tuple[float, float]]:
    """Measures (seconds of ours, seconds of the other) in turns."""
    timers = [
        Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for call in (ours, other)
    ]
    begin = time.monotonic()
    samples: list[tuple[float, float]] = []
    while len(samples) < _PAIRS:
        turn = (0, 1) if len(samples) % 2 else (1, 0)
        took = {x: timers[x].blocked_autorange(min_run_time=_SAMPLE_S).median for x in turn}
        samples.append((took[0], took[1]))
        if len(samples) >= _LEAST_PAIRS and time.monotonic() - begin > _SECONDS:
            break
    return samples


def _extra_memory(call: Call, device: torch.device) -> int | None:
    """Measures the peak of a call in bytes above what was in use; None if that is not possible."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux") or device.type != "cpu":
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # else the call would reuse freed memory, which is not counted
    try:
        _RESET.write_text("5")  # resets the peak
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Reads a field of this process's status, in bytes."""
    lines = _STATUS.read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{field}:"))


# --- what is shown ------------------------------------------------------------------------------


def _text(shown: Mapping[str, Any]) -> str:
    rows = [
        (
            "layer",
            "baseline",
            "ms",
            "lap_ext ms",
            "ratio",
            "quartiles",
            "MB",
            "lap_ext MB",
            "differ",
        )
    ]
    for case in shown["cases"]:
        name = f"{'x'.join(map(str, case['shape']))} {case['dtype']}"
        for x in case["baselines"]:
            times = _short(x["seconds"] * 1e3), _short(x["lap_ext_seconds"] * 1e3)
            ratio = _short(x["ratio"]), f"{_short(x['q1'])} to {_short(x['q3'])}"
            used = [_megabytes(x[key]) for key in ("memory", "lap_ext_memory")]
            rows.append((name, x["name"], *times, *ratio, *used, str(x["differ"])))
            name = ""
    kernels = str(lap_ext.info())
    lines = [
        kernels,
        f"sparsity {shown['sparsity']:g} on {shown['device']}, {shown['threads']} threads",
        "",
    ]
    if (shown["load"] or 0) > _BUSY:
        lines[-1:] = [
            f"The machine is busy: load average {shown['load']:.1f} on {shown['cores']} cores "
            "before measuring.",
            "Other programs take time from both sides, unevenly: repeat this when they are done.",
            "",
        ]
    lines += [columns(rows, right=range(2, len(rows[0]))), ""]
    lines += [
        "ratio: the baseline's time / lap_ext's, above 1 where lap_ext is faster; median of pairs",
        "of calls timed side by side. Where the quartiles include 1, neither is measurably faster.",
        "MB: peak above the weights. differ: weights that only one keeps, with threshold scores.",
    ]
    if shown["left_out"]:
        lines.append(f"{shown['left_out']} more shapes of the model were left out.")
    return "\n".join(lines)


def _megabytes(size: int | None) -> str:
    return "not known" if size is None else _short(size / 1e6)


def _short(number: float) -> str:
    """Writes three digits, or all before the decimal point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
