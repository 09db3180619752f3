# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu without a GPU: its arithmetic, its time limits, and a rehearsal.

The rehearsal runs the code of every step on small CPU tensors, so that the first run on a GPU does not
fail for a typing error.
"""

from __future__ import annotations

import fcntl
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import (
    __main__,
    bits,
    build,
    cub,
    device,
    floors,
    huge,
    limit,
    ptxas,
    report,
    rivals,
    sanitize,
    steps,
    suite,
)

CPU = device.Device(torch.device("cpu"), rehearse=True)
SELECT = Path(__file__).parents[2] / "csrc" / "cuda" / "select.cuh"


class Saved(dict[str, Any]):
    """What a step has saved, as steps.saver would write it."""

    def __call__(self, more: dict[str, Any]) -> None:
        self.update(json.loads(json.dumps(more)))  # it must be JSON


# ---- floors -----------------------------------------------------------------------------------
def test_floors_of_the_table() -> None:
    n = 1_000_000
    assert floors.floor_bytes("score", n, 4) == 8 * n
    assert floors.floor_bytes("mask", n, 4) == floors.floor_bytes("topk_mask", n, 4) == 5 * n
    assert floors.floor_bytes("prune_", n, 4) == 9 * n
    assert floors.floor_bytes("factors", n, 4, neighbors=3 * n) == 12 * n
    # bfloat16: half the bytes of w; scores and masks keep theirs
    assert floors.floor_bytes("score", n, 2) == (2 + 4) * n
    assert floors.floor_bytes("mask", n, 2) == (2 + 1) * n
    assert floors.floor_bytes("prune_", n, 2) == (2 + 2 + 1) * n
    wanted = {target.call: target.multiple for target in floors.TARGETS}
    assert wanted == {"score": 1.15, "mask": 1.4, "prune_": 1.4, "factors": 1.25, "topk_mask": 1.5}


def test_verdicts() -> None:
    found = floors.verdict(floors.MASK, 0.0014, 5_000_000_000, 5e12)
    assert found.floor_s == pytest.approx(0.001) and found.times_floor == pytest.approx(1.4)
    assert floors.verdict(floors.MASK, 0.00139, 5_000_000_000, 5e12).reached
    assert not floors.verdict(floors.MASK, 0.00141, 5_000_000_000, 5e12).reached
    assert floors.small_verdict(5, 30e-6)
    assert not floors.small_verdict(6, 10e-6) and not floors.small_verdict(3, 31e-6)
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
                neighbors = 2 << 28 if target is floors.FACTORS else 0
                least = floors.least_multiple(target.call, 1 << 28, item, kept, 1 << 15, neighbors)
                assert 1 <= least < 2, (target.call, kept, item)
    # every weight dropped: written whole, read never; every weight kept: nothing but the mask is read
    assert floors.zeroing(1000, 4, 0.0) == floors.Phase("zero", 1000, 4000)
    assert floors.zeroing(1000, 4, 1.0) == floors.Phase("zero", 1000, 0)


# ---- limits -----------------------------------------------------------------------------------
def test_all_steps_fit_eight_minutes() -> None:
    assert steps.limits(__main__.STEPS) <= steps.BUDGET_S < 480
    with pytest.raises(ValueError, match="at most 10 s, got 12"):
        steps.limits([steps.Step("a", 5), steps.Step("b", 7)], 10)
    assert {step.name for step in __main__.STEPS} == {
        "build",
        "loaded",
        "limit",
        "bits",
        "rivals",
        "pytest",
        "sanitizer",
        "huge",
    }
    for step in __main__.STEPS:
        assert callable(__main__.step_function(step.name))


def test_a_command_ends_at_its_limit_with_its_children(tmp_path: Path) -> None:
    """The child has a lock for as long as it lives."""
    with (tmp_path / "lock").open("w") as lock:
        child = (
            f"import fcntl, time; file = open({lock.name!r}); fcntl.flock(file, fcntl.LOCK_EX); "
            "print('locked', flush=True); time.sleep(60)"
        )
        code = (
            "import subprocess, sys, time\n"
            f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            "time.sleep(60)\n"
        )
        begin = time.perf_counter()
        status, output = steps.run_command([sys.executable, "-c", code], 3)
        assert status is None and "locked" in output
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert time.perf_counter() - begin < 30


def test_a_command_that_ends_by_itself() -> None:
    code = "import os, sys; print(os.environ['LAP_X']); sys.exit(3)"
    assert steps.run_command([sys.executable, "-c", code], 60, {"LAP_X": "7"}) == (3, "7\n")


def test_outcomes(tmp_path: Path) -> None:
    step = steps.Step("huge", 60)
    on_cpu = ["--device", "cpu", "--rehearse"]
    assert steps.run_step(step, on_cpu, tmp_path, 1.0).status == "not run"
    failed = steps.run_step(step, ["--nonsense"], tmp_path, 60)
    assert failed.status == "failed" and "--nonsense" in str(failed.reason)
    done = steps.run_step(step, on_cpu, tmp_path, 60)
    assert done.status == "ok" and done.findings["elements"] == CPU.sizes.huge
    assert done.as_json()["status"] == "ok"


def test_what_a_stopped_step_has_found_is_kept(tmp_path: Path) -> None:
    save = steps.saver(tmp_path / "limit.json")
    save({"copy_bytes_per_s": 1.0})
    save({"rows": [1]})
    assert steps.read(tmp_path / "limit.json") == {"copy_bytes_per_s": 1.0, "rows": [1]}
    assert steps.read(tmp_path / "none.json") == {}


def test_checks_do_not_stop_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("seven is not eight")

    def cannot() -> None:
        raise steps.NotRunError("one device only")

    saved = Saved()
    with pytest.raises(AssertionError, match="1 of 3 checks failed: first"):
        steps.each({"first": fails, "second": cannot, "third": lambda: "12 results"}, saved)
    assert "seven is not eight" in saved["checks"].pop("first")
    assert saved["checks"] == {"second": "not run: one device only", "third": "12 results"}
    assert "seven is not eight" in capsys.readouterr().err


# ---- build, pytest, sanitizer: commands and what their output says ------------------------------
def test_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DX=1")
    command, env = build.plan(build.architecture((9, 0)))
    assert command[1:] == ["setup.py", "--quiet", "build_ext", "--inplace"]
    flags = "-DX=1 -DCMAKE_CUDA_ARCHITECTURES=90-real -DCMAKE_CUDA_FLAGS=-Xptxas=-v"
    assert env == {"LAP_EXT_BUILD": "require", "LAP_EXT_CUDA": "1", "CMAKE_ARGS": flags}
    assert build.architecture((10, 0)) == "100-real"
    with pytest.raises(steps.NotRunError, match="does not build"):
        build.run(CPU, 60, Saved())


def test_pytest_s_closing_line() -> None:
    text = (
        "....\n= 3 failed, 120 passed, 1 skipped, 1700 deselected, 2 errors in 12.3s (0:00:12) =\n"
    )
    assert suite.counts(text)["failed"] == 3
    assert suite.counts(text)["passed"] == 120
    assert suite.counts(text)["error"] == 2
    assert suite.counts("120 passed, 2 warnings in 3s")["passed"] == 120
    assert suite.counts("no tests ran") == {}
    assert suite.command(device.Device(torch.device("cuda"), False))[-2:] == ["-k", "cuda"]


def test_the_sanitizer_s_summary() -> None:
    assert sanitize.findings("========= ERROR SUMMARY: 0 errors\n") == 0
    assert sanitize.findings("========= ERROR SUMMARY: 1 error\n") == 1
    text = "========= RACECHECK SUMMARY: 12 hazards displayed (12 errors, 0 warnings)\n"
    assert sanitize.findings(text) == 12
    assert sanitize.findings("Device not supported") is None
    command = sanitize.compile_command(Path("nvcc"), "90-real", Path("lap.a"), Path("driver"))
    assert "--generate-code=arch=compute_90,code=sm_90" in command and command[-1] == "lap.a"
    command = cub.compile_command(Path("nvcc"), "90-real", Path("cub.so"))
    assert command[-1].endswith("cub_rival.cu") and Path(command[-1]).exists()
    assert sanitize.SOURCE.exists()


# ---- the rehearsal ----------------------------------------------------------------------------
def test_rehearsed_limit() -> None:
    saved = Saved()
    limit.run(CPU, 60, saved)
    calls = {row["call"] for row in saved["rows"]}
    assert calls == {target.call for target in floors.TARGETS}
    assert {row["dtype"] for row in saved["rows"]} == {"float32", "bfloat16"}
    assert saved["small"][0]["given_norms"]["launches"] > 0
    text = report.summary({"steps": {"limit": {"findings": saved}}, "rehearsal": False})
    assert re.search(r"targets reached: \d+ of \d+", text) and "x the floor" in text
    rehearsed = report.summary({"steps": {"limit": {"findings": saved}}, "rehearsal": True})
    assert "MISSED" not in rehearsed and "rehearsed: mask" in rehearsed


@pytest.mark.parametrize("name", list(bits.CHECKS))
def test_rehearsed_bits(name: str) -> None:
    if name == "devices":
        with pytest.raises(steps.NotRunError, match="one device"):
            bits.CHECKS[name](CPU)
        return
    bits.CHECKS[name](CPU)


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


def test_rehearsed_rivals() -> None:
    rows: list[dict[str, Any]] = []
    timer = CPU.timer(0.0)
    rivals.eager(CPU, timer, rows.append)
    rivals.unstructured(CPU, timer, rows.append)
    rivals.issue_75599(CPU, timer, rows.append)
    rivals.issue_77049(CPU, rows.append)
    with pytest.raises(steps.NotRunError, match="no GPU"):
        rivals.radix_sort(CPU, timer, rows.append)
    text = report.summary({"steps": {"rivals": {"findings": {"rows": rows}}}})
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
    assert content["steps"]["sanitizer"]["status"] == "not run"
    assert "loaded: ok" in capsys.readouterr().out


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
