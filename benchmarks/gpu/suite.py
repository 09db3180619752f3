# SPDX-License-Identifier: MIT
"""Step "pytest": the tests that run on the device. Stopped at its limit, it says how far it came."""

from __future__ import annotations

import re
import sys

from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import TAIL, Save, run_command

_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|warnings?)\b")
REHEARSED = "tests/ops/test_kth_largest.py"


def command(device: Device) -> list[str]:
    """The device fixture puts the device's name into a test's; a rehearsal takes one file."""
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--maxfail=25"]
    chosen = ["-k", "cuda"] if device.cuda else [REHEARSED]
    return [sys.executable, "-m", "pytest", *options, *chosen]


def counts(output: str) -> dict[str, int]:
    """The closing line of pytest: {"passed": 12, "failed": 1}."""
    for line in reversed(output.splitlines()):
        found = _COUNT.findall(line)
        if found and " in " in line:
            return {kind.rstrip("s") if kind != "passed" else kind: int(n) for n, kind in found}
    return {}


def run(device: Device, limit_s: float, save: Save) -> None:
    """Fails if a test does, or if none ran."""
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a plugin's warning would be an error here
    code, output = run_command(command(device), limit_s - 6, env)
    found = counts(output)
    save({"counts": found, "whole": code is not None})
    if found.get("failed") or found.get("error") or (code is not None and code != 0):
        raise AssertionError(f"pytest: {found}, exit code {code}\n{output[-TAIL:]}")
    if not found.get("passed"):
        raise AssertionError(f"pytest: no test passed\n{output[-TAIL:]}")
