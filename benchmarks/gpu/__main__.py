# SPDX-License-Identifier: MIT
"""Builds, tests and measures the CUDA kernels, and writes one JSON: python -m benchmarks.gpu.

With a GPU: under eight minutes, each step in a process of its own with a time limit. Without one: the
reports of ptxas and the byte counts (benchmarks/results/cuda-static.json). See README.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu import report
from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import BUDGET_S, NotRunError, Outcome, Save, Step, run_step, saver

RESULTS = machine.ROOT / "benchmarks" / "results"
STATIC = RESULTS / "cuda-static.json"
PIECES = machine.ROOT / "build" / "gpu"  # ignored by git

# In the order of their worth: what comes last is cut where the first ones take too long.
STEPS = (
    Step("build", 105),
    Step("loaded", 12),
    Step("limit", 70),
    Step("bits", 60),
    Step("rivals", 60),
    Step("pytest", 75),
    Step("sanitizer", 45),
    Step("huge", 43),
)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", help="cuda[:index] (default, if there is one) or cpu")
    parser.add_argument(
        "--rehearse", action="store_true", help="small sizes; on a CPU with stand-ins for events"
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--only", default=",".join(names), help="steps (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON (default: benchmarks/results)"
    )
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument(
        "--jobs", type=int, default=0, help="compilers at once (MAX_JOBS, or all cores)"
    )
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)  # of a child
    parser.add_argument("--piece", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = [name.strip() for name in args.only.split(",")]
    unknown = set(args.only) - set(names)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device")
    args.jobs = args.jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    return args


def step_function(name: str) -> Callable[[Device, float, Save], None]:
    """The code of a step; imported only then, so that "build" does not load what it replaces."""
    if name == "build":
        from benchmarks.gpu.build import run
    elif name == "loaded":
        from benchmarks.gpu.build import loaded as run
    elif name == "limit":
        from benchmarks.gpu.limit import run
    elif name == "bits":
        from benchmarks.gpu.bits import run
    elif name == "rivals":
        from benchmarks.gpu.rivals import run
    elif name == "pytest":
        from benchmarks.gpu.suite import run
    elif name == "sanitizer":
        from benchmarks.gpu.sanitize import run
    else:
        from benchmarks.gpu.huge import run
    return run


def facts(device: Device, commit: str | None) -> dict[str, Any]:
    """The machine, with the GPU's driver and CUDA; what lap_ext has loaded is a step's to tell."""
    found = machine.describe(device.device)
    del found["lap_ext"]  # this process may have loaded what the build then replaces
    found["commit"] = commit or found["commit"]
    found["cuda"] = torch.version.cuda
    found["driver"] = found["capability"] = found["memory"] = None
    if device.cuda:
        properties = torch.cuda.get_device_properties(device.device)
        found["capability"] = [properties.major, properties.minor]
        found["memory"] = properties.total_memory
        found["driver"] = driver_version()
    return found


def driver_version() -> str | None:
    """As nvidia-smi tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def child(args: argparse.Namespace) -> int:
    """One step, in its own process."""
    save = saver(args.piece)
    device = Device(torch.device(args.device), args.rehearse)
    try:
        step_function(args.step)(device, args.limit, save)
    except NotRunError as error:
        save({"not_run": str(error)})
    return 0


def steps(args: argparse.Namespace) -> int:
    """All steps; 1 if one failed. A missed target is no failure."""
    device = Device(torch.device(args.device), args.rehearse)
    begin = time.perf_counter()
    content: dict[str, Any] = {"machine": facts(device, args.commit), "rehearsal": args.rehearse}
    folder = args.out or (PIECES if args.rehearse else RESULTS)
    path = folder / f"{machine.slug(content['machine'])}-gpu.json"
    arguments = ["--device", args.device, *(["--rehearse"] if args.rehearse else [])]
    outcomes: dict[str, Outcome] = {}
    for step in STEPS:
        if step.name not in args.only:
            continue
        left = BUDGET_S - (time.perf_counter() - begin)
        outcomes[step.name] = run_step(step, arguments, PIECES, min(step.limit_s, left))
        content["steps"] = {name: outcome.as_json() for name, outcome in outcomes.items()}
        content["seconds"] = round(time.perf_counter() - begin, 1)
        report.write(path, content)
        print(report.step_line(step.name, outcomes[step.name]), flush=True)
    print(report.summary(content))
    print(f"{content['seconds']:.0f} s; results: {path}")
    return 0 if all(o.status in {"ok", "not run"} for o in outcomes.values()) else 1


def without_gpu(args: argparse.Namespace) -> int:
    """What needs none: the reports of ptxas, the byte counts, the prediction."""
    from benchmarks.gpu import build

    print(
        "no GPU: torch sees no CUDA device. Only the reports of ptxas and the byte counts are made."
    )
    content = build.static(args.jobs)
    path = (args.out / STATIC.name) if args.out else STATIC
    report.write_lines(path, content)
    kernels = content["kernels"]
    archs = sorted({arch for rows in kernels.values() for arch in rows})
    where = f"{len(kernels)} kernels on {', '.join(archs)}, none spills" if kernels else "no nvcc"
    print(f"{where}; results: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Chooses."""
    args = parsed(argv)
    if args.step:
        return child(args)
    if args.device == "cpu" and not args.rehearse:
        return without_gpu(args)
    return steps(args)


if __name__ == "__main__":
    sys.exit(main())
