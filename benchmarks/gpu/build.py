# SPDX-License-Identifier: MIT
"""Steps "build" and "loaded": the native libraries for one GPU, and what ptxas says of the kernels.

setup.py builds in place for the GPU's own architecture (a third of the time of all), with ptxas -v
in the same compilation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu import driver, floors, ptxas
from benchmarks.gpu.device import Device
from benchmarks.gpu.ptxas import Kernel
from benchmarks.gpu.steps import TAIL, NotRunError, Save, run_command


def plan(arch: str) -> tuple[list[str], dict[str, str]]:
    """Returns the build's command and environment."""
    flags = [f"-DCMAKE_CUDA_ARCHITECTURES={arch}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"]
    given = [os.environ["CMAKE_ARGS"]] if os.environ.get("CMAKE_ARGS") else []
    env = {
        "LAP_EXT_BUILD": "require",
        "LAP_EXT_CUDA": "1",
        "CMAKE_ARGS": " ".join([*given, *flags]),
    }
    return [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], env


def run(device: Device, limit_s: float, save: Save) -> None:
    """Builds the libraries; fails on a spill."""
    arch = driver.architecture(device)
    command, env = plan(arch)
    save({"architecture": arch})
    if device.rehearse:
        raise NotRunError("a rehearsal does not build")
    code, output = run_command(command, limit_s - 5, env)
    if code != 0:
        raise RuntimeError(f"the build failed ({code}):\n{output[-TAIL:]}")
    kernels = ptxas.named(ptxas.parse(output))
    root = ptxas.toolkit()
    if not kernels and root is not None:  # all was built before: compiled once more for the report
        kernels = ptxas.report(root, [arch], os.cpu_count() or 1)
    save({"kernels": table(kernels)})
    require_no_spills(kernels)
    driver.build(arch)


def loaded(device: Device, limit_s: float, save: Save) -> None:
    """Reports what a new process loads: the CUDA kernels, on a GPU."""
    del limit_s  # the parent keeps it
    import lap_ext

    info = lap_ext.info()
    save(asdict(info))
    if device.cuda and not info.cuda_usable:
        raise RuntimeError(f"expected the CUDA kernels to be loaded, got:\n{info}")


def require_no_spills(kernels: Sequence[Kernel]) -> None:
    """Fails on a kernel that spills, and on a report without kernels."""
    if not kernels:
        raise RuntimeError("expected a report of ptxas -v, got none.")
    bad = ptxas.spilling(kernels)
    if bad:
        names = ", ".join(f"{k.name} on {k.arch} ({k.spill_bytes} bytes)" for k in bad)
        raise RuntimeError(f"expected kernels without spills, got {names}.")


def table(kernels: Sequence[Kernel]) -> dict[str, dict[str, dict[str, int]]]:
    """Lists of each kernel and architecture registers, bytes, and blocks that a processor holds."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for k in kernels:
        found.setdefault(k.name, {})[k.arch] = {
            "registers": k.registers,
            "shared": k.shared_bytes,
            "stack": k.stack_bytes,
            "spills": k.spill_bytes,
            "blocks": k.resident(),
        }
    return found


# --- without a GPU --------------------------------------------------------------------------------


def static(jobs: int) -> dict[str, Any]:
    """Collects what is known without a GPU; the same for the same sources and toolkit."""
    content: dict[str, Any] = {
        "sources": ptxas.sources_digest(),
        "bytes": byte_counts(),
        "predictions": predicted(),
    }
    root = ptxas.toolkit()
    if root is None:
        return {**content, "toolkit": None, "kernels": {}}
    number = ptxas.version(root)
    kernels = ptxas.report(root, ptxas.architectures(number), jobs)
    require_no_spills(kernels)
    return {**content, "toolkit": number, "kernels": table(kernels)}


N = 1 << 28  # weights of the byte counts: 16384 x 16384
KEPT = {"score": 1.0, "neighbor_norms": 1.0}  # the others: a tenth


def byte_counts() -> dict[str, dict[str, Any]]:
    """Counts bytes per element of each call's kernels, and of the floor."""
    found: dict[str, dict[str, Any]] = {}
    for target in floors.TARGETS:
        for dtype, item in (("float32", 4), ("bfloat16", 2)):
            neighbors = 2 * N if target is floors.NORMS else 0
            per = neighbors or N
            parts = floors.phases(
                target.call, N, item, KEPT.get(target.call, 0.1), 2 * 16384, neighbors
            )
            found[f"{target.call}, {dtype}"] = {
                "floor": floors.floor_bytes(target.call, N, item, neighbors) / per,
                "kernels": {
                    p.kernel: [round(p.read / per, 4), round(p.written / per, 4)] for p in parts
                },
                "all": round(sum(p.moved for p in parts) / per, 4),
            }
    return found


BANDWIDTHS = {"3.0 TB/s": 3.0e12, "4.3 TB/s": 4.3e12}  # of copies on an H100 SXM, on an H200


def predicted() -> list[dict[str, Any]]:
    """Predicts, before any measurement, the multiples of the floor that the kernels take."""
    rows = []
    for n in (100_000_000, N):
        for name, bytes_per_s in BANDWIDTHS.items():
            for p in floors.predictions(bytes_per_s, n):
                rows.append(
                    {
                        "call": p.call,
                        "dtype": p.dtype,
                        "n": p.n,
                        "kept": p.kept,
                        "copy": name,
                        "bytes": round(p.least_multiple, 2),
                        "times_floor": round(p.times_floor, 2),
                        "wanted": p.wanted,
                    }
                )
    return rows
