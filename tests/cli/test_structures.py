# SPDX-License-Identifier: MIT
"""lap-ext prune --structure, on directories and factories; what shows it afterwards."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint.files import MASKS
from lap_ext.cli import parser
from tests.helpers.command_line import Run, dense, one_line

STRUCTURES: list[tuple[list[str], dict[str, Any]]] = [
    (["--structure", "2:4"], {"structure": "2:4"}),
    (
        ["--structure", "row", "-s0.6", "--aggregate", "mean", "--multiple-of", "2"],
        {"sparsity": 0.6, "structure": "row", "aggregate": "mean", "multiple_of": 2},
    ),
    (
        ["--structure", "4x8", "-s0.5", "--scope", "global", "--min-keep", "1"],
        {"sparsity": 0.5, "structure": "4x8", "scope": "global", "min_keep": 1},
    ),
]


@pytest.mark.parametrize(("argv", "given"), STRUCTURES, ids=["2:4", "row", "4x8"])
def test_a_directory(
    run: Run, checkpoints: Path, tmp_path: Path, argv: list[str], given: dict[str, Any]
) -> None:
    """As the library prunes it; in the result, the record, the masks, verify, inspect, pages."""
    original = checkpoints / "llama"
    status, out, error = run("prune", original, *argv, "--out", "a", "--report", "a.html", "--json")
    assert status == 0, error
    shown, structure = json.loads(out), given["structure"]
    result = checkpoint.prune(original, tmp_path / "b", **given)
    masks = lap_ext.Masks.load(tmp_path / "a" / MASKS)
    assert masks == result.masks and masks.structure == result.structure == structure
    assert (tmp_path / "a" / MASKS).read_bytes() == (tmp_path / "b" / MASKS).read_bytes()
    assert shown["structure"] == structure == shown["asked"]["structure"]
    assert {row["name"]: row["units"] for row in shown["layers"]} == {
        row.name: row.units and list(row.units) for row in result.layers
    }
    assert {row["name"]: row["units"] for row in shown["measured"]["layers"]} == {
        row["name"]: row["units"] for row in shown["layers"]
    }
    recorded = json.loads((tmp_path / "a" / "lap_ext.json").read_text())
    assert recorded["asked"] == shown["asked"]
    assert ("sparsity" in given) == (recorded["asked"]["sparsity"] is not None)

    status, out, _ = run("verify", "a", original, "--json")
    verdict = json.loads(out)
    assert (status, verdict["findings"], verdict["structure"]) == (0, [], structure)
    assert f"The masks are of structure {structure}." in run("verify", "a", original)[1]
    assert json.loads(run("inspect", "a", "--json")[1])["structure"] == structure
    assert f"\npruned with structure {structure}\n" in run("inspect", "a")[1]

    assert run("report", "a", "-o", "again.html")[0] == 0
    for page in ("a.html", "again.html"):
        text = (tmp_path / page).read_text()
        assert f"structure <code>{structure}</code>" in text
        for kept, total in result.units.values():
            assert f">{kept} of {total}</td>" in text
        assert ("units kept" in text) == bool(result.units)


def test_a_factory(run: Run, tmp_path: Path) -> None:
    """All of net's layers: [16, 8] and [4, 16]."""
    status, out, _ = run("prune", "nets:net", "--structure", "row", "-s0.5", "--out", "out")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].endswith("  units")
    assert [line.split("%")[1].strip() for line in lines[2:5]] == ["8 of 16", "2 of 4", "10 of 20"]
    assert lap_ext.Masks.load(tmp_path / "out" / MASKS).structure == "row"


def test_a_layer_that_it_does_not_fit(run: Run, tmp_path: Path) -> None:
    argv = ["prune", "nets:net", "--structure", "2:16", "--out", "out"]
    line = one_line(run(*argv, "--strict", "--quiet"))
    assert "expected layers that 2:16 fits, got '0' (2:16: 16 does not divide its 8 inputs)" in line
    assert line.endswith("Exclude them, or leave out --strict.\n")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, out, error = run(*argv)
    assert status == 0 and "warning: 2:16 does not fit some layers, which stay dense: '0'" in error
    assert "The structure does not fit: '0' (2:16: 16 does not divide its 8 inputs)." in out
    assert "Name them" not in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "expected --sparsity, the fraction to remove, got none. Only an N:M structure has"),
        (["--structure", "row"], "expected --sparsity, the fraction to remove, got none."),
        (
            ["--structure", "2:4", "-s0.5"],
            "expected no --sparsity with --structure 2:4, which itself says how many weights are",
        ),
        (["--structure", "2:4x"], "expected --structure to be 'N:M' (such as '2:4', "),
        (["--structure", "4:2"], "got 4:2. Did you mean 2:4?"),
        (["--structure", "groups", "-s0.5"], "expected --structure to be 'N:M'"),
        (["-s0.5", "--aggregate", "mean"], "expected --structure with --aggregate"),
        (["-s0.5", "--multiple-of", "2"], "expected --structure with --multiple-of"),
        (["-s0.5", "--strict"], "expected --structure with --strict"),
        (["--structure", "2:4", "--scope", "global"], "expected no --scope with --structure 2:4"),
        (["--structure", "row", "-s0.5", "--multiple-of", "0"], "expected an integer >= 1, got"),
        (["--structure", "row", "-s0.5", "--aggregate", "sum"], "expected one of energy, mean"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes(run: Run, tmp_path: Path, argv: list[str], said: str) -> None:
    assert said in one_line(run("prune", "nets:net", "--out", "out", *argv))
    assert not (tmp_path / "out").exists()


def test_verify_counts_whole_units(run: Run, tmp_path: Path) -> None:
    """At most as many weights as the sparsity keeps; one unit even where none would fit."""
    argv = ["--structure", "row", "-s0.9", "--out", "out"]
    assert run("prune", "nets:net", *argv)[0] == 0  # 1 of 4 rows is more than a tenth
    weights = tmp_path / "dense.safetensors"
    save_file(dense(), weights)
    assert run("verify", "out", weights)[0] == 0
    record = tmp_path / "out" / "lap_ext.json"
    text = record.read_text()
    record.write_text(text.replace('"0.9"', '"0.99"'))
    assert run("verify", "out", weights)[0] == 0, "one unit of each layer"
    record.write_text(text.replace('"row"', '"column"').replace('"0.9"', '"0.95"'))
    assert run("verify", "out", weights)[0] == 0
    two = text.replace("1,\n        16", "2,\n        16").replace('"0.9"', '"0.95"')
    record.write_text(two)
    status, out, _ = run("verify", "out", weights)
    assert status == 1
    assert "0: 8 weights are kept, a sparsity of 0.95 keeps at most 6" in out
    record.write_text(text.replace('"row"', '"rows"'))
    status, out, _ = run("verify", "out", weights)
    assert status == 1 and "lap_ext.json: it is damaged" in out


def test_help_and_completion_have_it() -> None:
    assert parser.spellings("prune")["structure"] == "--structure"
    pytest.importorskip("shtab", reason="shtab writes completion scripts")
    assert "--structure" in parser.completion("bash")
