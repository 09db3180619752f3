# SPDX-License-Identifier: MIT
"""lap-ext prune --structure channel, head, expert, unit: directories and factories; what shows it.

As the library prunes them; in the result, the record, the masks, verify, the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lap_ext
from lap_ext import allocation, checkpoint
from lap_ext.checkpoint.files import MASKS
from tests.helpers.command_line import Run, dense, one_line

GPT2 = "gpt2"
WAYS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("llama", ["--structure", "head", "-s0.5"], {"sparsity": 0.5, "structure": "head"}),
    (
        GPT2,
        ["--structure", "unit", "--params", "0.9", "--scope", "global", "--cost", "weights"],
        {"sparsity": allocation.params(0.9), "structure": "unit", "scope": "global",
         "cost": "weights"},
    ),
    (
        GPT2,
        ["--structure", "head", "--flops", "0.9", "--uniform"],
        {"sparsity": allocation.flops(0.9), "structure": "head", "uniform": True},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argv", "given"), WAYS, ids=["sparsity", "params", "flops"])
def test_a_directory(
    run: Run, checkpoints: Path, tmp_path: Path, name: str, argv: list[str], given: dict[str, Any]
) -> None:
    original = checkpoints / name
    status, out, error = run("prune", original, *argv, "--out", "a", "--report", "a.html", "--json")
    assert status == 0, error
    shown = json.loads(out)
    result = checkpoint.prune(original, tmp_path / "b", **given)
    assert (tmp_path / "a" / MASKS).read_bytes() == (tmp_path / "b" / MASKS).read_bytes()
    counts = [(x.name, x.kept, x.total) for x in result.families]
    assert [(x["name"], x["kept"], x["total"]) for x in shown["families"]] == counts
    assert [tuple(x.values()) for x in shown["fixed"]] == list(result.fixed)
    assert shown["measured"]["families"] == [
        {"name": family, "kept": kept, "total": total} for family, kept, total in counts
    ]
    recorded = json.loads((tmp_path / "a" / "lap_ext.json").read_text())
    assert recorded["asked"] == shown["asked"]
    assert recorded["asked"]["structure"] == given["structure"]
    assert {"cost", "uniform"} <= recorded["asked"].keys()
    assert (recorded["asked"].get("params") is None) == ("--params" not in argv)
    rows = {row.name for row in result.layers}
    vectors = {x: [int(m.sum()), m.numel()] for x, m in result.masks.items() if x not in rows}
    assert recorded["vectors"] == vectors and bool(vectors) == (name == GPT2)

    status, out, _ = run("verify", "a", original, "--json")
    verdict = json.loads(out)
    assert (status, verdict["findings"]) == (0, [])
    assert (verdict["kept"], verdict["total"]) == (result.kept, result.total)
    assert run("report", "a", "-o", "again.html")[0] == 0
    assert run("inspect", "a")[0] == 0
    for page in ("a.html", "again.html"):
        text = (tmp_path / page).read_text()
        assert f"{given['structure']}s of" in text and '<h2 id="units">' in text
        assert "Fixed: " in text
        for _, kept, total in counts:
            assert f"{total - kept:,} of {total:,}" in text


def test_the_library_and_the_command_verify_alike(
    run: Run, checkpoints: Path, tmp_path: Path
) -> None:
    """A bias that is no longer zero, or that has changed, is a finding; so is its wrong count."""
    argv = ["--structure", "unit", "-s0.5", "--out", "a"]
    assert run("prune", checkpoints / GPT2, *argv)[0] == 0
    masks = lap_ext.Masks.load(tmp_path / "a" / MASKS)
    (name,) = (x for x in masks if x.endswith("c_fc.bias"))
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    assert not tensors[name][~masks[name]].any() and tensors[name].count_nonzero() == 0
    tensors[name] = tensors[name] + 1.0
    save_file(tensors, file, {"format": "pt"})
    status, out, _ = run("verify", "a", checkpoints / GPT2)
    kept, gone = int(masks[name].sum()), int((~masks[name]).sum())
    assert status == 1
    assert f"{name}: {kept} kept weights differ from the original\n" in out
    assert f"{name}: {gone} pruned weights are not zero\n" in out
    record = tmp_path / "a" / "lap_ext.json"
    facts = json.loads(record.read_text())
    facts["vectors"][name][0] -= 1
    record.write_text(json.dumps(facts))
    assert f"{name}: (kept, total) is ({kept}, {kept + gone}) in the masks, ({kept - 1}, " in run(
        "verify", "a", checkpoints / GPT2
    )[1]  # fmt: skip
    facts["families"][0]["layers"] = 3
    record.write_text(json.dumps(facts))
    assert "lap_ext.json: it is damaged\n" in run("verify", "a", checkpoints / GPT2)[1]
    line = one_line(run("verify", "a", checkpoints / GPT2, "-s0.5"))
    assert "expected no --sparsity for masks of structure 'unit'" in line


def test_a_factory(run: Run, tmp_path: Path) -> None:
    """net is [16, 8] and [4, 16]: 16 channels between them."""
    argv = ["--structure", "channel", "-s0.5", "--out", "out", "--report", "page.html"]
    status, out, error = run("prune", "nets:net", *argv)
    assert status == 0, error
    assert "channels of  kept  of  removed" in out
    assert "0               8  16   50.00%" in out
    assert "Fixed: 4 channels of '2' (an output of the model)." in out
    masks = lap_ext.Masks.load(tmp_path / "out" / MASKS)
    assert masks.structure == "channel" and set(masks) == {"0", "2", "0.bias"}
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    assert bool((pruned["0.bias"] == 0).equal(~masks["0.bias"]))
    weights = tmp_path / "dense.safetensors"
    save_file(dense(), weights)
    assert run("verify", "out", weights)[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "channels of" in page and "8 of 16" in page
    assert run("report", "out", "nets:net", "-o", "again.html")[0] == 0
    assert "channels of" in (tmp_path / "again.html").read_text()


CHANNELS = ["--structure", "channel"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (CHANNELS, "expected --sparsity, the fraction to remove, got none."),
        ([*CHANNELS, "-s0.5", "--params", "0.5"], "expected --params alone (it says what remains)"),
        ([*CHANNELS, "--flops", "0.5", "--params", "9"], "expected --flops alone"),
        (["--params", "0.5"], "expected --structure channel, head, expert or unit with --params"),
        (["--structure", "row", "--flops", "9"], "expert or unit with --flops, got row"),
        ([*CHANNELS, "--params", "1.5"], "expected --params to be what remains: a fraction"),
        ([*CHANNELS, "--params", "x"], "expected a number such as 10 or 0.01, got 'x'"),
        ([*CHANNELS, "--params", "3"], "expected a --params of at least 17 parameters, which"),
        ([*CHANNELS, "--params", "999"], "expected --params <= 212, the parameters of the dense"),
        ([*CHANNELS, "-s0.5", "--order", "forward"], "expected --order parallel with --structure"),
        ([*CHANNELS, "-s0.5", "--cost", "time"], "expected one of weights, flops, got 'time'"),
        (["-s0.5", "--cost", "flops"], "'expert' or 'unit') with --cost, got none"),
        (["-s0.5", "--structure", "row", "--uniform"], "or 'unit') with --uniform, got"),
        (["--structure", "head", "-s0.5"], "expected a model with units for --structure head, got"),
        ([*CHANNELS, "-serk:0.5"], "for --structure channel, got erk(sparsity=0.5)"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes(run: Run, tmp_path: Path, argv: list[str], said: str) -> None:
    assert said in one_line(run("prune", "nets:net", "--out", "out", *argv))
    assert not (tmp_path / "out").exists()
