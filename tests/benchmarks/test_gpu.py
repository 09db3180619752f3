# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu without a GPU: its arithmetic, and a rehearsal.

The rehearsal runs the code of every step on small CPU tensors, so that the first run on a GPU does
not fail for a typing error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import checks
from benchmarks.gpu import (
    __main__,
    baselines,
    bits,
    counters,
    device,
    floors,
    huge,
    kernels,
    limit,
    one_call,
    ptxas,
    report,
    steps,
)
from tests.helpers.gpu_runs import CPU, GPU, Saved

SELECT = Path(__file__).parents[2] / "csrc" / "cuda" / "select.cuh"


# ---- floors -----------------------------------------------------------------------------------
def test_floors_of_the_table() -> None:
    n = 1_000_000
    assert floors.floor_bytes("score", n, 4) == 8 * n
    assert floors.floor_bytes("mask", n, 4) == floors.floor_bytes("topk_mask", n, 4) == 5 * n
    assert floors.floor_bytes("prune_", n, 4) == 9 * n
    assert floors.floor_bytes("neighbor_norms", n, 4, neighbors=3 * n) == 12 * n
    # bfloat16: half the bytes of w; scores and masks keep theirs
    assert floors.floor_bytes("score", n, 2) == (2 + 4) * n
    assert floors.floor_bytes("mask", n, 2) == (2 + 1) * n
    assert floors.floor_bytes("prune_", n, 2) == (2 + 2 + 1) * n
    wanted = {target.call: target.multiple for target in floors.TARGETS}
    assert wanted == {
        "score": 1.15,
        "mask": 1.4,
        "prune_": 1.4,
        "neighbor_norms": 1.25,
        "topk_mask": 1.5,
    }


def test_verdicts() -> None:
    found = floors.verdict(floors.MASK, 0.0014, 5_000_000_000, 5e12)
    assert found.floor_s == pytest.approx(0.001) and found.times_floor == pytest.approx(1.4)
    assert floors.verdict(floors.MASK, 0.00139, 5_000_000_000, 5e12).reached
    assert not floors.verdict(floors.MASK, 0.00141, 5_000_000_000, 5e12).reached
    assert floors.small_verdict(5, 30e-6)
    assert not floors.small_verdict(6, 10e-6) and not floors.small_verdict(3, 31e-6)
    found = floors.verdict(floors.GLOBAL, 0.002, 5_000_000_000, 5e12)
    assert found.times_floor == pytest.approx(2) and found.reached is found.wanted is None
    assert floors.floor_bytes("global_mask", 1000, 4) == 5000
    with pytest.raises(ValueError, match="time and a bandwidth > 0"):
        floors.verdict(floors.MASK, 0.0, 1, 1.0)


def test_constants_are_those_of_the_kernels() -> None:
    native = SELECT.read_text().partition("#else")[2].partition("namespace")[0]
    found = dict(re.findall(r"constexpr \w+ (k\w+) = ([^;]+);", native))
    assert found["kLeastCapacity"] == "1 << 16" and floors.LEAST_CAPACITY == 1 << 16
    assert int(found["kCapacityShare"]) == floors.CAPACITY_SHARE
    assert int(found["kLeastSampleBits"]) == floors.LEAST_SAMPLE_BITS
    assert int(found["kMostSampleBits"]) == floors.MOST_SAMPLE_BITS
    assert float(found["kDeviations"]) == floors.DEVIATIONS


def test_candidates() -> None:
    assert floors.sample_bits(70_000) == 12 and floors.sample_bits(1 << 30) == 16
    assert floors.candidate_share(1000, 0.1) == 1.0  # few elements: all are
    half, tenth = (floors.candidate_share(1 << 28, kept) for kept in (0.5, 0.1))
    assert half == pytest.approx(2 * (3.5 * (65536 * 0.25) ** 0.5 + 2) / 65536)
    assert tenth < half < 1 / floors.CAPACITY_SHARE  # they fit the buffer


