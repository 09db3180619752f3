# SPDX-License-Identifier: MIT
"""Steps of benchmarks.gpu: which run together, their time limits, what a stopped one leaves."""

from __future__ import annotations

import fcntl
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import (
    __main__,
    bits,
    sanitize,
    steps,
)
from tests.helpers.gpu_runs import CPU, Saved, arguments


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
    assert timed == [["limit"], ["kernels"], ["baselines"], ["counters"]]
    assert __main__.chosen(["build"], prebuilt=True) == []
    names = [step.name for step in __main__.chosen(["sanitizer", "hostile-float16"], True)]
    assert names == ["hostile-float16", *(f"sanitizer-{tool}" for tool in sanitize.TOOLS)]


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
