# SPDX-License-Identifier: MIT
"""lap-ext prune, verify and inspect on small checkpoints, sharded and tied, and on damaged ones."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint.files import MASKS
from lap_ext.cli import output
from tests.helpers.checkpoints import change
from tests.helpers.command_line import Run, one_line


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pruned_reported_verified(run: Run, checkpoints: Path, name: str, tmp_path: Path) -> None:
    original = checkpoints / name
    before = {path.name: path.read_bytes() for path in original.iterdir()}
    status, out, _ = run(
        "prune", original, "--sparsity", 0.75, "--out", "out", "--report", "out.html", "--json"
    )
    shown = json.loads(out)
    assert status == 0
    assert shown["asked"]["sparsity"] == ["0.75"]
    for row in shown["layers"]:
        assert row["kept"] == (row["total"] + 2) // 4
    assert {path.name: path.read_bytes() for path in original.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "out", "out.html"}
    page = (tmp_path / "out.html").read_text()
    assert all(row["name"].replace(".", ".<wbr>") in page for row in shown["layers"])
    assert "lowest score kept" in page and page.count("lowest kept") >= len(shown["layers"])
    assert f"lap-ext prune {original} --sparsity 0.75 --out out" in page
    assert "time taken" in page and f"torch {torch.__version__}" in page
    (load,) = re.findall("<pre.*?<code>(.*?)</code>", page, re.DOTALL)
    loaded: dict[str, Any] = {}
    exec(html.unescape(load), loaded)  # it is run as it is shown
    assert set(loaded["masks"]) == {row["name"] for row in shown["layers"]}
    pruned = sum(row["total"] - row["kept"] for row in shown["layers"])
    zeros = sum(int((p == 0).sum()) for p in loaded["model"].parameters() if p.dim() > 1)
    assert pruned == zeros
    measured = {row["name"]: row for row in shown["measured"]["layers"]}
    assert {n: (m["kept"], m["total"]) for n, m in measured.items()} == {
        row["name"]: (row["kept"], row["total"]) for row in shown["layers"]
    }
    assert all(0.25 < row["mass"] < 1 for row in measured.values())
    status, out, _ = run("verify", "out", original, "--json")
    verdict = json.loads(out)
    assert (status, verdict["findings"]) == (0, [])
    assert verdict["kept"] == shown["kept"] and verdict["masks"]
    status, out, _ = run("inspect", "out", "--json")
    rows = json.loads(out)["layers"]
    assert status == 0
    nonzero = {r["name"]: r["weights"] - r["zeros"] for r in rows}
    assert nonzero.keys() - shown["left_dense"].keys() == {r["name"] for r in shown["layers"]}
    assert all(nonzero[r["name"]] == r["kept"] for r in shown["layers"])


def test_equals_the_library(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    """The command passes its options on."""
    run(
        "prune",
        checkpoints / "llama",
        "--sparsity",
        "0.6",
        "--scope",
        "global",
        "--criterion",
        "magnitude",
        "--layers",
        "model.*",
        "--exclude",
        "*.k_proj",
        "--memory",
        "1GB",
        "--out",
        "a",
    )
    checkpoint.prune(
        checkpoints / "llama",
        tmp_path / "b",
        0.6,
        scope="global",
        criterion="magnitude",
        layers=["model.*"],
        exclude=["*.k_proj"],
    )
    shards = sorted(tmp_path.glob("b/*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    status, out, _ = run("verify", "a", checkpoints / "llama")
    assert status == 0 and "every kept weight has its original's bits" in out


@pytest.mark.parametrize("model", ["directory", "factory"])
def test_rounds_orders_and_statistics(
    model: str, run: Run, checkpoints: Path, tmp_path: Path
) -> None:
    """With a report, whose scores are those of the unpruned weights; verify knows the result."""
    source = checkpoints / "llama"
    names = [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")]
    squares = {f"{name}.mean_square": torch.rand(24 if "down" in name else 16) for name in names}
    save_file({name: x.double() for name, x in squares.items()}, tmp_path / "statistics")
    given = [source, "--sparsity", "0.6", "--layers", "*.mlp.*"]
    if model == "factory":
        (tmp_path / "nets.py").write_text(LOADED.format(str(source)))
        given[0] = "nets:llama"
    how = ["--order", "backward", "--rounds", "2", "--report", "a.html"]
    what = ["--criterion", "wanda", "--statistics", "statistics", "--report", "b.html"]
    for out, options in (("a", how), ("b", what)):
        status, shown, error = run("prune", *given, *options, "--out", out, "--json")
        assert status == 0, error
        asked = json.loads(shown)["asked"]
        assert json.loads((tmp_path / out / "lap_ext.json").read_text())["asked"] == asked
        if model == "directory":
            assert run("verify", out, source)[0] == 0
    assert (asked["order"], asked["rounds"], asked["statistics"]) == ("parallel", 1, "statistics")
    every: dict[str, Any] = {"layers": "*.mlp.*"}
    checkpoint.prune(source, tmp_path / "c", 0.6, order="backward", rounds=2, **every)
    data = tmp_path / "statistics"
    checkpoint.prune(source, tmp_path / "d", 0.6, criterion="wanda", data=data, **every)
    for mine, theirs in (("a", "c"), ("b", "d")):
        masks = [lap_ext.Masks.load(tmp_path / x / MASKS) for x in (mine, theirs)]
        assert masks[0] == masks[1]
    page = (tmp_path / "a.html").read_text()
    assert "backward" in page and "lowest score kept" in page


LOADED = """
import torch, transformers
def llama():
    model = transformers.LlamaForCausalLM.from_pretrained({!r})
    return model, {{"input_ids": torch.ones(1, 8, dtype=torch.int64)}}
