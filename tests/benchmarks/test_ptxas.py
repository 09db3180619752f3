# SPDX-License-Identifier: MIT
"""Reports of ptxas -v: parsed from recorded lines; in the committed one nothing spills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import build, ptxas
from benchmarks.gpu.ptxas import Kernel

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cuda-static.json"

# nvcc 13.0: a kernel with shared memory, one that calls a function, one that spills, for two GPUs.
SCAN = "_ZN3lap4cuda11scan_kernelIfNS0_10WeightKeysIfiLb1EEEEEvNS0_10SelectArgsE"
EXACT = "_ZN3lap4cuda40_GLOBAL__N__e71160e7_8_score_cu_3cccd40c11exact_scoreIfEET_ddd"
SCORE = "_ZN3lap4cuda40_GLOBAL__N__e71160e7_8_score_cu_3cccd40c12score_kernelIfEEvNS1_9ScoreArgsE"
FINISH = "_ZN3lap4cuda13finish_kernelIdNS0_10WeightKeysIdlEEEEvNS0_10SelectArgsE"
RECORDED = f"""\
[3/9] Building CUDA object CMakeFiles/lap_cuda.dir/csrc/cuda/score.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SCAN}' for 'sm_90'
ptxas info    : Function properties for {SCAN}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 8448 bytes smem
ptxas info    : Compile time = 629.398 ms
ptxas info    : Function properties for {EXACT}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '{SCORE}' for 'sm_80'
ptxas info    : Function properties for {SCORE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 63 registers, used 0 barriers, 552 bytes cmem[0]
ptxas info    : Compile time = 232.580 ms
ptxas info    : Compiling entry function '{FINISH}' for 'sm_90'
ptxas info    : Function properties for {FINISH}
    192 bytes stack frame, 364 bytes spill stores, 720 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8512 bytes smem, \
632 bytes cmem[0], 64 bytes cmem[2]
"""


def test_recorded_lines() -> None:
    assert ptxas.parse(RECORDED) == [
        Kernel(SCAN, "sm_90", 80, 8448, 0, 0),
        Kernel(SCORE, "sm_80", 63, 0, 0, 0),
        Kernel(FINISH, "sm_90", 128, 8512, 192, 364 + 720),
    ]
    assert ptxas.parse("no report\n0 bytes stack frame\nUsed 3 registers") == []


def test_a_function_that_spills_counts_for_the_kernel_before_it() -> None:
    text = RECORDED.replace(
        f"for {EXACT}\n    0 bytes stack frame, 0 bytes spill stores",
        f"for {EXACT}\n    16 bytes stack frame, 8 bytes spill stores",
    )
    assert ptxas.parse(text)[0] == Kernel(SCAN, "sm_90", 80, 8448, 16, 8)


def test_spills_and_stack_frames_are_found() -> None:
    kernels = ptxas.parse(RECORDED)
    assert [kernel.name for kernel in ptxas.spilling(kernels)] == [FINISH]
    array = Kernel("k", "sm_90", 72, 0, 64, 0)  # an array in local memory: a stack, no spill
    assert ptxas.spilling([array]) == [array]
    with pytest.raises(RuntimeError, match=r"without spills, got .*finish_kernel.*\(1084 bytes\)"):
        build.require_no_spills(kernels)
    build.require_no_spills(kernels[:2])
    with pytest.raises(RuntimeError, match="expected a report"):
        build.require_no_spills([])


def test_names_for_people() -> None:
    long = "void lap::cuda::(anonymous namespace)::score_kernel<lap::BFloat16, true>(lap::Args)"
    assert ptxas.short(long) == "score_kernel<bfloat16, true>"
    long = "void lap::cuda::scan_kernel<lap::Half, lap::cuda::ScoreKeys<lap::Half> >(Args)"
    assert ptxas.short(long) == "scan_kernel<float16, ScoreKeys<float16>>"
    assert ptxas.short("_ZN3lap4cudaE") == "_ZN3lap4cudaE"
    assert len(ptxas.named(ptxas.parse(RECORDED))) == 3


@pytest.mark.parametrize(
    ("registers", "blocks"), [(32, 8), (33, 6), (64, 4), (80, 3), (96, 2), (128, 2), (129, 1)]
)
def test_blocks_that_fit(registers: int, blocks: int) -> None:
    assert Kernel("k", "sm_90", registers, 0, 0, 0).resident() == blocks


def test_architectures_of_a_toolkit() -> None:
    assert ptxas.architectures("13.0.88") == ("80-real", "90-real", "100-real")
    assert ptxas.architectures("12.8.1") == ("80-real", "90-real", "100-real")
    assert ptxas.architectures("12.6.20") == ("80-real", "90-real")


def test_the_compile_command_reports() -> None:
    command = ["nvcc", "-O3", "--threads=2", "-o", "score.cu.o", "-c", "score.cu"]
    changed = ptxas.reporting(command, Path("build/score.log"))
    expected = ["nvcc", "-O3", "--threads=1", "-o", "build/score.o", "-c", "score.cu"]
    assert changed == [*expected, "-Xptxas=-v"]


def test_the_digest_sees_every_source() -> None:
    names = {path.name for path in ptxas.sources()}
    assert {"select.cu", "select_rows.cu", "sample.cuh", "key.h", "score.h"} <= names
    assert ptxas.digest(["a", "b"]) != ptxas.digest(["ab"]) != ptxas.digest(["a", "c"])


def test_the_committed_report() -> None:
    content = json.loads(RESULTS.read_text())
    kernels = content["kernels"]
    assert any(name.startswith("scan_kernel<float, WeightKeys") for name in kernels)
    for name, archs in kernels.items():
        assert set(archs) >= {"sm_80", "sm_90"}, name
        for arch, row in archs.items():
            assert row["spills"] == row["stack"] == 0, (name, arch)
            assert 0 < row["registers"] <= 255 and row["blocks"] >= 1, (name, arch)
