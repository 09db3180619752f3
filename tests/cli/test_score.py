# SPDX-License-Identifier: MIT
"""lap-ext score: its table and JSON, its options, its file, and what can go wrong."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import stream
from tests.helpers.checkpoints import change
from tests.helpers.command_line import Run, dense, one_line

# --- factories ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "norm", "lamp"])
def test_factory(run: Run, tmp_path: Path, normalize: str) -> None:
    status, out, _ = run("score", "nets:net", "--normalize", normalize, "--out", "s", "--json")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    scores = lap_ext.scores(net, torch.zeros(1, 8), normalize=normalize)
    saved = load_file(tmp_path / "s")
    assert list(saved) == list(scores)
    assert all(torch.equal(saved[name], values) for name, values in scores.items())
    shown = json.loads(out)
    assert status == 0
    assert list(shown) == ["model", "criterion", "normalize", "batch_norm", "out", "layers"]
    assert (shown["model"], shown["out"]) == ("nets:net", "s")
    row = shown["layers"][0]
    assert list(row) == [
        "name",
        "kind",
        "shape",
        "dtype",
        "weights",
        "zeros",
        "quantiles",
        "squared_norm",
    ]
    assert (row["name"], row["kind"], row["shape"], row["weights"]) == ("0", "linear", [16, 8], 128)
    assert row["quantiles"]["max"] == scores["0"].max()


def test_table(run: Run, tmp_path: Path) -> None:
    """3 -> 2 -> 1 with a dead unit: |w| times the neighbor norms."""
    (tmp_path / "hand.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))\n"
        "    net[0].weight.data = torch.tensor([[1., -2., 2.], [0., 0., 0.]])\n"
        "    net[2].weight.data = torch.tensor([[-10., 7.]])\n"
        "    return net, torch.zeros(1, 3)\n"
    )
    status, out, error = run("score", "hand:net")
    assert (status, error) == (0, "")
    first, second, both = (line.split() for line in out.splitlines()[2:])
    # 10, 20, 20 and three zeros: 100 + 400 + 400; 10 * |1, -2, 2| = 30 and 7 * 0: 900
    assert first == ["0", "2x3", "6", "50.00%", "0", "0", "0", "20", "20", "900"]
    assert second == ["2", "1x2", "2", "50.00%", "0", "0", "0", "30", "30", "900"]
    assert both == ["all", "8", "50.00%", "1.8e+03"]


def test_options_reach_the_scores(run: Run, tmp_path: Path) -> None:
    run("score", "nets:net", "--criterion", "magnitude", "--exclude", "0", "--out", "s")
    saved = load_file(tmp_path / "s")
    assert list(saved) == ["2"]
    assert torch.equal(saved["2"], dense()["2.weight"].abs())
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.metadata() == {
            "lap_ext": lap_ext.__version__,
            "criterion": "magnitude",
            "normalize": "auto",
            "batch_norm": "edge",
        }


def test_layers_are_chosen(run: Run, tmp_path: Path) -> None:
    assert run("score", "nets:net", "--layers", "0", "--layers", "2", "--exclude", "2")[0] == 0
    run("score", "nets:net", "--layers", "[01]", "--out", "s")
    assert list(load_file(tmp_path / "s")) == ["0"]
    line = one_line(run("score", "nets:net", "--layers", "fc*"))
    assert "expected --layers patterns that name a layer, got 'fc*'" in line


def test_infinite_scores(run: Run, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    net = nn.Sequential(nn.Linear(2, 1, False), nn.Linear(1, 2, False))\n"
        "    net[0].weight.data.fill_(1e30), net[1].weight.data.fill_(1e30)\n"
        "    return net, torch.zeros(1, 2)\n"
    )
    status, out, _ = run("score", "odd:net", "--json")
    assert status == 0 and json.loads(out)["layers"][0]["quantiles"]["max"] == "inf"
    assert run("score", "odd:net")[1].splitlines()[-1].split() == ["all", "4", "0.00%", "inf"]


# --- checkpoint directories -----------------------------------------------------------------------


def test_equals_the_library(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    """The command passes its options on."""
    options = {
        "criterion": "lookback",
        "normalize": "norm",
        "layers": "*",
        "exclude": "lm_*",
        "batch_norm": "ignore",
    }
    given = [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    command = "score", checkpoints / "llama", *given, "--memory", "1MB", "--out", "s", "--json"
    status, out, error = run(*command)
    assert (status, error) == (0, "")
    table = checkpoint.scores(checkpoints / "llama", memory="1MB", **options).save(tmp_path / "t")
    assert (tmp_path / "s").read_bytes() == (tmp_path / "t").read_bytes()
    assert json.loads(out)["layers"] == table.to_dict()["layers"]
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "s", "t"}


def test_small_memory(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    """The messages have the option's word."""
    line = one_line(run("score", checkpoints / "llama", "--memory", "3KB", "--out", "t"))
    assert line.startswith("lap-ext score: expected --memory of")
    assert "a row of layer 'model.layers.0.mlp.down_proj'" in line and "got 3,000" in line
    line = one_line(run("score", checkpoints / "llama", "--memory", "45KB", "--normalize", "lamp"))
    assert line.startswith("lap-ext score: expected --memory of ") and "got 45,000" in line
    assert " bytes of scores of two layers, a row of layer 'model.layers.0.mlp.down_proj'" in line
    assert not (tmp_path / "t").exists()


