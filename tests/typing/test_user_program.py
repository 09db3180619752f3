# SPDX-License-Identifier: MIT
"""The wheel: a user's program passes mypy --strict against it; info() tells how it was built."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from lap_ext import criteria
from tests.helpers.processes import run_python
from tests.typing.user_program import program

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("user_program.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, but for the C++ sources."""
    source = tmp_path_factory.mktemp("source")
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT)
    for name in files.decode().splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "csrc/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without native kernels, as on a machine without a compiler."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    env = {name: value for name, value in os.environ.items() if name != "LAP_EXT_BUILD"}
    subprocess.run(command, check=True, env=env | {"CXX": "no-such-compiler"})
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_says_that_it_has_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    stubs = {"lap_ext/__init__.pyi", "lap_ext/checkpoint/__init__.pyi"}
    assert {"lap_ext/py.typed", "lap_ext/options.py", *stubs} <= set(names)
    rooms = {Path(x).parent for x in names if x.endswith(".py")}
    here = {x.parent.relative_to(ROOT) for x in (ROOT / "lap_ext").rglob("*.py")}
    assert rooms == here, "pyproject.toml lists every package"


def test_a_wheel_without_native_code_is_for_every_machine(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_info_says_why_there_is_no_native_code_and_what_to_do(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lap_ext; "
    done = run_python(code + "print(lap_ext.info())")
    assert done.stdout.splitlines()[1].startswith("CPU: pure PyTorch")
    reason = "It was built without: no C++ compiler was found (looked for no-such-compiler)."
    cure = "Install one (gcc >= 12) and then lap_ext again: pip install --force-reinstall"
    assert f"fallback: no native library. {reason}" in done.stdout, done.stderr
    assert f"cure: {cure}" in done.stdout
    (warning,) = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert reason in warning and cure in warning


ASK = """
import os, sys, sysconfig
from distutils.core import run_setup
dist = run_setup("setup.py", stop_after="init")
command = dist.get_command_obj("bdist_wheel")
command.ensure_finalized()
print("-".join(command.get_tag()))
if sys.argv[1:]:
    dist.run_command("build_py")
"""


@pytest.mark.parametrize(
    ("build", "compiler", "tag", "error"),
    [
        ("auto", sys.executable, None, ""),  # whatever it is, it is there
        ("pure", sys.executable, "py3-none-any", ""),
        ("require", "no-such-compiler", "py3-none-any", "LAP_EXT_BUILD=require, but no C++"),
    ],
    ids=["native", "pure", "require"],
)
def test_tags(source: Path, build: str, compiler: str, tag: str | None, error: str) -> None:
    platform = sysconfig.get_platform()
    if tag is None and platform != "linux-x86_64":
        pytest.skip("native libraries are for Linux on x86-64")
    done = subprocess.run(
        [sys.executable, "-c", ASK, *(["build"] if error else [])],
        cwd=source,
        env=os.environ | {"LAP_EXT_BUILD": build, "CXX": compiler},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout.split()[0].endswith(tag or platform.replace("-", "_")), done.stderr
    assert error in done.stderr and (done.returncode != 0) == bool(error), done.stderr


def test_the_program_runs() -> None:
    before = dict(criteria.REGISTRY)
    try:
        program()
    finally:
        criteria.REGISTRY.clear()
        criteria.REGISTRY.update(before)


def test_a_users_program(wheel: Path, tmp_path: Path) -> None:
    """In an environment whose lap_ext is the wheel's; torch comes from this one."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    packages = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib"))
    program = tmp_path / "user_program.py"
    program.write_bytes(PROGRAM.read_bytes())
    where = subprocess.check_output(
        [python, "-c", "import importlib.util as u; print(u.find_spec('lap_ext').origin)"],
        cwd=tmp_path,
        text=True,
    )
    assert Path(where.strip()).is_relative_to(packages)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull]
    command += ["--python-executable", str(python), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, str(program)], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
