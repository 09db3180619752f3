# SPDX-License-Identifier: MIT
"""What a subcommand imports: torch only after its arguments are checked, and no more than it needs.

Seconds are no matter of a test; the modules that take them are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import network, prune, write

ROOT = Path(__file__).parents[2]
PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from lap_ext.cli import main

shown = []
for argv in json.loads(sys.argv[1]):
    if argv[0] == "import":
        __import__(argv[1])
        status, text = 0, ""
    else:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
            status = main(argv)
        text = out.getvalue()
    shown.append([status, text, sorted(sys.modules)])
print(json.dumps(shown))
"""
MISTAKES = [
    (["--help"], 0, "SUBCOMMAND"),
    (["--version"], 0, "lap_ext 0."),
    (["prune", "--help"], 0, "--sparsity"),
    (["prun"], 2, "prun"),
    (["prune", "a", "--out", "x", "--sparsity", "50"], 2, "expected 0 <= --sparsity <= 1"),
    (["prune", "a", "--out", "x", "--sparsity", "half"], 2, "'half'"),
    (["prune", "a", "--out", "x"], 2, "expected --sparsity, the fraction to remove"),
    (["prune", "a", "--out", "x", "--structure", "4:2"], 2, "Did you mean 2:4?"),
    (["prune", "a", "--out", "x", "--structure", "2:4", "-s0"], 2, "no --sparsity with"),
    (["prune", "a", "--out", "x", "--sparsity", "erk:2"], 2, "expected 0 <= --sparsity <= 1"),
    (["prune", "a", "--out", "x", "--sparsity", "0.5", "--scope", "rows"], 2, "'rows'"),
    (["prune", "a", "--out", "x", "--sparsity", "0.5", "--memory", "x"], 2, "4GB"),
    (["prune", "nowhere", "--out", "x", "--sparsity", "0.5"], 2, "no such directory"),
    (["prune", "a:b", "--out", ".", "--sparsity", "0.5"], 2, "a new directory"),
    (["score", "nowhere"], 2, "no such directory"),
    (["inspect", "model.bin"], 2, "can execute any code"),
    (["verify", "a", "b", "--sparsity", "half"], 2, "'half'"),
    (["verify", "a", "b", "--sparsity", "50"], 2, "expected 0 <= --sparsity <= 1"),
    (["bench", "--sparsity", "1"], 2, "expected 0 <= --sparsity < 1"),
    (["bench", "nowhere"], 2, "no such directory"),
]
OURS = ("lap_ext.topology", "lap_ext.criteria", "lap_ext.pruning", "lap_ext.report", "lap_ext.demo")


def run(directory: Path, commands: list[list[str]]) -> list[Any]:
    """Runs commands one after the other in a new interpreter: status, text, modules so far."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    shown: list[Any] = json.loads(done.stdout)
    return shown


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All commands of this file, in one interpreter: torch is imported once."""
    root = tmp_path_factory.mktemp("imports")
    prune(write(root / "dense", network().state_dict()), root / "out", 0.5)
    (root / "dense/config.json").write_text("{}")
    (root / "out/config.json").write_text("{}")
    commands = [*(argv for argv, _, _ in MISTAKES), ["import", "torch"]]
    commands += [["verify", "out", "dense"], ["info"]]
    return {" ".join(argv): x for argv, x in zip(commands, run(root, commands), strict=True)}


@pytest.mark.parametrize(("argv", "status", "said"), MISTAKES, ids=lambda x: " ".join(x)
                         if isinstance(x, list) else "")  # fmt: skip
def test_mistakes_and_help_import_no_torch(
    shown: dict[str, Any], argv: list[str], status: int, said: str
) -> None:
    got, text, modules = shown[" ".join(argv)]
    assert got == status and said in text
    heavy = {"torch", "numpy", "transformers", "safetensors", "rich"}
    assert not heavy & {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("command", ["verify out dense", "info"])
def test_verify_and_info_need_no_trace(shown: dict[str, Any], command: str) -> None:
    """Beyond torch itself and the package that reads the files: nothing that takes long."""
    status, text, modules = shown[command]
    assert status == 0, text
    assert not [name for name in modules if name.startswith(OURS)]
    more = set(modules) - set(shown["import torch"][2])
    foreign = {name.partition(".")[0] for name in more} - set(sys.stdlib_module_names)
    assert foreign <= {"lap_ext", "safetensors", "torch"}
    assert len([name for name in more if name.startswith("torch.")]) < 10, more
