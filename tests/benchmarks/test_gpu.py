# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu without a GPU: its arithmetic, its time limits, and a rehearsal.

The rehearsal runs the code of every step on small CPU tensors, so that the first run on a GPU does not
fail for a typing error.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import checks
from benchmarks.gpu import (
    __main__,
    bits,
    build,
    counters,
    cub,
    device,
    driver,
    floors,
    huge,
    kernels,
    limit,
    one_call,
    prepare,
    ptxas,
    report,
    rivals,
    sanitize,
    steps,
    suite,
)

CPU = device.Device(torch.device("cpu"), rehearse=True)
GPU = device.Device(torch.device("cuda"), rehearse=False)
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
    for step in __main__.STEPS:
        assert callable(__main__.step_function(step.name))


def test_which_steps_run_at_the_same_time() -> None:
    prebuilt = __main__.chosen([step.name for step in __main__.STEPS], prebuilt=True)
    first, together, *timed = [[step.name for step in g] for g in steps.groups(prebuilt)]
    assert first == ["driver", "loaded"]
    assert together[0] == "bits" and together[-1] == "huge" and len(together) == 11
    assert timed == [["limit"], ["kernels"], ["rivals"], ["counters"]]
    assert __main__.chosen(["build"], prebuilt=True) == []
    names = [step.name for step in __main__.chosen(["sanitizer", "hostile-float16"], True)]
    assert names == ["hostile-float16", *(f"sanitizer-{tool}" for tool in sanitize.TOOLS)]


def arguments(tmp_path: Path, *more: str) -> argparse.Namespace:
    return __main__.parsed(["--device", "cpu", "--rehearse", "--out", str(tmp_path), *more])


def test_nothing_runs_after_a_first_step_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(group: list[steps.Step], _: Any, __: Any, left_s: float, heard: Any) -> Any:
        assert left_s <= 400
        for step in group:
            status = "failed" if step.name == "driver" else "ok"
            heard(step.name, steps.Outcome(status, 1.0, 5.0, "a wrong count"))
        return results.outcomes

    monkeypatch.setattr(__main__, "run_together", fails)
    args = arguments(tmp_path, "--prebuilt", "--budget", "400")
    results = __main__.Results(args, CPU)
    __main__.run_all(args, results)
    found = json.loads(results.path.read_text())["steps"]
    assert found["loaded"]["status"] == "ok" and found["driver"]["reason"] == "a wrong count"
    assert found["bits"]["status"] == found["counters"]["status"] == "not run"
    assert found["limit"]["reason"] == "driver failed"


def test_a_run_that_is_stopped_writes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: Any) -> None:
        args[-1]("loaded", steps.Outcome("stopped", 1.0, 5.0, None, {"native": True}))
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "run_together", stopped)
    monkeypatch.setattr(__main__.signal, "signal", lambda *_: None)
    assert __main__.steps(arguments(tmp_path, "--only", "loaded")) == 1
    (path,) = tmp_path.glob("*-gpu.json")
    assert json.loads(path.read_text())["steps"]["loaded"]["findings"] == {"native": True}
    assert "stopped at" in capsys.readouterr().out


def test_steps_that_run_together_are_ended_together(tmp_path: Path) -> None:
    """The second one is still running when the first has ended and we are stopped."""
    heard: dict[str, str] = {}
    on_cpu = ["--device", "cpu", "--rehearse"]
    pair = [steps.Step("loaded", 60, together=True), steps.Step("pytest", 60, together=True)]

    def changed(name: str, outcome: steps.Outcome) -> None:
        heard[name] = outcome.status
        if outcome.status == "ok":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.run_together(pair, on_cpu, tmp_path, 60, changed)
    assert heard == {"loaded": "ok", "pytest": "stopped"}


