# SPDX-License-Identifier: MIT
"""Peak memory of one call beyond its inputs, in a process of its own.

    extra = peak of the resident set in the call - resident set before it

The inputs have been touched and the libraries warmed up on a small case before; the kernel's peak
counter (VmHWM) is reset. Where it cannot be, ru_maxrss serves, which may miss an extra smaller than
what preparing the inputs took. On CUDA: torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import lap_ext
from benchmarks import baselines, cases
from benchmarks.machine import ROOT
from benchmarks.rows import nbytes

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LAYER_BASELINES = {
    "topk": baselines.topk,
    "kthvalue": baselines.kthvalue,
    "sort": baselines.sort,
}
LAYER_CALLS = ("mask", *_LAYER_BASELINES, "public code")
LIST_CALLS = ("topk_mask", "cat + kthvalue", "prune.global_unstructured")


def measure(call: str, case: str, sparsity: float, quick: bool, device: str) -> dict[str, int]:
    """Measures {"w", "masks", "extra"} in bytes, in a new process."""
    args = ["--call", call, "--case", case, "--sparsity", str(sparsity), "--device", device]
    args += ["--threads", str(torch.get_num_threads())] + (["--quick"] if quick else [])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *args],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _layer_call(
    call: str, w_prev: Tensor, w: Tensor, w_next: Tensor, keep: int
) -> Callable[[], object]:
    weights = w_prev, w, w_next
    if call == "mask":
        return partial(lap_ext.mask, *weights, keep=keep)
    if call == "public code":
        return partial(baselines.public_code, *weights, keep)
    select = _LAYER_BASELINES[call]
    return lambda: select(baselines.eager_score(*weights), keep)


def _list_call(call: str, scores: list[Tensor], keep: int) -> Callable[[], object]:
    if call == "topk_mask":
        return partial(lap_ext.topk_mask, scores, keep=keep)
    functions: dict[str, Callable[[list[Tensor], int], object]] = {
        "cat + kthvalue": baselines.cat_kthvalue,
        "prune.global_unstructured": baselines.global_unstructured,
    }
    return partial(functions[call], scores, keep)


def _prepared(args: argparse.Namespace) -> tuple[list[Tensor], Callable[[], object]]:
    """Prepares (the tensors to prune, the call), after a warm-up on small tensors."""
    device = torch.device(args.device)
    if args.call in LIST_CALLS:
        tiny = [torch.rand(300, 300, device=device) for _ in range(2)]
        _list_call(args.call, tiny, 100)()
        scores = cases.score_list(args.quick, device)
        keep = cases.keep_of(args.sparsity, sum(x.numel() for x in scores))
        return scores, _list_call(args.call, scores, keep)
    tiny = [torch.rand(300, 300, device=device) for _ in range(3)]
    _layer_call(args.call, tiny[0], tiny[1], tiny[2], 100)()
    layer = next(x for x in cases.layers(args.quick) if x.name == args.case)
    weights = layer.make(device)
    keep = cases.keep_of(args.sparsity, layer.n)
    return [weights[1]], _layer_call(args.call, *weights, keep)


def _status(field: str) -> int:
    """Reads a field of /proc/self/status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def extra(call: Callable[[], object], device: torch.device) -> int:
    """Runs the call once; its peak above what was in use before."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory would serve the call, unseen
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _RESET.write_text("5")
        before = _status("VmRSS")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        result = call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    result = call()
    after = _status("VmHWM")
    del result
    return after - before


def main() -> None:
    """Prints {"w", "masks", "extra"} for one call."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--call", required=True, choices=(*LAYER_CALLS, *LIST_CALLS))
    parser.add_argument("--case", required=True, help="name of a layer; any for lists")
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        pruned, call = _prepared(args)
        beyond = extra(call, torch.device(args.device))
    masks = sum(x.numel() for x in pruned)
    print(json.dumps({"w": nbytes(*pruned), "masks": masks, "extra": beyond}))


if __name__ == "__main__":
    main()
