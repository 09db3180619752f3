# SPDX-License-Identifier: MIT
"""Each call once, for a profiler of counters.

    ncu --profile-from-start off python -m benchmarks.gpu.one_call

The calls have run before: what is counted has its kernels loaded and its memory at hand.
"""

from __future__ import annotations

import torch

import lap_ext
from benchmarks import cases
from benchmarks.gpu.device import Device


def run(device: Device) -> None:
    """Calls once, then once more between the profiler's start and stop."""
    shape = device.sizes.sides[0]
    w = device.normal(shape, 0, torch.float32)
    half, across = w.bfloat16(), w.T.contiguous()
    norms = device.uniform(shape[1], 1), device.uniform(shape[0], 2)
    keep = cases.keep_of(cases.DEFAULT_SPARSITY, w.numel())

    def calls() -> None:
        lap_ext.mask_from_norms(w, *norms, keep=keep, check_finite=False)
        lap_ext.mask_from_norms(half, *norms, keep=keep, check_finite=False)
        lap_ext.score_from_norms(w, *norms, check_finite=False)
        lap_ext.neighbor_norms(across, w, across, check_finite=False)

    calls()
    device.wait()
    if not device.cuda:
        return
    torch.cuda.cudart().cudaProfilerStart()
    calls()
    device.wait()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    run(Device(torch.device("cuda"), rehearse=False))
