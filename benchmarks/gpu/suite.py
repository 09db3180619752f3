# SPDX-License-Identifier: MIT
"""Step "pytest": the tests that run on the device. Stopped at its limit, it says how far it came.

The files are named: others need packages that are not on every machine with a GPU, and collecting
them would end the run. All of pytest's output is kept in a file beside the results.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from benchmarks.gpu.device import Device
from benchmarks.gpu.steps import TAIL, Save, run_command
from benchmarks.machine import ROOT, cores

LOG = "pytest.log"
DIRECTORY = ROOT / "build" / "gpu"
# What has tests with the fixture `device`, files or directories; tests/benchmarks/test_gpu_tools.py
# holds this.
FILES = (
    "tests/criteria/test_random.py",
    "tests/ops",
    "tests/masks/test_wrappers.py",
    "tests/masks/test_masks.py",
    "tests/masks/test_file.py",
    "tests/masks/test_torch_prune.py",
    "tests/pruning/test_pruner_training.py",
)
REHEARSED = ("tests/ops/test_score.py",)
SUMS_UP_S = 8.0  # from the request to end to the end
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|warnings?)\b")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+(?: \S+\])?)", re.MULTILINE)


def command(device: Device) -> list[str]:
    """Returns the command: tests with the device's name in theirs; a rehearsal takes one file.

    The settings of pyproject.toml do not hold here: they collect doctests and turn warnings, which
    another version of torch may have, into errors.
    """
    options = ["-q", "--no-header", "-rfE", "--tb=short", "--continue-on-collection-errors"]
    options += ["--import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["-o", "addopts=", "-o", "filterwarnings=default"]
    workers = cores() // 2
    if workers > 1 and importlib.util.find_spec("xdist"):
        options += ["-p", "xdist.plugin", "-n", str(workers)]
    chosen = [*FILES, "-k", "cuda"] if device.cuda else list(REHEARSED)
    return [sys.executable, "-m", "pytest", *options, *chosen]


def counts(output: str) -> dict[str, int]:
    """Reads the closing line of pytest: {"passed": 12, "failed": 1}."""
    for line in reversed(output.splitlines()):
        found = _COUNT.findall(line)
        if found and " in " in line:
            return {kind.rstrip("s") if kind != "passed" else kind: int(n) for n, kind in found}
    return {}


def failed(output: str) -> list[str]:
    """Reads the names of the tests that failed, from the summary at the end."""
    return list(dict.fromkeys(_FAILED.findall(output)))


def run(device: Device, limit_s: float, save: Save, directory: Path = DIRECTORY) -> None:
    """Fails if a test does, or if none ran."""
    directory.mkdir(parents=True, exist_ok=True)
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    limit_s -= SUMS_UP_S + 4
    code, output = run_command(command(device), limit_s, env, directory / LOG, SUMS_UP_S)
    found = counts(output)
    save({"counts": found, "failed": failed(output), "whole": code is not None, "log": LOG})
    if found.get("failed") or found.get("error") or (code is not None and code != 0):
        raise AssertionError(f"pytest: {found}, exit code {code}\n{output[-TAIL:]}")
    if not found.get("passed"):
        raise AssertionError(f"pytest: no test passed\n{output[-TAIL:]}")
