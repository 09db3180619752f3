# SPDX-License-Identifier: MIT
"""lap-ext score: the figures of the table, the file, folders streamed, and what can go wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lap_ext
from lap_ext.checkpoint import passes
from lap_ext.cli import score
from lap_ext.masks import file
from tests.helpers.command_line import Run, change, dense, one_line


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names in the same order, dtypes and bits."""
    assert list(found) == list(expected)
    for name, scores in expected.items():
        assert found[name].dtype == scores.dtype and torch.equal(found[name], scores), name


def quantile(values: list[float], tenths: int) -> float:
    """The first of the sorted values that so many tenths of all do not exceed."""
    return next(
        x for x in sorted(values) if 10 * sum(y <= x for y in values) >= tenths * len(values)
    )


# --- factories ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "norm", "lamp"])
def test_factory(run: Run, tmp_path: Path, normalize: str) -> None:
    status, out, _ = run("score", "nets:net", "--normalize", normalize, "--out", "s", "--json")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    scores = lap_ext.scores(net, torch.zeros(1, 8), normalize=normalize)
    same(load_file(tmp_path / "s"), scores)
    told = json.loads(out)
    assert status == 0 and told["out"] == "s"
    assert [row["name"] for row in told["layers"]] == ["0", "2"]
    for row in told["layers"]:
        values = scores[row["name"]].double().flatten().tolist()
        names = {"min": 0, "10%": 1, "median": 5, "90%": 9, "max": 10}
        assert row["quantiles"] == {k: quantile(values, max(1e-9, q)) for k, q in names.items()}
        assert row["energy"] == pytest.approx(math.fsum(x * x for x in values), rel=1e-12)
        assert (row["weights"], row["zeros"]) == (len(values), values.count(0.0))
        assert row["dtype"] == str(scores[row["name"]].dtype).removeprefix("torch.")


def test_table(run: Run, tmp_path: Path) -> None:
    """3 -> 2 -> 1 with a dead unit: |w| times what is behind and before it."""
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
    found = load_file(tmp_path / "s")
    assert list(found) == ["2"]
    assert torch.equal(found["2"], dense()["2.weight"].abs())
    head = int.from_bytes((tmp_path / "s").read_bytes()[:8], "little")
    assert head % 8 == 0  # the tensors are aligned
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.metadata() == {
            "lap_ext": lap_ext.__version__, "criterion": "magnitude", "normalize": "none",
            "bn": "paper",
        }  # fmt: skip


def test_layers_without_weights_and_infinite_scores(run: Run, tmp_path: Path) -> None:
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
    layer = type("Layer", (), {"name": "no", "kind": "linear", "shape": (0, 3)})
    row = score._row(layer, torch.zeros(0, 3))  # type: ignore[arg-type]
    assert (row["quantiles"]["median"], row["energy"], row["weights"]) == (None, 0.0, 0)
    assert score._table([row]).splitlines()[2].split() == ["no", "0x3", "0", "0.00%", "0"]


# --- folders --------------------------------------------------------------------------------------


