# SPDX-License-Identifier: MIT
"""The radix sort of cub as a baseline: cub_baseline.cu, compiled on first use, called by ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import ptxas
from benchmarks.gpu.device import Device
from benchmarks.gpu.driver import architecture
from benchmarks.gpu.steps import TAIL, NotRunError
from benchmarks.machine import ROOT

SOURCE = Path(__file__).with_name("cub_baseline.cu")


def compile_command(nvcc: Path, arch: str, target: Path) -> list[str]:
    """Returns the command for a shared library of its own, with cudart linked statically."""
    number = arch.removesuffix("-real")
    code = f"--generate-code=arch=compute_{number},code=sm_{number}"
    flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static", code]
    return [str(nvcc), *flags, "-o", str(target), str(SOURCE)]


def compiled(arch: str) -> Path:
    """Returns the built library, or compiles it; not run where there is no toolkit for that."""
    target = ROOT / "build" / "gpu" / f"cub-{arch}-{ptxas.digest([SOURCE.read_text()])}.so"
    if not target.exists():
        root = ptxas.toolkit()
        if root is None:
            raise NotRunError(
                f"no {target.name}, and no CUDA toolkit to compile cub_baseline.cu with"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        command = compile_command(root / "bin" / "nvcc", arch, target)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NotRunError(f"cub_baseline.cu does not compile: {done.stderr[-TAIL:]}")
    return target


class RadixSort:
    """Masks by sorting all (score, index) pairs, descending and stable: ties by lower index."""

    def __init__(self, device: Device) -> None:
        if not device.cuda:
            raise NotRunError("no GPU to sort on")
        self._library = ctypes.CDLL(str(compiled(architecture(device))))
        self._library.lap_radix_workspace.restype = ctypes.c_int64
        self._library.lap_radix_workspace.argtypes = [ctypes.c_int64]
        self._library.lap_radix_mask.restype = ctypes.c_int
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._library.lap_radix_mask.argtypes = [
            *(pointer, number, number),
            *(pointer, pointer, number, pointer),
        ]

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        """Selects the keep largest of contiguous float32 scores, fewer than 2^31."""
        n = scores.numel()
        size = int(self._library.lap_radix_workspace(n))
        workspace = torch.empty(size, dtype=torch.uint8, device=scores.device)
        mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        stream = torch.cuda.current_stream(scores.device).cuda_stream
        code = self._library.lap_radix_mask(
            scores.data_ptr(), n, keep, mask.data_ptr(), workspace.data_ptr(), size, stream
        )
        if code != 0:
            raise RuntimeError(f"cub_baseline.cu: CUDA error {code}")
        return mask
