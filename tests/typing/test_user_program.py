# SPDX-License-Identifier: MIT
"""A user's program passes mypy --strict against the wheel: py.typed and the stub are shipped."""

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
from tests.typing.user_program import program

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("user_program.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, without native kernels: they have no types."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT)
    for name in files.decode().splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "csrc/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, env=os.environ | {"LAP_EXT_BUILD": "pure"})
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_says_that_it_has_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    stubs = {"lap_ext/__init__.pyi", "lap_ext/checkpoint/__init__.pyi"}
    assert {"lap_ext/py.typed", "lap_ext/options.py", *stubs} <= set(names)
    rooms = {Path(x).parent for x in names if x.endswith(".py")}
    here = {x.parent.relative_to(ROOT) for x in (ROOT / "lap_ext").rglob("*.py")}
    assert rooms == here, "pyproject.toml lists every package"


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
