# SPDX-License-Identifier: MIT
"""Step "counters": what bounds each kernel, by the GPU's counters, where ncu is installed.

Clocks are left as they are, so that durations are those of the other steps. The table of ncu is
kept in a file beside the results.
"""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import one_call, ptxas
from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import TAIL, NotRunError, Save, run_command
from benchmarks.machine import ROOT

LOG = "ncu.csv"
DIRECTORY = ROOT / "build" / "gpu"
SECTIONS = ("SpeedOfLight", "WarpStateStats", "Occupancy")
# Metrics are told by a part of their name in lower case: versions of ncu word them differently.
WANTED = {
    "dram_percent": ("dram throughput", "dram__throughput"),
    "sm_percent": ("compute (sm) throughput", "sm throughput", "sm__throughput"),
    "occupancy_percent": ("achieved occupancy",),
}
_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3}  # of "nsecond" and so on; else seconds
_STALLED = re.compile(
    r"([\d.]+) cycles being stalled (?:waiting )?(?:for |on |due to )?(.*?)\.(?: |$)"
)


def program() -> str | None:
    """Finds ncu on the path, or in the toolkit."""
    root = ptxas.toolkit()
    return shutil.which("ncu") or (shutil.which("ncu", path=root / "bin") if root else None)


def command(ncu: str, log: Path) -> list[str]:
    """Returns the command for all kernels of one_call, with the sections about their limits."""
    options = ["--clock-control", "none", "--profile-from-start", "off"]
    for section in SECTIONS:
        options += ["--section", section]
    options += ["--csv", "--page", "details", "--log-file", str(log)]
    return [ncu, *options, sys.executable, "-m", "benchmarks.gpu.one_call"]


def run(device: Device, limit_s: float, save: Save, directory: Path = DIRECTORY) -> None:
    """Runs it; what it has written is kept even if it does not come to its end."""
    if not device.cuda:
        one_call.run(device)
        raise NotRunError("no GPU with counters")
    device.require_kernels()
    ncu = program()
    if ncu is None:
        raise NotRunError("ncu was not found")
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / LOG
    code, output = run_command(command(ncu, log), limit_s - 5)
    text = log.read_text(errors="replace") if log.exists() else ""
    found = kernels(text.splitlines())
    save({"kernels": found, "log": LOG, "whole": code == 0})
    if not found:
        raise NotRunError(f"ncu counted nothing, exit code {code}: {(text + output)[-TAIL:]}")


def kernels(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Reads ncu's table: throughputs, duration, occupancy, what warps wait for, of each kernel."""
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(lines):
        name = ptxas.short(row.get("kernel name", "?"))
        kernel = found.setdefault(row.get("id", name), {"kernel": name})
        _add(kernel, row)
    for kernel in found.values():
        kernel["stall"] = kernel.pop("stalls", {}).get("most")
    return list(found.values())


def _rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Reads rows by their columns' names in lower case; skips what comes before the head."""
    head: list[str] = []
    for row in csv.reader(line for line in lines if line.startswith('"')):
        names = [name.strip().lower() for name in row]
        if "kernel name" in names:
            head = names
        elif head:
            yield dict(zip(head, row, strict=False))


def _add(kernel: dict[str, Any], row: dict[str, str]) -> None:
    """Takes what is wanted from one row: a metric, or a rule's advice."""
    name, value = row.get("metric name", "").lower(), _number(row.get("metric value", ""))
    unit = row.get("metric unit", "").lower()
    if value is not None:
        for key, parts in WANTED.items():
            if any(part in name for part in parts):
                kernel[key] = value
        if name.startswith(("duration", "gpu__time_duration")):
            kernel["us"] = round(value * _microseconds(unit), 2)
        if "stall" in name:
            _stall(kernel, value, row["metric name"])
    match = _STALLED.search(row.get("rule description", ""))
    if match:
        _stall(kernel, float(match[1]), match[2])


def _stall(kernel: dict[str, Any], cycles: float, reason: str) -> None:
    """Keeps the largest one."""
    seen = kernel.setdefault("stalls", {"cycles": 0.0})
    if cycles > seen["cycles"]:
        seen.update(cycles=cycles, most=f"{reason} ({cycles:g} cycles)")


def _microseconds(unit: str) -> float:
    return _MICROSECONDS.get(unit[:2], 1e6)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
