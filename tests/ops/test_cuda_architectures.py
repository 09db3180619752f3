# SPDX-License-Identifier: MIT
"""The CUDA kernels are one code for all architectures, and are built for all of them.

So .ci/run builds them for the oldest one alone, whose compiler knows the least: what it accepts,
the later ones do. One file of kernels is built here as a wheel has it.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from benchmarks.gpu import ptxas

ROOT = Path(__file__).parents[2]
SMALLEST = "CMakeFiles/lap_cuda.dir/csrc/cuda/zero.cu.o"


def test_no_code_is_for_one_architecture() -> None:
    """Code may ask whether it is compiled for a GPU, but not for which one."""
    for path in (x for x in (ROOT / "csrc").rglob("*") if x.is_file()):
        rest = path.read_text().replace("defined(__CUDA_ARCH__)", "")
        assert "__CUDA_ARCH" not in rest, path


def test_kernels_are_built_for_every_architecture(tmp_path: Path) -> None:
    root = ptxas.toolkit()
    if root is None:
        pytest.skip("no CUDA toolkit")
    cmake, ninja = (Path(sysconfig.get_path("scripts")) / name for name in ("cmake", "ninja"))
    if not ninja.exists():
        pytest.skip("the build's tools are not in this environment")
    options = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DLAP_CUDA=ON"]
    options += [f"-DCMAKE_CUDA_COMPILER={root}/bin/nvcc"]
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    subprocess.run([ninja, "-C", tmp_path, SMALLEST], check=True, capture_output=True)
    command = subprocess.check_output(
        [ninja, "-C", tmp_path, "-t", "commands", SMALLEST], text=True
    )
    real = [f"sm_{x.removesuffix('-real')}" for x in ptxas.architectures(ptxas.version(root))]
    last = real[-1].replace("sm", "compute")  # for GPUs that come after it
    assert sorted(re.findall(r"(?<=[\[,])\w+_\d+(?=[\],])", command)) == sorted([*real, last])