# --- what can go wrong ----------------------------------------------------------------------------


def test_out_is_a_new_file_elsewhere(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "llama", tmp_path / "llama")
    before = {path.name: path.read_bytes() for path in (tmp_path / "llama").iterdir()}
    shard = next(name for name in before if name.startswith("model-00001"))
    for out, said in (
        (f"llama/{shard}", "expected --out apart from MODEL, which is only read, got"),
        ("nets.py", "expected --out to be a new file, got 'nets.py'"),
        ("llama/s", "expected --out apart from MODEL, which is only read, got 'llama/s'"),
        ("llama/../llama/s", "expected --out apart from MODEL"),
        ("no/s", "expected --out in a directory that exists, got 'no/s'"),
    ):
        assert said in one_line(run("score", "llama", "--out", out))
    assert {path.name: path.read_bytes() for path in (tmp_path / "llama").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "llama"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_nothing_half_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(stream, "figures", fail)
    shown = run("score", "nets:net", "--out", "s")
    if error is KeyboardInterrupt:
        assert shown == (130, "", "lap-ext score: stopped. 's' was not written.\n")
    else:
        assert one_line(shown) == "lap-ext score: No space left (s).\n"
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py"}


def test_a_file_that_appears_meanwhile(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays, and the error is the library's."""
    real = lap_ext.scores

    def slow(*args: Any, **options: Any) -> Any:
        (tmp_path / "s").write_text("theirs")
        return real(*args, **options)

    monkeypatch.setattr(lap_ext, "scores", slow)
    assert "path to be a new file, got 's'" in one_line(run("score", "nets:net", "--out", "s"))
    assert (tmp_path / "s").read_text() == "theirs"


def test_full_disk(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    line = one_line(run("score", "nets:net", "--out", "s"))
    assert line.startswith("lap-ext score: expected ")
    assert "on the disk of 's', got 100 that are free" in line


def test_inputs_of_a_directory(run: Run, checkpoints: Path) -> None:
    """In place of those that follow from the config."""
    for name in ("score", "inspect"):
        status, out, _ = run(name, checkpoints / "llama", "--json")
        assert status == 0
        same = run(name, checkpoints / "llama", "--json", "--input", "input_ids=1x3:int64")
        assert same[:2] == (status, out)
    for name in ("score", "bench"):
        line = one_line(run(name, checkpoints / "llama", "--input", "ids=1x3:int64"))
        assert "got ValueError: You must specify exactly one of input_ids" in line
    line = one_line(run("score", checkpoints / "llama", "--checkpoint", "x.safetensors"))
    assert "expected --checkpoint with a factory only" in line
    assert "--memory with a checkpoint directory only" in one_line(
        run("score", "nets:net", "--memory", "1GB")
    )


def test_damaged_checkpoint(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "llama", tmp_path / "bad")
    change(tmp_path / "bad", "lm_head.weight", lambda w: w[0, 0].fill_(torch.nan))
    assert "finite" in one_line(run("score", "bad", "--out", "s"))
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "bad"}
