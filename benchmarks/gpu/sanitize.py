# SPDX-License-Identifier: MIT
"""Steps "sanitizer-...": compute-sanitizer's four tools on the driver, a step each."""

from __future__ import annotations

import re
import shutil

from benchmarks.gpu import driver, ptxas
from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import TAIL, NotRunError, Save, run_command

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # exit code of a tool that has found something
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def program() -> str | None:
    """Finds the sanitizer on the path, or in the toolkit."""
    root = ptxas.toolkit()
    directory = root / "bin" if root else None
    return shutil.which("compute-sanitizer") or (
        shutil.which("compute-sanitizer", path=directory) if directory else None
    )


def findings(output: str) -> int | None:
    """Reads how many errors or hazards a tool's summary counts; None without a summary."""
    match = _SUMMARY.search(output)
    return int(match[1] or match[2]) if match else None


def run(tool: str, device: Device, limit_s: float, save: Save) -> None:
    """Runs the driver under one tool. Stopped at its limit without a finding, it is not run."""
    if not device.cuda:
        raise NotRunError("no GPU to run the driver on")
    target = driver.built(driver.architecture(device))
    found = program()
    if found is None:
        raise NotRunError("compute-sanitizer was not found")
    command = [found, "--tool", tool, "--error-exitcode", str(FOUND), str(target)]
    code, output = run_command(command, limit_s - 8)
    count = findings(output)
    save({"findings": count, "whole": code is not None})
    if code is None and not count:
        raise NotRunError(f"stopped at {limit_s - 8:.0f} s, {count} findings so far")
    if code != 0 or count:
        raise AssertionError(f"exit code {code}, {count} findings:\n{output[-TAIL:]}")
