# SPDX-License-Identifier: MIT
"""Builds, tests and measures the CUDA kernels, and writes one JSON: python -m benchmarks.gpu.

With a GPU: under eight minutes, each step in a process of its own with a time limit; first what
tells right from wrong, all at the same time, then what is timed, one by one. Without one: the
reports of ptxas and the byte counts (benchmarks/results/cuda-static.json). See README.md.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu import counters, prepare, report, sanitize, suite
from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import (
    BUDGET_S,
    NotRunError,
    Outcome,
    Save,
    Step,
    groups,
    run_together,
    saver,
)

RESULTS = machine.ROOT / "benchmarks" / "results"
STATIC = RESULTS / "cuda-static.json"
PIECES = machine.ROOT / "build" / "gpu"  # ignored by git

HOSTILE = ("float32", "float64", "float16", "bfloat16")
# What is timed comes in the order of its worth: the last steps are cut where the first take too
# long.
STEPS = (
    Step("build", 100, first=True),
    Step("driver", 60, first=True, together=True),
    Step("loaded", 60, first=True, together=True),
    Step("bits", 80, together=True),
    *(Step(f"hostile-{dtype}", 80, together=True) for dtype in HOSTILE),
    Step("pytest", 80, together=True, leaves=suite.LOG),
    *(Step(f"sanitizer-{tool}", 80, together=True) for tool in sanitize.TOOLS),
    Step("huge", 80, together=True, share=0.5),
    Step("limit", 60),
    Step("kernels", 30),
    Step("baselines", 50),
    Step("counters", 35, leaves=counters.LOG),
)


def chosen(only: Sequence[str], prebuilt: bool) -> list[Step]:
    """Returns the steps of these names; "sanitizer" stands for all that begin so."""
    return [
        step
        for step in STEPS
        if (step.name in only or step.name.partition("-")[0] in only)
        and not (prebuilt and step.name == "build")
    ]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", help="cuda[:index] (default, if there is one) or cpu")
    parser.add_argument(
        "--rehearse", action="store_true", help="small sizes; on a CPU with stand-ins for events"
    )
    names = [step.name for step in STEPS]
    kinds = list(dict.fromkeys(name.partition("-")[0] for name in names))
    parser.add_argument("--only", default=",".join(kinds), help="steps (default: %(default)s)")
    parser.add_argument(
        "--prebuilt", action="store_true", help="do not build: benchmarks.gpu.prepare has"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, help="seconds for all (default: %(default)g)"
    )
    parser.add_argument(
        "--out", type=Path, help="directory for the JSON (default: benchmarks/results)"
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
    unknown = set(args.only) - {*names, *kinds}
    if unknown:
        parser.error(f"--only: expected some of {', '.join(kinds)}, got {', '.join(unknown)}")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device")
    args.jobs = args.jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    return args


def step_function(name: str) -> Callable[[Device, float, Save], None]:
    """Imports a step's code only when it runs: "build" must not load what it replaces."""
    kind, _, part = name.partition("-")
    if kind == "hostile":
        from benchmarks.gpu import bits

        return partial(bits.run_hostile, getattr(torch, part))
    if kind == "sanitizer":
        return partial(sanitize.run, part)
    if kind == "loaded":
        from benchmarks.gpu import build

        return build.loaded
    module = {"pytest": "suite"}.get(kind, kind)
    return importlib.import_module(f"benchmarks.gpu.{module}").run


def facts(device: Device, commit: str | None) -> dict[str, Any]:
    """Describes the machine, with the GPU's driver and CUDA; a step tells what lap_ext loads."""
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
    """Runs one step, in its own process."""
    save = saver(args.piece)
    device = Device(torch.device(args.device), args.rehearse)
    try:
        step_function(args.step)(device, args.limit, save)
    except NotRunError as error:
        save({"not_run": str(error)})
    return 0


class Results:
    """The JSON of a run, written anew whenever something is known; files of steps beside it."""

    def __init__(self, args: argparse.Namespace, device: Device) -> None:
        self._begin = time.perf_counter()
        self.content: dict[str, Any] = {
            "machine": facts(device, args.commit),
            "rehearsal": args.rehearse,
            "prepared": prepare.prepared() if args.prebuilt else None,
            "steps": {},
        }
        self._directory = args.out or (PIECES if args.rehearse else RESULTS)
        self._stem = machine.slug(self.content["machine"])
        self.path = self._directory / f"{self._stem}-gpu.json"
        self.outcomes: dict[str, Outcome] = {}

    @property
    def seconds(self) -> float:
        """Returns the seconds since the start."""
        return time.perf_counter() - self._begin

    def heard(self, name: str, outcome: Outcome) -> None:
        """Writes what is known of a step by now."""
        self.outcomes[name] = outcome
        self.content["steps"][name] = outcome.as_json()
        self.content["seconds"] = round(self.seconds, 1)
        report.write(self.path, self.content)
        leaves = next(step.leaves for step in STEPS if step.name == name)
        if leaves and (PIECES / leaves).exists():
            shutil.copyfile(PIECES / leaves, self._directory / f"{self._stem}-{leaves}")
        if outcome.status != "running":
            print(report.step_line(name, outcome), flush=True)


def steps(args: argparse.Namespace) -> int:
    """Runs all steps; 1 if one failed. A missed target is no failure."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the results are written, too
    results = Results(args, Device(torch.device(args.device), args.rehearse))
    prepared = results.content["prepared"]
    if prepared and not prepared["current"]:
        print(f"prepared from other sources: commit {prepared['commit']}", flush=True)
    try:
        run_all(args, results)
    except KeyboardInterrupt:
        print(f"stopped at {results.seconds:.0f} s; results: {results.path}")
        return 1
    print(report.summary(results.content))
    print(f"{results.seconds:.0f} s; results: {results.path}")
    return 1 if any(outcome.bad for outcome in results.outcomes.values()) else 0


def run_all(args: argparse.Namespace, results: Results) -> None:
    """Runs the groups of steps, one after the other; none after a first step that failed."""
    arguments = ["--device", args.device, *(["--rehearse"] if args.rehearse else [])]
    stop = None
    for group in groups(chosen(args.only, args.prebuilt)):
        if stop:
            for step in group:
                results.heard(step.name, Outcome("not run", 0.0, step.limit_s, stop))
            continue
        left = args.budget - results.seconds
        outcomes = run_together(group, arguments, PIECES, left, results.heard)
        bad = [step.name for step in group if step.first and outcomes[step.name].bad]
        stop = f"{' and '.join(bad)} failed" if bad else None


def without_gpu(args: argparse.Namespace) -> int:
    """Does what needs no GPU: the reports of ptxas, the byte counts, the prediction."""
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
    """Chooses what to run, by the arguments and the device."""
    args = parsed(argv)
    if args.step:
        return child(args)
    if args.device == "cpu" and not args.rehearse:
        return without_gpu(args)
    return steps(args)


if __name__ == "__main__":
    sys.exit(main())