def test_bytes_that_move_are_at_least_the_floor() -> None:
    for target in floors.TARGETS:
        for kept in (0.5, 0.1, 0.01):
            for item in (2, 4):
                neighbors = 2 << 28 if target is floors.NORMS else 0
                least = floors.least_multiple(target.call, 1 << 28, item, kept, 1 << 15, neighbors)
                assert 1 <= least < 2, (target.call, kept, item)
    # every weight dropped: written whole, read never; every weight kept: nothing but the mask is
    # read
    assert floors.zeroing(1000, 4, 0.0) == floors.Phase("zero", 1000, 4000)
    assert floors.zeroing(1000, 4, 1.0) == floors.Phase("zero", 1000, 0)


# ---- the rehearsal ----------------------------------------------------------------------------
def test_rehearsed_limit() -> None:
    saved = Saved()
    limit.run(CPU, 60, saved)
    calls = {row["call"] for row in saved["rows"]}
    assert calls == {target.call for target in (*floors.TARGETS, floors.GLOBAL)}
    for row in saved["rows"]:
        times = row["seconds"] * row["copy_bytes_per_s"] / row["bytes"]  # of a copy of its size
        assert row["times_floor"] == pytest.approx(times)
    assert {row["dtype"] for row in saved["rows"]} == {"float32", "bfloat16"}
    assert saved["small"][0]["given_norms"]["launches"] > 0
    text = report.summary({"steps": {"limit": {"findings": saved}}, "rehearsal": False})
    assert re.search(r"targets reached: \d+ of \d+", text) and "x the floor" in text
    assert "no target: global_mask bfloat16 3x40x40" in text
    rehearsed = report.summary({"steps": {"limit": {"findings": saved}}, "rehearsal": True})
    assert "MISSED" not in rehearsed and "rehearsed: mask" in rehearsed


def test_a_copy_of_each_size_is_timed_once() -> None:
    class Once(device.Timer):
        timed = 0

        def alone(self, call: Any, repeats: int = 9) -> Any:
            self.timed += 1
            return super().alone(call, repeats)

    timer = Once(CPU.device, 0.0)
    copies = limit.Copies(CPU, timer)
    assert copies.bytes_per_s(8000) == copies.bytes_per_s(8000) > 0
    assert copies.bytes_per_s(16000) > 0 and timer.timed == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they are loaded")
@pytest.mark.parametrize("module", [limit, kernels, baselines, huge, bits])
def test_what_measures_kernels_requires_them(module: Any) -> None:
    with pytest.raises(checks.WrongResultError, match="CUDA kernels not loaded"):
        module.run(GPU, 60, Saved())


@pytest.mark.parametrize("name", list(bits.CHECKS))
def test_rehearsed_bits(name: str) -> None:
    if name == "devices":
        with pytest.raises(steps.NotRunError, match="one device"):
            bits.CHECKS[name](CPU)
        return
    bits.CHECKS[name](CPU)


@pytest.mark.parametrize("dtype", __main__.HOSTILE)
def test_rehearsed_hostile_data(dtype: str) -> None:
    saved = Saved()
    __main__.step_function(f"hostile-{dtype}")(CPU, 60, saved)
    assert len(saved["checks"]) == 20 and set(saved["checks"].values()) == {"18 results"}


