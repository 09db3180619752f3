# SPDX-License-Identifier: MIT
"""lap-ext prune, verify and inspect on small Hugging Face folders, sharded and tied; bad folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lap_ext
from lap_ext import checkpoint
from lap_ext.cli import output
from tests.helpers.command_line import Run, change, one_line


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_folder_pruned_reported_verified(
    run: Run, folders: Path, name: str, tmp_path: Path
) -> None:
    original = folders / name
    before = {path.name: path.read_bytes() for path in original.iterdir()}
    status, out, _ = run(
        "prune", original, "--sparsity", 0.75, "--out", "out", "--report", "out.html", "--json"
    )
    told = json.loads(out)
    assert status == 0
    assert told["asked"]["sparsity"] == ["0.75"]
    for row in told["layers"]:
        assert row["kept"] == (row["total"] + 2) // 4
    assert {path.name: path.read_bytes() for path in original.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "out", "out.html"}
    page = (tmp_path / "out.html").read_text()
    assert all(row["name"] in page for row in told["layers"])
    assert "lowest score kept" in page and page.count("lowest kept") >= len(told["layers"])
    measured = {row["name"]: row for row in told["measured"]["layers"]}
    assert {n: (m["kept"], m["total"]) for n, m in measured.items()} == {
        row["name"]: (row["kept"], row["total"]) for row in told["layers"]
    }
    assert all(0.25 < row["mass"] < 1 for row in measured.values())
    status, out, _ = run("verify", "out", original, "--json")
    verdict = json.loads(out)
    assert (status, verdict["findings"]) == (0, [])
    assert verdict["kept"] == told["kept"] and verdict["masks"]
    status, out, _ = run("inspect", "out", "--json")
    rows = json.loads(out)["layers"]
    assert status == 0
    assert {r["name"]: r["weights"] - r["zeros"] for r in rows} == {
        r["name"]: r["kept"] for r in told["layers"]
    }


def test_folder_equals_the_library(run: Run, folders: Path, tmp_path: Path) -> None:
    """The command passes its options on."""
    run("prune", folders / "llama", "--sparsity", "0.6", "--scope", "global", "--criterion",
        "magnitude", "--exclude", "lm_*", "--memory", "1GB", "--out", "a")  # fmt: skip
    checkpoint.prune(folders / "llama", tmp_path / "b", 0.6, scope="global",
                     criterion="magnitude", exclude=["lm_*"])  # fmt: skip
    shards = sorted(tmp_path.glob("b/*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    status, out, _ = run("verify", "a", folders / "llama")
    assert status == 0 and "every kept weight has its original's bits" in out


@pytest.fixture
def pruned(run: Run, folders: Path, tmp_path: Path) -> Path:
    assert run("prune", folders / "llama", "--sparsity", "0.5", "--out", "out")[0] == 0
    return tmp_path / "out"


def test_verify_finds_what_was_changed(run: Run, folders: Path, pruned: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    masks = lap_ext.Masks.load(pruned / "lap_ext_masks.safetensors")
    kept = masks[name].nonzero()[:2].tolist()
    gone = (~masks[name]).nonzero()[0].tolist()

    def edit(weight: torch.Tensor) -> None:
        weight[tuple(kept[0])] *= 1.01
        weight[tuple(kept[1])] = 0.0
        weight[tuple(gone)] = -0.0  # zero, but not the zero that is written

    change(pruned, f"{name}.weight", edit)
    change(pruned, "model.norm.weight", lambda weight: weight[3].fill_(7))
    status, out, _ = run("verify", pruned, folders / "llama", "--json")
    assert status == 1
    assert {(x["tensor"], x["problem"]) for x in json.loads(out)["findings"]} == {
        (f"{name}.weight", "2 kept weights differ from the original (1 of them zero)"),
        (f"{name}.weight", "1 pruned weights are not zero"),
        ("model.norm.weight", "1 elements differ from the original"),
    }


def test_verify_counts(run: Run, folders: Path, pruned: Path) -> None:
    """A mask with a weight less is found though weights and mask agree."""
    path = pruned / "lap_ext_masks.safetensors"
    masks = {name: mask.clone() for name, mask in lap_ext.Masks.load(path).items()}
    first = tuple(masks["lm_head"].nonzero()[0].tolist())
    masks["lm_head"][first] = False
    lap_ext.Masks(masks).save(path)
    change(pruned, "lm_head.weight", lambda weight: weight[first].zero_())
    status, out, _ = run("verify", pruned, folders / "llama")
    assert status == 1
    assert "lm_head: (kept, total) is (383, 768) in the masks, (384, 768) recorded" in out
    assert "lm_head: 383 weights are kept, a sparsity of 0.5 keeps 384" in out
    (pruned / "lap_ext.json").unlink()
    assert run("verify", pruned, folders / "llama")[0] == 0
    assert run("verify", pruned, folders / "llama", "--sparsity", "0.5")[0] == 1


def test_verify_damaged_files(run: Run, folders: Path, pruned: Path) -> None:
    (pruned / "lap_ext.json").write_text('{"layers": [3]}')
    status, out, _ = run("verify", pruned, folders / "llama")
    assert status == 1 and "lap_ext.json: it is damaged" in out
    save_file({"lm_head": torch.zeros(3)}, pruned / "lap_ext_masks.safetensors")
    line = one_line(run("verify", pruned, folders / "llama"))
    assert "expected a file written by Masks.save" in line
    os.truncate(pruned / "lap_ext_masks.safetensors", 20)
    one_line(run("verify", pruned, folders / "llama"))


def test_verify_without_masks(run: Run, folders: Path, pruned: Path) -> None:
    (pruned / "lap_ext_masks.safetensors").unlink()
    (pruned / "lap_ext.json").unlink()
    status, out, _ = run("verify", pruned, folders / "llama")
    assert status == 0 and "zeros were taken for pruned" in out
    assert run("verify", pruned, folders / "llama", "--sparsity", "0.5")[0] == 0
    change(pruned, "lm_head.weight", lambda weight: weight[0, 0].fill_(5))
    assert run("verify", pruned, folders / "llama")[0] == 1


def test_verify_other_tensors(run: Run, folders: Path, pruned: Path) -> None:
    status, out, _ = run("verify", pruned, folders / "gpt2")
    assert status == 1
    assert "the pruned checkpoint lacks it" in out and "the original does not have it" in out


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
def test_bad_folders(
    run: Run, folders: Path, tmp_path: Path, harm: Callable[[Path], object], said: str
) -> None:
    shutil.copytree(folders / "llama", tmp_path / "bad")
    harm(tmp_path / "bad")
    line = one_line(run("prune", "bad", "--sparsity", "0.5", "--out", "out"))
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "bad"}


def test_interrupted_folder_goes_on(
    run: Run, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "prune", folders / "llama", "--sparsity", "0.5", "--out", "out"

    def stop(self: output.Progress, facts: checkpoint.Progress) -> None:
        if facts.step == "write":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.Progress, "follow", stop)
        status, _, error = run(*command)
    assert status == 130 and "the same command goes on" in error
    assert not (tmp_path / "out").exists()
    assert run(*command)[0] == 0
    assert run("verify", "out", folders / "llama")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "out"}