def test_what_no_longer_fits_the_budget(tmp_path: Path) -> None:
    found = steps.run_together(
        [steps.Step("limit", 60)], [], tmp_path, 19, lambda name, outcome: None
    )
    assert found["limit"].status == "not run" and found["limit"].reason == "no time left"
    assert not found["limit"].bad and steps.Outcome("timed out", 1, 1).bad


def test_threads_of_steps_that_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "cores", lambda: 16)
    assert steps.threads(0.125) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    assert steps.threads(0.01)["OMP_NUM_THREADS"] == "1"


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


def test_mismatches_of_a_check_are_kept_whole() -> None:
    def check() -> str:
        raise bits.MismatchError("\n".join(["20 of 20 results differ:", *["x" * 400] * 20]))

    saved = Saved()
    with pytest.raises(AssertionError):
        steps.each({"large": check}, saved)
    assert "20 of 20 results differ" in saved["checks"]["large"]


# ---- build, pytest, sanitizer: commands and what their output says ------------------------------
def test_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DX=1")
    command, env = build.plan(driver.architecture(CPU))
    assert command[1:] == ["setup.py", "--quiet", "build_ext", "--inplace"]
    flags = "-DX=1 -DCMAKE_CUDA_ARCHITECTURES=90-real -DCMAKE_CUDA_FLAGS=-Xptxas=-v"
    assert env == {"LAP_EXT_BUILD": "require", "LAP_EXT_CUDA": "1", "CMAKE_ARGS": flags}
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
    command = suite.command(GPU)
    assert command[-2:] == ["-k", "cuda"] and "addopts=" in command
    text = """FAILED tests/ops/test_mask.py::test_x[cuda-a b] - assert False
ERROR tests/masks/test_file.py - ImportError
FAILED tests/ops/test_mask.py::test_y[cuda]
"""
    assert suite.failed(text) == [
        "tests/ops/test_mask.py::test_x[cuda-a b]",
        "tests/masks/test_file.py",
        "tests/ops/test_mask.py::test_y[cuda]",
    ]


def test_pytest_s_files_are_all_that_have_tests_on_a_device() -> None:
    root = Path(__file__).parents[2]
    asking = [p for p in (root / "tests").rglob("test_*.py") if "device: str" in p.read_text()]
    named = [root / name for name in suite.FILES]
    assert all(path.exists() for path in named)
    me = Path(__file__)
    left_out = [p for p in asking if p != me and not any(n in {p, *p.parents} for n in named)]
    assert len(asking) > 10 and left_out == []


