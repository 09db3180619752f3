# SPDX-License-Identifier: MIT
"""Step "driver": driver.cu, which calls every launcher, without torch and without Python.

It links the kernels that setup.py has built: it starts at once, and each of its buffers is an
allocation of its own. If it fails, memcheck says where, and nothing else is worth running.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.gpu import ptxas
from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import TAIL, NotRunError, Save, run_command
from benchmarks.machine import ROOT

SOURCE = Path(__file__).with_name("driver.cu")
TARGET = ROOT / "build" / "gpu" / "driver"
NATIVE = ROOT / "build"  # setup.py's directories: native-<hash>
ALONE_S = 25.0  # of the limit; the rest is memcheck's, where it is needed


def architecture(device: Device) -> str:
    """CMake's name of the GPU's architecture: "90-real"; of an H100 where there is none."""
    major, minor = torch.cuda.get_device_capability(device.device) if device.cuda else (9, 0)
    return f"{major}{minor}-real"


def core_library(arch: str) -> Path | None:
    """Finds the newest liblap_cuda.a that setup.py has built for it: the kernels without torch."""
    directories = [path.parent for path in NATIVE.glob("native-*/liblap_cuda.a")]
    found = [path for path in directories if arch in _architectures(path)]
    found.sort(key=lambda path: (path / "liblap_cuda.a").stat().st_mtime)
    return found[-1] / "liblap_cuda.a" if found else None


def _architectures(directory: Path) -> list[str]:
    """Reads what a build directory builds for."""
    for line in (directory / "CMakeCache.txt").read_text().splitlines():
        if line.startswith("CMAKE_CUDA_ARCHITECTURES:"):
            return line.partition("=")[2].split(";")
    return []


def compile_command(nvcc: Path, arch: str, library: Path, target: Path) -> list[str]:
    """Links the kernels' library; -lineinfo names the line of a finding in the driver."""
    number = arch.removesuffix("-real")
    code = f"--generate-code=arch=compute_{number},code=sm_{number}"
    include = f"-I{ROOT / 'csrc'}"
    flags = ["-O2", "-std=c++17", "-lineinfo", "-cudart=static", code, include]
    return [str(nvcc), *flags, "-o", str(target), str(SOURCE), str(library)]


def build(arch: str, target: Path = TARGET) -> Path:
    """Compiles and links it; not run where something for that is missing."""
    root, library = ptxas.toolkit(), core_library(arch)
    if root is None or library is None:
        missing = "a CUDA toolkit" if root is None else f"liblap_cuda.a for {arch}"
        raise NotRunError(f"no driver: {missing} was not found")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = compile_command(root / "bin" / "nvcc", arch, library, target)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"driver.cu does not compile:\n{done.stderr[-TAIL:]}")
    return target


def built(arch: str, target: Path = TARGET) -> Path:
    """Returns the built driver, or builds it."""
    if not target.exists():
        return build(arch, target)
    if not os.access(target, os.X_OK):  # copied by something that forgets this
        target.chmod(0o755)
    return target


def run(device: Device, limit_s: float, save: Save) -> None:
    """Runs it; of a failure memcheck's report is kept, too."""
    from benchmarks.gpu import sanitize

    if not device.cuda:
        raise NotRunError("no GPU to run the driver on")
    end = time.perf_counter() + limit_s - 5
    command = [str(built(architecture(device)))]
    code, output = run_command(command, min(ALONE_S, limit_s))
    save({"exit_code": code, "output": output[-TAIL:]})
    if code == 0:
        return
    tool = sanitize.program()
    if tool is not None:
        left = max(end - time.perf_counter(), 1.0)
        save({"memcheck": run_command([tool, "--tool", "memcheck", *command], left)[1][:TAIL]})
    raise AssertionError(f"exit code {code}: {output[-TAIL:]}")
