# SPDX-License-Identifier: MIT
"""Extra memory of mask and topk_mask, and of what they replace; each in a process of its own."""

from __future__ import annotations

from benchmarks import cases, memory
from benchmarks.rows import Bench, MemoryRow

OURS = ("mask", "topk_mask")


def run(bench: Bench) -> None:
    """Measures ours at every sparsity, baselines at one."""
    layer = cases.layers(bench.quick)[-1].name
    scores = "list of 12 tensors"
    for calls, case in ((memory.LAYER_CALLS, layer), (memory.LIST_CALLS, scores)):
        for call in calls:
            ours = call in OURS
            every = ours and not bench.quick  # a process takes seconds to start
            for sparsity in cases.SPARSITIES if every else (cases.DEFAULT_SPARSITY,):
                found = memory.measure(call, case, sparsity, bench.quick, str(bench.device))
                bench.add_memory(
                    MemoryRow(
                        case, call, sparsity, found["w"], found["masks"], found["extra"], ours
                    )
                )