def test_pytest_that_is_ended_sums_up(tmp_path: Path) -> None:
    case = "import time\ndef test_a(): assert False\ndef test_b(): time.sleep(60)\n"
    (tmp_path / "test_slow.py").write_text(case)
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += ["-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path / "test_slow.py")]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = steps.start(command, output, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
        while "F" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        steps.end([process], 30)
    assert suite.counts(log.read_text())["failed"] == 1
    (name,) = suite.failed(log.read_text())
    assert name.endswith("test_slow.py::test_a")


def test_the_log_of_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('all of it')"]
    code, output = steps.run_command(command, 60, log=tmp_path / "log")
    assert code == 0 and output == "all of it\n" == (tmp_path / "log").read_text()


def test_the_sanitizer_s_summary() -> None:
    assert sanitize.findings("========= ERROR SUMMARY: 0 errors\n") == 0
    assert sanitize.findings("========= ERROR SUMMARY: 1 error\n") == 1
    text = "========= RACECHECK SUMMARY: 12 hazards displayed (12 errors, 0 warnings)\n"
    assert sanitize.findings(text) == 12
    assert sanitize.findings("Device not supported") is None
    with pytest.raises(steps.NotRunError, match="no GPU"):
        sanitize.run("memcheck", CPU, 60, Saved())


def test_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = driver.compile_command(Path("nvcc"), "90-real", Path("lap.a"), Path("driver"))
    assert "--generate-code=arch=compute_90,code=sm_90" in command and command[-1] == "lap.a"
    command = cub.compile_command(Path("nvcc"), "90-real", Path("cub.so"))
    assert command[-1].endswith("cub_rival.cu") and Path(command[-1]).exists()
    assert driver.SOURCE.exists()
    with pytest.raises(steps.NotRunError, match="no GPU"):
        driver.run(CPU, 60, Saved())
    for name, archs in (("native-a", "80-real;90-real"), ("native-b", "100-real")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "liblap_cuda.a").touch()
        (folder / "CMakeCache.txt").write_text(f"X:BOOL=ON\nCMAKE_CUDA_ARCHITECTURES:Y={archs}\n")
    monkeypatch.setattr(driver, "NATIVE", tmp_path)
    assert driver.core_library("90-real") == tmp_path / "native-a" / "liblap_cuda.a"
    assert driver.core_library("120-real") is None


def test_what_was_built_before_needs_no_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptxas, "toolkit", lambda: None)
    target = tmp_path / "driver"
    with pytest.raises(steps.NotRunError, match="a CUDA toolkit was not found"):
        driver.built("90-real", target)
    target.write_text("")
    target.chmod(0o644)  # as a copy may be
    assert driver.built("90-real", target) == target and target.stat().st_mode & 0o100
    monkeypatch.setattr(cub, "ROOT", tmp_path)
    with pytest.raises(steps.NotRunError, match="no CUDA toolkit"):
        cub.library("90-real")
    built = tmp_path / "build" / "gpu" / f"cub-90-real-{ptxas.digest([cub.SOURCE.read_text()])}.so"
    built.parent.mkdir(parents=True)
    built.touch()
    assert cub.library("90-real") == built


def test_what_to_take_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare.machine, "ROOT", tmp_path)
    monkeypatch.setattr(prepare.machine, "commit", lambda: "abc")
    monkeypatch.setattr(prepare, "NOTE", tmp_path / "prepared.json")
    assert prepare.prepared() is None
    library, target = tmp_path / "_C.abi3.so", tmp_path / "driver"
    for path in (library, target):
        path.write_bytes(b"x" * 2_000_000)

    def no_cub(arch: str) -> Path:
        raise steps.NotRunError("no cub")

    monkeypatch.setattr(prepare, "libraries", lambda arch: [library])
    monkeypatch.setattr(driver, "build", lambda arch: target)
    monkeypatch.setattr(cub, "library", no_cub)
    assert prepare.main(["--arch", "100-real"]) == 0
    told = capsys.readouterr()
    assert "2.00 MB  _C.abi3.so" in told.out and "4.00 MB  in all\ncommit abc" in told.out
    assert "without cub's rival: no cub" in told.err
    found = prepare.prepared()
    assert found is not None and found["architecture"] == "100-real" and found["current"]
    monkeypatch.setattr(ptxas, "sources_digest", lambda: "other")
    again = prepare.prepared()
    assert again is not None and not again["current"]


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
@pytest.mark.parametrize("module", [limit, kernels, rivals, huge, bits])
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
        *("score", "mask", "prune_", "factors", "topk_mask")
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
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Description"
"0","7","void lap::cuda::scan_kernel<float>(Source)","SOL","DRAM Throughput","%","91.50","",""
"0","7","void lap::cuda::scan_kernel<float>(Source)","SOL","Duration","usecond","1,234.5","",""
"0","7","void lap::cuda::scan_kernel<float>(Source)","SOL","Compute (SM) Throughput","%","40.25","",""
"0","7","void lap::cuda::scan_kernel<float>(Source)","Warp","","","","CPIStall","On average, each warp of this workload spends 5.9 cycles being stalled waiting for a scoreboard dependency on a L1TEX (local, global) operation. Find it."
"0","7","void lap::cuda::scan_kernel<float>(Source)","Warp","","","","CPIStall","On average, each warp spends 2.0 cycles being stalled due to not being selected."
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