def in_memory(folder: Path, **options: Any) -> dict[str, Tensor]:
    """The scores of the same model, loaded by transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers loads the folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.zeros(1, 4, dtype=torch.int64)
    return lap_ext.scores(model, (), kwargs={"input_ids": ids}, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"normalize": "norm", "criterion": "magnitude", "exclude": "lm_*"}),
        ("llama", {"criterion": "random"}),
        ("gpt2", {"normalize": "lamp"}),
    ],
    ids=str,
)
def test_folder(
    run: Run, folders: Path, tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    before = {path.name: path.read_bytes() for path in (folders / name).iterdir()}
    given = [part for key, value in options.items() for part in (f"--{key}", value)]
    status, out, error = run("score", folders / name, *given, "--out", "s", "--json")
    assert (status, error) == (0, "")
    same(load_file(tmp_path / "s"), in_memory(folders / name, **options))
    assert {row["kind"] for row in json.loads(out)["layers"]} <= {"linear", "embedding", "conv1d"}
    assert {path.name: path.read_bytes() for path in (folders / name).iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "s"}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_folders_of_other_dtypes(
    run: Run, folders: Path, tmp_path: Path, kind: torch.dtype
) -> None:
    shutil.copytree(folders / "llama", tmp_path / "other")
    for path in (tmp_path / "other").glob("*.safetensors"):
        tensors = {name: value.to(kind) for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["dtype"] = str(kind).removeprefix("torch.")
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert run("score", "other", "--out", "s")[0] == 0
    same(load_file(tmp_path / "s"), in_memory(tmp_path / "other"))


def test_norms_are_read_where_they_are_needed(
    run: Run, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "measure", lambda task: pytest.fail("nothing asks for norms"))
    assert run("score", folders / "llama", "--criterion", "magnitude")[0] == 0


def test_small_memory(
    run: Run, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go by a few at a time, with the same bits."""
    runs: list[int] = []
    of = passes.scorer

    def counted(*given: Any) -> Any:
        scorer = of(*given)
        return lambda weight, first: runs.append(weight.numel()) or scorer(weight, first)  # type: ignore[func-returns-value]

    monkeypatch.setattr(passes, "scorer", counted)
    assert run("score", folders / "llama", "--memory", "40KB", "--out", "s")[0] == 0
    assert max(runs) < 768 and len(runs) > 20  # the largest layer is 48x16
    line = one_line(run("score", folders / "llama", "--memory", "3KB", "--out", "t"))
    assert "(a row of layer 'model.layers.0.mlp.down_proj'" in line and "got 3,000" in line
    line = one_line(run("score", folders / "llama", "--memory", "45KB", "--normalize", "lamp"))
    needed = 16 * 4 * 768
    assert f"more than {needed:,} bytes (all scores of layer" in line and "got 45,000" in line
    assert not (tmp_path / "t").exists()
    same(load_file(tmp_path / "s"), in_memory(folders / "llama"))


# --- what can go wrong ----------------------------------------------------------------------------


def test_out_is_a_new_file_elsewhere(run: Run, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llama", tmp_path / "llama")
    before = {path.name: path.read_bytes() for path in (tmp_path / "llama").iterdir()}
    shard = next(name for name in before if name.startswith("model-00001"))
    for out, said in (
        (f"llama/{shard}", "expected --out to be a new file, got"),
        ("nets.py", "expected --out to be a new file, got 'nets.py'"),
        ("llama/s", "expected --out outside of 'llama', got 'llama/s'"),
        ("llama/../llama/s", "expected --out outside of 'llama'"),
        ("no/s", "No such folder (no)"),
    ):
        assert said in one_line(run("score", "llama", "--out", out))
    assert {path.name: path.read_bytes() for path in (tmp_path / "llama").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "llama"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_nothing_half_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    rows, of = [], score._row

    def fail(*given: Any) -> Any:
        rows.append(given)
        if len(rows) == 2:  # the first layer is in the file
            raise error
        return of(*given)

    monkeypatch.setattr(score, "_row", fail)
    shown = run("score", "nets:net", "--out", "s")
    if error is KeyboardInterrupt:
        assert shown == (130, "", "lap-ext score: stopped. 's' was not written.\n")
    else:
        assert one_line(shown) == "lap-ext score: No space left (s).\n"
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py"}


def test_full_disk_is_known_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(score.shutil, "disk_usage", lambda path: Usage)
    monkeypatch.setattr(file, "_replacing", None)  # not even begun
    assert "on the disk of 's', got 100 that are free" in one_line(
        run("score", "nets:net", "--out", "s")
    )


def test_a_folder_has_no_checkpoint_option(run: Run, folders: Path) -> None:
    for verb in ("score", "inspect", "bench"):
        line = one_line(run(verb, folders / "llama", "--input", "1x3"))
        assert "expected --checkpoint and --input with a factory only" in line
    assert "--memory with a folder only" in one_line(run("score", "nets:net", "--memory", "1GB"))


def test_damaged_folder(run: Run, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llama", tmp_path / "bad")
    change(tmp_path / "bad", "lm_head.weight", lambda w: w[0, 0].fill_(torch.nan))
    assert "finite" in one_line(run("score", "bad", "--out", "s"))
    os.truncate(next((tmp_path / "bad").glob("model-00002*")), 3000)
    assert "Download it again" in one_line(run("score", "bad", "--out", "s"))
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "bad"}