"""


@pytest.fixture
def pruned(run: Run, checkpoints: Path, tmp_path: Path) -> Path:
    assert run("prune", checkpoints / "llama", "--sparsity", "0.5", "--out", "out")[0] == 0
    return tmp_path / "out"


def test_verify_finds_what_was_changed(run: Run, checkpoints: Path, pruned: Path) -> None:
    change(pruned, "model.norm.weight", lambda weight: weight[3].fill_(7))
    status, out, error = run("verify", pruned, checkpoints / "llama")
    assert (status, error) == (1, "")
    assert "model.norm.weight: 1 elements differ from the original\n1 findings in" in out
    status, out, _ = run("verify", pruned, checkpoints / "llama", "--json")
    shown = json.loads(out)
    assert status == 1 and not shown["ok"]
    assert shown["findings"] == [
        {
            "tensor": "model.norm.weight",
            "problem": "1 elements differ from the original",
            "count": 1,
        }
    ]
    assert list(shown) == [
        "ok",
        "findings",
        "tensors",
        "masks",
        "structure",
        "files",
        "unpruned",
        "kept",
        "total",
        "sparsity",
        "layers",
    ]


def test_verify_sparsity(run: Run, checkpoints: Path, pruned: Path) -> None:
    """As recorded, or as the option says."""
    assert run("verify", pruned, checkpoints / "llama")[0] == 0
    assert run("verify", pruned, checkpoints / "llama", "--sparsity", "0.5")[0] == 0
    status, out, _ = run("verify", pruned, checkpoints / "llama", "--sparsity", "*up_proj=0.75")
    assert status == 1
    assert "up_proj: " in out and "a sparsity of *up_proj=0.75 keeps" in out
    command = "verify", pruned, checkpoints / "llama", "--sparsity", "0.5", "--scope", "global"
    assert run(*command)[0] == 0
    line = one_line(run("verify", pruned, checkpoints / "llama", "--sparsity", "half"))
    assert "expected --sparsity to be a number (the fraction removed), got 'half'." in line


def test_verify_damaged_files(run: Run, checkpoints: Path, pruned: Path) -> None:
    (pruned / "lap_ext.json").write_text('{"layers": [3]}')
    status, out, _ = run("verify", pruned, checkpoints / "llama")
    assert status == 1 and "lap_ext.json: it is damaged" in out
    os.truncate(pruned / "lap_ext_masks.safetensors", 20)
    line = one_line(run("verify", pruned, checkpoints / "llama"))
    assert line.startswith("lap-ext verify: expected a file written by Masks.save")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: os.truncate(next(f.glob("model-00002*")), 3000), "Download it again"),
        (lambda f: next(f.glob("model-00002*")).unlink(), "model-00002"),
        (lambda f: next(f.glob("model-00002*")).write_bytes(b"\xff" * 64), "safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: change(f, "lm_head.weight", lambda w: w[0, 0].fill_(torch.nan)), "finite"),
    ],
    ids=["truncated", "missing", "hostile", "no config", "damaged config", "nan"],
)
def test_bad_checkpoints(
    run: Run, checkpoints: Path, tmp_path: Path, harm: Callable[[Path], object], said: str
) -> None:
    shutil.copytree(checkpoints / "llama", tmp_path / "bad")
    harm(tmp_path / "bad")
    line = one_line(run("prune", "bad", "--sparsity", "0.5", "--out", "out"))
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "bad"}


def test_interrupted_pruning_resumes(
    run: Run, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "prune", checkpoints / "llama", "--sparsity", "0.5", "--out", "out"

    def stop(self: output.Progress, facts: checkpoint.Progress) -> None:
        if facts.step == "write":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.Progress, "follow", stop)
        status, _, error = run(*command)
    assert status == 130 and "Run the same command again to resume" in error
    assert not (tmp_path / "out").exists()
    assert run(*command)[0] == 0
    assert run("verify", "out", checkpoints / "llama")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "out"}
