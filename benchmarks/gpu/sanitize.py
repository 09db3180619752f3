# SPDX-License-Identifier: MIT
"""Step "sanitizer": compute-sanitizer's four tools on driver.cu, which calls every launcher.

The driver links the kernels that setup.py has built, without torch: it starts at once, and each of
its buffers is an allocation of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import build, ptxas
from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import TAIL, NotRunError, Save, each, run_command
from benchmarks.machine import ROOT

SOURCE = Path(__file__).with_name("driver.cu")
TARGET = ROOT / "build" / "gpu" / "driver"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # exit code of a tool that has found something
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def compile_command(nvcc: Path, arch: str, library: Path, target: Path) -> list[str]:
    """Links the kernels' library; -lineinfo names the line of a finding in the driver."""
    number = arch.removesuffix("-real")
    code = f"--generate-code=arch=compute_{number},code=sm_{number}"
    include = f"-I{ROOT / 'csrc'}"
    flags = ["-O2", "-std=c++17", "-lineinfo", "-cudart=static", code, include]
    return [str(nvcc), *flags, "-o", str(target), str(SOURCE), str(library)]


def compile_driver(arch: str, target: Path = TARGET) -> Path:
    """Compiles and links it; not run where something for that is missing."""
    root, library = ptxas.toolkit(), build.core_library()
    if root is None or library is None:
        missing = "a CUDA toolkit" if root is None else "liblap_cuda.a of a build with CUDA"
        raise NotRunError(f"no driver: {missing} was not found")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = compile_command(root / "bin" / "nvcc", arch, library, target)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"driver.cu does not compile:\n{done.stderr[-TAIL:]}")
    return target


def sanitizer() -> str | None:
    """The tool: on the path, or in the toolkit."""
    root = ptxas.toolkit()
    folder = root / "bin" if root else None
    return shutil.which("compute-sanitizer") or (
        shutil.which("compute-sanitizer", path=folder) if folder else None
    )


def findings(output: str) -> int | None:
    """Errors or hazards that a tool's summary counts; None without a summary."""
    match = _SUMMARY.search(output)
    return int(match[1] or match[2]) if match else None


def run(device: Device, limit_s: float, save: Save) -> None:
    """The driver by itself, then under each tool, the time left shared among those to come."""
    if not device.cuda:
        raise NotRunError("no GPU to run the driver on")
    end = time.perf_counter() + limit_s - 5
    driver = compile_driver(build.architecture(torch.cuda.get_device_capability(device.device)))
    tool = sanitizer()
    checks: dict[str, Callable[[], str | None]] = {"driver alone": partial(_alone, driver, end)}
    for i, name in enumerate(TOOLS):
        checks[name] = partial(_under, tool, name, driver, end, len(TOOLS) - i)
    each(checks, save)


def _alone(driver: Path, end: float) -> str:
    code, output = run_command([str(driver)], max(end - time.perf_counter(), 1))
    if code != 0:
        raise AssertionError(f"exit code {code}: {output[-TAIL:]}")
    return output.strip().splitlines()[-1]


def _under(tool: str | None, name: str, driver: Path, end: float, to_come: int) -> str:
    if tool is None:
        raise NotRunError("compute-sanitizer was not found")
    share = (end - time.perf_counter()) / to_come
    if share < 1:
        raise NotRunError("no time left")
    command = [tool, "--tool", name, "--error-exitcode", str(FOUND), str(driver)]
    code, output = run_command(command, share)
    count = findings(output)
    if code is None:
        raise NotRunError(f"stopped at {share:.0f} s, {count} findings so far")
    if code != 0 or count:
        raise AssertionError(f"exit code {code}, {count} findings:\n{output[-TAIL:]}")
    return f"clean ({share:.0f} s at most)"
