# SPDX-License-Identifier: MIT
"""What benchmarks.gpu calls: builds, pytest, sanitizers, profilers, and what their output says."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import (
    build,
    cub,
    driver,
    prepare,
    ptxas,
    sanitize,
    steps,
    suite,
)
from tests.helpers.gpu_runs import CPU, GPU, Saved


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
    assert command[-1].endswith("cub_baseline.cu") and Path(command[-1]).exists()
    assert driver.SOURCE.exists()
    with pytest.raises(steps.NotRunError, match="no GPU"):
        driver.run(CPU, 60, Saved())
    for name, archs in (("native-a", "80-real;90-real"), ("native-b", "100-real")):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "liblap_cuda.a").touch()
        (directory / "CMakeCache.txt").write_text(
            f"X:BOOL=ON\nCMAKE_CUDA_ARCHITECTURES:Y={archs}\n"
        )
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
        cub.compiled("90-real")
    built = tmp_path / "build" / "gpu" / f"cub-90-real-{ptxas.digest([cub.SOURCE.read_text()])}.so"
    built.parent.mkdir(parents=True)
    built.touch()
    assert cub.compiled("90-real") == built


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
    monkeypatch.setattr(cub, "compiled", no_cub)
    assert prepare.main(["--arch", "100-real"]) == 0
    told = capsys.readouterr()
    assert "2.00 MB  _C.abi3.so" in told.out and "4.00 MB  in all\ncommit abc" in told.out
    assert "without cub's baseline: no cub" in told.err
    found = prepare.prepared()
    assert found is not None and found["architecture"] == "100-real" and found["current"]
    monkeypatch.setattr(ptxas, "sources_digest", lambda: "other")
    again = prepare.prepared()
    assert again is not None and not again["current"]