def test_a_mismatch_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operator, shapes, dtypes, strides, scalars, places and values; the check goes on."""
    one = torch.arange(12.0).view(3, 4).T, torch.ones(3).double(), torch.ones(4).double()

    def off(w: torch.Tensor, *_: Any) -> torch.Tensor:
        scores = w.abs()
        scores[1:] += 1
        return scores

    monkeypatch.setattr(bits.REFERENCE, "score", off)
    pair = bits.Pair(CPU)
    for _ in range(2):
        pair.same("score", *one, 1, False, True)
    with pytest.raises(bits.MismatchError) as error:
        pair.result()
    head, first, _ = str(error.value).splitlines()
    assert head == "2 of 2 results differ:"
    assert first.startswith(
        "score(w=float32 [4, 3] strides [1, 4], in_norm=float64 [3] strides [1]"
    )
    assert "groups=1, transposed=False, check_finite=True): score: 9 of 12 values differ: " in first
    assert first.endswith(
        "[3] 1.0 for 2.0, [4] 5.0 for 6.0, [5] 9.0 for 10.0, [6] 2.0 for 3.0, [7] 6.0 for 7.0"
    )
    with pytest.raises(bits.MismatchError, match="20 of 20 results differ"):
        for _ in range(18):
            pair.same("score", *one, 1, False, True)


def test_an_error_of_one_side_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> None:
        raise ValueError("products leave the range")

    monkeypatch.setattr(bits.REFERENCE, "prune_", raises)
    pair = bits.Pair(CPU)
    pair.prune(
        torch.ones(2, 2), torch.ones(2).double(), torch.ones(2).double(), 3, None, 1, False, True
    )
    pattern = "keep=3, mask=None, .*: the other side raised products leave the range"
    with pytest.raises(bits.MismatchError, match=pattern):
        pair.result()


def test_one_other_bit_is_seen() -> None:
    x = torch.tensor([1.0, 0.0, 2.0])
    y = torch.tensor([1.0, -0.0, 2.0])
    bits.equal_bits(x, x.clone(), "x")
    with pytest.raises(Exception, match="values differ"):
        bits.equal_bits(x, y, "x")
    with pytest.raises(Exception, match="float64"):
        bits.equal_bits(x, x.double(), "x")
    bits.equal_bits(torch.zeros(1, 1)[:, ::2], torch.zeros(1, 1), "one element")


def test_rehearsed_huge() -> None:
    saved = Saved()
    huge.run(CPU, 60, saved)
    assert set(saved["checks"]) == {"scores", "weights"}


def test_rehearsed_kernels() -> None:
    saved = Saved()
    kernels.run(CPU, 60, saved)
    assert {name.split()[0] for name in saved["calls"]} == {
        *("score", "mask", "prune_", "neighbor_norms", "topk_mask")
    }
    table = saved["calls"]["mask 0.9 float32 64x96"]
    assert table["lap_ext::mask"][0] == 1 and table[report.SPAN][1] >= table["lap_ext::mask"][1] > 0
    text = report.summary({"steps": {"kernels": {"findings": saved}}})
    assert "us of mask 0.9 float32 64x96: " in text


def event(name: str, start: float, end: float) -> Any:
    time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=time_range)


def test_kernels_of_a_profile() -> None:
    """What comes before the first overwriting of the cache is not the call's."""
    scan = "void lap::cuda::(anonymous namespace)::scan_kernel<float>(lap::Source)"
    events = [
        *(event(scan, 1, 2), event("Memset (Device)", 3, 9)),
        *(event(scan, 10, 20), event("finish(int)", 21, 25)),
        event("Memset (Device)", 30, 39),
        *(event("finish(int)", 53, 58), event(scan, 40, 52)),
    ]
    assert kernels.table(events) == {
        "scan_kernel<float>": [1, 11, 12],
        "finish": [1, 4.5, 5],
        report.SPAN: [1, 16.5, 18],
    }


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit",\
"Metric Value","Rule Name","Rule Description"
"0","7","void lap::cuda::scan_kernel<float>(Source)","SOL","DRAM Throughput","%","91.50","",""
"0","7","void lap::cuda::scan_kernel<float>(Source)","SOL","Duration","usecond","1,234.5","",""
"0","7","void lap::cuda::scan_kernel<float>(Source)","SOL",\
"Compute (SM) Throughput","%","40.25","",""
"0","7","void lap::cuda::scan_kernel<float>(Source)","Warp","","","",\
"CPIStall","On average, each warp of this workload spends 5.9 cycles being stalled waiting for a \
scoreboard dependency on a L1TEX (local, global) operation. Find it."
"0","7","void lap::cuda::scan_kernel<float>(Source)","Warp","","","",\
"CPIStall","On average, each warp spends 2.0 cycles being stalled due to not being selected."
"0","7","void lap::cuda::scan_kernel<float>(Source)","Occ","Achieved Occupancy","%","37","",""
"1","7","void lap::cuda::finish_kernel(Source)","SOL","Duration","ns","4500","",""
"""


def test_counters_of_ncu() -> None:
    first, second = counters.kernels(NCU.splitlines())
    assert first == {
        "kernel": "scan_kernel<float>",
        "dram_percent": 91.5,
        "us": 1234.5,
        "sm_percent": 40.25,
        "occupancy_percent": 37.0,
        "stall": "a scoreboard dependency on a L1TEX (local, global) operation (5.9 cycles)",
    }
    assert second == {"kernel": "finish_kernel", "us": 4.5, "stall": None}
    assert counters.kernels(["==ERROR== no permission"]) == []
    command = counters.command("ncu", Path("x") / "ncu.csv")
    assert command[-2:] == ["-m", "benchmarks.gpu.one_call"] and "WarpStateStats" in command
    text = report.summary({"steps": {"counters": {"findings": {"kernels": [first, second]}}}})
    assert "counted: scan_kernel<float>: 1234.5 us, 91.5 % of DRAM's throughput, " in text


def test_rehearsed_counters() -> None:
    one_call.run(CPU)
    with pytest.raises(steps.NotRunError, match="no GPU with counters"):
        counters.run(CPU, 40, Saved())


def test_rehearsed_baselines() -> None:
    rows: list[dict[str, Any]] = []
    timer = CPU.timer(0.0)
    baselines.eager(CPU, timer, rows.append)
    baselines.unstructured(CPU, timer, rows.append)
    baselines.issue_75599(CPU, timer, rows.append)
    baselines.issue_77049(CPU, rows.append)
    with pytest.raises(steps.NotRunError, match="no GPU"):
        baselines.radix_sort(CPU, timer, rows.append)
    text = report.summary({"steps": {"baselines": {"findings": {"rows": rows}}}})
    assert "faster than eager score + topk" in text and "peak memory of sort" in text


def test_a_graph_s_stand_in_runs_again() -> None:
    x = torch.zeros(3)
    graph = device.Graph(CPU, lambda: x + 1)
    x.fill_(4)
    graph.replay()
    assert graph.result.tolist() == [5, 5, 5] and graph.seconds() > 0


def test_fresh_copies() -> None:
    x = torch.ones(2)
    call = device.clones(x, 2, lambda y: y.add_(1).sum())
    assert float(call()) == 4 and float(call()) == 4 and x.tolist() == [1, 1]


# ---- the whole command ------------------------------------------------------------------------
def test_the_command_rehearses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--device", "cpu", "--rehearse", "--only", "loaded,sanitizer", "--commit", "abc"]
    assert __main__.main([*args, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-gpu.json")
    content = json.loads(path.read_text())
    assert content["rehearsal"] and content["machine"]["commit"] == "abc"
    assert content["machine"]["torch"] == torch.__version__
    assert {"driver", "cuda", "gpu", "capability"} <= set(content["machine"])
    assert content["steps"]["loaded"]["status"] == "ok"
    assert content["steps"]["sanitizer-memcheck"]["status"] == "not run"
    assert "loaded: ok" in capsys.readouterr().out


def test_pytest_s_output_is_kept_beside_the_results(tmp_path: Path) -> None:
    args = ["--device", "cpu", "--rehearse", "--only", "pytest", "--prebuilt"]
    assert __main__.main([*args, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-gpu.json")
    (log,) = tmp_path.glob("*-pytest.log")
    found = json.loads(path.read_text())["steps"]["pytest"]["findings"]
    assert found["failed"] == [] and found["whole"]
    assert f"{found['counts']['passed']} passed" in log.read_text()


def test_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptxas, "toolkit", lambda: None)  # compiling takes minutes
    assert __main__.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "no GPU: torch sees no CUDA device" in capsys.readouterr().out
    content = json.loads((tmp_path / "cuda-static.json").read_text())
    assert content["kernels"] == {} and content["bytes"]["mask, float32"]["floor"] == 5
    assert content["sources"] == ptxas.sources_digest()


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        __main__.main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["--only", "everything"])


def test_lines_of_a_file(tmp_path: Path) -> None:
    content = {"a": 1, "rows": [{"x": 1}, {"x": 2}], "table": {"k": [1, 2]}, "none": {}}
    report.write_lines(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content and text.count("\n") == 11
