# SPDX-License-Identifier: MIT
"""The machine: what it is, and how fast its memory is read and written in this run."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lap_ext
from benchmarks.timing import Timer

ROOT = Path(__file__).resolve().parent.parent
_LEAST, _MOST = 1 << 16, 1 << 28  # bytes of the tensors that bandwidth is measured on


class Bandwidth:
    """Bytes per second of the fastest plain reading and writing, on tensors of a given size.

    Small tensors stay in the cache: their limit is the cache's, measured at their size.
    """

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._read: dict[int, float] = {}
        self._write: dict[int, float] = {}

    def limit_s(self, read_bytes: int, write_bytes: int) -> float:
        """Computes the least seconds in which so many bytes can be read and so many written."""
        return read_bytes / self.read(read_bytes) + write_bytes / self.write(write_bytes)

    def read(self, size: int) -> float:
        """Measures bytes per second: the best of sum, amax and dot (two tensors of half of it)."""
        size = _round(size)
        if size not in self._read:
            x = torch.ones(size // 4, device=self._timer.device)
            halves = x.view(2, -1)
            calls = (x.sum, x.amax, partial(torch.dot, halves[0], halves[1]))
            self._read[size] = size / min(self._timer.alone(call).median for call in calls)
        return self._read[size]

    def write(self, size: int) -> float:
        """Measures bytes per second: fill_ of allocated memory."""
        size = _round(size)
        if size not in self._write:
            x = torch.ones(size // 4, device=self._timer.device)
            self._write[size] = size / self._timer.alone(partial(x.fill_, 0.0)).median
        return self._write[size]

    def measured(self) -> dict[str, dict[str, float]]:
        """Returns all that was measured, size in bytes -> bytes per second."""
        return {
            "read": {str(size): rate for size, rate in sorted(self._read.items())},
            "write": {str(size): rate for size, rate in sorted(self._write.items())},
        }


def _round(size: int) -> int:
    """Rounds up to a power of two, within the sizes that are measured."""
    return min(max(1 << (max(size, 1) - 1).bit_length(), _LEAST), _MOST)


def describe(device: torch.device) -> dict[str, Any]:
    """Describes machine, versions, commit and date, for the results."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "lap_ext": asdict(lap_ext.info()),
    }


def slug(facts: dict[str, Any]) -> str:
    """Names the results' files: processor, cores, threads if not all."""
    name = f"{facts['cpu']} {facts['cores']} cores"
    if facts["gpu"]:
        name = facts["gpu"]
    elif facts["threads"] != facts["cores"]:
        name += f" {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cores() -> int:
    """Counts the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float | None:
    """Reads the load average of the last minute; at the start this program is not in it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_model() -> str:
    """Reads the processor's name."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE)
        if found:
            return re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)|CPU|@.*", "", found[1])).strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Returns the checkout's commit, "+" where files differ from it; "unknown" without git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
