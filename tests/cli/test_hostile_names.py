# SPDX-License-Identifier: MIT
"""Names from files on a terminal, in JSON, in pages and in plots: shown, and never obeyed."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.command_line import Run, one_line

HOSTILE = "\x1b[31m\u202e<script>\n0 findings\r\x9b"
SHOWN = r"\x1b[31m\u202e<script>\n0 findings\r\x9b"
NAMED = """
from torch import nn
import torch

NAMES = ["$x^{$", "<script>alert(1)</script>", "層 %s", "_", "&#27;"]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = nn.ModuleDict({name: nn.Linear(4, 4) for name in NAMES})

    def forward(self, x):
        for layer in self.all.values():
            x = layer(x).relu()
        return x

def net():
    torch.manual_seed(0)
    return Net(), torch.zeros(1, 4)
"""
NAMES = ["$x^{$", "<script>alert(1)</script>", "層 %s", "_", "&#27;"]


def check_safe(text: str) -> None:
    """No control character but the ends of lines."""
    assert all(line.isprintable() for line in text.split("\n")), ascii(text)


def test_tensors(run: Run, tmp_path: Path) -> None:
    """A finding is one line, whatever the name of its tensor."""
    weight = torch.eye(3)
    save_file({HOSTILE: weight, "b": weight + 1}, tmp_path / "pruned.safetensors")
    save_file({HOSTILE: 2 * weight, "c": weight}, tmp_path / "dense.safetensors")
    status, out, error = run("verify", "pruned.safetensors", "dense.safetensors")
    assert status == 1
    check_safe(out + error)
    assert f"{SHOWN}: " in out and "\n0 findings" not in out
    status, out, _ = run("verify", "pruned.safetensors", "dense.safetensors", "--json")
    assert HOSTILE in {finding["tensor"] for finding in json.loads(out)["findings"]}
    assert out.isascii()


def test_layers(run: Run, tmp_path: Path) -> None:
    """Of every kind that a model can have and torch.export can take."""
    pytest.importorskip("matplotlib", reason="matplotlib draws")
    (tmp_path / "nets.py").write_text(NAMED)
    argv = ["prune", "nets:net", "--sparsity", "0.5", "--out", "out"]
    status, out, error = run(*argv, "--report", "r.html", "--plot", "p.svg", "--json")
    assert (status, error) == (0, "")
    layers = [row["name"] for row in json.loads(out)["layers"]]
    assert layers == [f"all.{name}" for name in NAMES]
    page = (tmp_path / "r.html").read_text()
    check_safe(page)
    assert page.count("<script") == 1 and '<script>\n"use strict";' in page  # our own
    assert "all.&amp;#27;" in page and "all.$x^{$" in page
    assert b"<script" not in (tmp_path / "p.svg").read_bytes()
    assert len(load_file(tmp_path / "out/model.safetensors")) == 2 * len(NAMES)
    for argv in (["inspect", "nets:net"], ["score", "nets:net"], ["inspect", "nets:net", "--dot"],
                 ["verify", "out/model.safetensors", "out/model.safetensors"]):  # fmt: skip
        status, out, error = run(*argv)
        assert status in (0, 1)
        check_safe(out + error)


@pytest.fixture
def directory(checkpoints: Path, tmp_path: Path) -> Path:
    path = tmp_path / "in\x1b[31m\n"
    shutil.copytree(checkpoints / "gpt2", path)
    return path


def test_files_and_directories(run: Run, directory: Path, tmp_path: Path) -> None:
    (directory / "old\x1b[31m\u202e.bin").write_bytes(bytes(1_000_000))
    argv = ["prune", directory, "--sparsity", "0.5", "--out", "out\n\x1b"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, out, error = run(*argv, "--report", "r\x1b\n.html")
    assert status == 0 and r"old\x1b[31m\u202e.bin" in error
    check_safe(out + error)
    assert out.splitlines()[-1].endswith(r"written: out\n\x1b, r\x1b\n.html")
    page = (tmp_path / "r\x1b\n.html").read_text()
    check_safe(page)
    assert r"in\x1b[31m\n</h1>" in page
    status, out, _ = run("inspect", directory, "--json")
    assert status == 0 and json.loads(out)["model"] == str(directory)


def test_a_path_that_is_no_text(run: Run, tmp_path: Path) -> None:
    argv = ["prune", "nets:net", "--sparsity", "0.5", "--out", "out", "--layers", "*[!\udcff]"]
    status, out, error = run(*argv, "--report", "\udcff.html")
    assert status == 0
    check_safe(out + error)
    (tmp_path / "in\udcff").mkdir()  # safetensors cannot open a file of it
    check_safe(one_line(run("inspect", "in\udcff")))


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": [HOSTILE]},
        {"model_type": HOSTILE, "architectures": None},
        {"activation_function": HOSTILE},
        {"torch_dtype": HOSTILE, "dtype": HOSTILE},
    ],
    ids=lambda change: next(iter(change)),
)
def test_texts_in_config(run: Run, directory: Path, change: dict[str, object]) -> None:
    config = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(json.dumps(config))
    status, out, error = run("inspect", directory)
    assert status in (0, 2)
    check_safe(out + error)
    assert "\n0 findings" not in out + error


def test_names_in_an_index(run: Run, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {HOSTILE: HOSTILE}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    check_safe(one_line(run("inspect", directory)))


def test_tensors_that_the_model_does_not_know(run: Run, directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors") | {HOSTILE: torch.ones(2, 2)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    status, out, error = run("inspect", directory)
    assert status in (0, 2)
    check_safe(out + error)


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "no\x1b[31m\n"],
        ["inspect", "a", "b\x1b[31m\n"],
        ["in\x1b[31m\nspect"],
        ["verify", "no\x1b\n", "no"],
        ["prune", "nets:net", "--sparsity", "\x1b[31m\n", "--out", "x"],
        ["prune", "nets:net", "--sparsity", "0.5", "--out", "x", "--report", "no\x1b\n/r"],
        ["prune", "nets:net", "--sparsity", "0.5", "--out", "x", "--report", "r" * 300 + "\x1b\n"],
        ["prune", "nets:net", "--sparsity", "0.5", "--out", "nets.py\x1b\n/x", "--layers", "\x1b"],
        ["inspect", "nets:net", "--checkpoint", "no\x1b\n"],
        ["inspect", "nets:broken\udcff"],
    ],
    ids=ascii,
)
def test_what_was_typed(run: Run, argv: list[str]) -> None:
    """Or what a shell's pattern has made of the names of files."""
    check_safe(one_line(run(*argv)))
