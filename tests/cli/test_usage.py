# SPDX-License-Identifier: MIT
"""What lap-ext says to who uses it for the first time: help, short options, suggestions, cures."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from lap_ext import criteria, errors
from lap_ext.cli import commands, main, parser
from tests.helpers.command_line import Run, one_line

PRUNE = ["prune", "nets:net", "-s", "0.5", "-o", "out"]


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"]], ids=" ".join)
def test_the_command_alone_shows_help(run: Run, argv: list[str]) -> None:
    status, out, error = run(*argv)
    assert (status, error) == (0, "") and out.startswith("usage: lap-ext")


def test_help_of_a_subcommand(run: Run) -> None:
    for name in commands.COMMANDS:
        assert run("help", name) == run(name, "--help")
    assert "Did you mean 'prune'?" in one_line(run("help", "prun"))


def test_short_options(run: Run, tmp_path: Path) -> None:
    assert run("-V") == run("--version")
    status, out, _ = run(*PRUNE, "--json")
    assert status == 0 and json.loads(out)["asked"]["sparsity"] == ["0.5"]
    assert run("score", "nets:net", "-o", "s.safetensors")[0] == 0
    assert run("verify", "out", "s.safetensors", "-s0.5")[0] in (1, 2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["prun"], "Did you mean 'prune'?"),
        (["prune", "a", "--sparsty", "0.5", "--out", "x"], "Did you mean '--sparsity'?"),
        (["prune", "a", "--sparsty=0.5", "--out", "x"], "no option --sparsty."),
        (["prune", "a", "-s", "0.5", "-o", "x", "--scope", "globl"], "Did you mean 'global'?"),
        (["score", "a", "--criterion", "lookahed"], "Did you mean 'lookahead'?"),
        ([*PRUNE, "--layers", "conv*"], "The layers are 0, 2."),
        (["prune", "nets:deep", "-s", "0.5", "-o", "o", "--layers", "encodr.*"],
         "Did you mean 'encoder.*'?"),
        (["prune", "nets:deep", "-s", "encoder=0.5", "-o", "o"], "Did you mean 'encoder.*'?"),
        (["prune", "nets:deep", "-s", "0.5", "-o", "o", "--exclude", "encoder.fcs"],
         "Did you mean 'encoder.fc' or"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_did_you_mean(run: Run, tmp_path: Path, argv: list[str], said: str) -> None:
    with (tmp_path / "nets.py").open("a") as file:
        file.write("""
def deep():
    modules = {"fc": nn.Linear(8, 4), "act": nn.ReLU(), "out": nn.Linear(4, 4)}
    parts = {"encoder": nn.Sequential(), "head": nn.Linear(4, 2)}
    for name, module in modules.items():
        parts["encoder"].add_module(name, module)
    model = nn.Sequential()
    for name, module in parts.items():
        model.add_module(name, module)
    return model, torch.zeros(1, 8)
""")
    line = one_line(run(*argv))
    assert said in line, line


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "gpt2"])
@pytest.mark.parametrize("subcommand", ["inspect", "score"])
def test_a_name_of_the_hub(run: Run, name: str, subcommand: str) -> None:
    short = name.rpartition("/")[2]
    said = f"hf download {name} --local-dir ./{short}, then lap-ext {subcommand} ./{short}."
    assert said in one_line(run(subcommand, name))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "../x"])
def test_a_path_is_no_name_of_the_hub(run: Run, name: str) -> None:
    assert "hf download" not in one_line(run("inspect", name))


def test_criteria_that_need_data(run: Run) -> None:
    """All names are known, and a file of statistics is asked for where it is needed only."""
    builtin = {name for name, kind in criteria.REGISTRY.items() if isinstance(kind, type)}
    assert {*parser._CRITERIA, *parser.WITH_DATA} == builtin
    for name in parser.WITH_DATA:
        assert issubclass(type(criteria.of(name)), criteria.DataCriterion)
        for command in (PRUNE, ("score", "nets:net")):
            line = one_line(run(*command, "--criterion", name))
            assert f"expected --statistics for criterion '{name}', got none. In Python, " in line
    line = one_line(run(*PRUNE, "--statistics", "nets.py"))
    assert "expected no --statistics for criterion 'lookahead'" in line
    line = one_line(run(*PRUNE, "--criterion", "wanda", "--statistics", "no"))
    assert line.endswith("expected --statistics to be a file, got 'no'.\n")
    line = one_line(run(*PRUNE, "--criterion", "wanda", "--statistics", "nets.py"))
    assert "expected a complete safetensors file of statistics in --statistics" in line
    assert all(name in run("prune", "--help")[1].replace("\n", " ") for name in parser.WITH_DATA)


def test_orders_and_rounds(run: Run) -> None:
    line = one_line(run(*PRUNE, "--order", "forward", "--scope", "global"))
    assert "expected --order parallel with --scope global" in line
    assert "Use --rounds to score anew" in line
    assert "expected an integer >= 1, got '0'" in one_line(run(*PRUNE, "--rounds", "0"))


# --- what is spelled for whom it is shown to ------------------------------------------------------


def test_an_error_of_options(run: Run) -> None:
    """uniform_plus keeps more than is to be left, and has a cure in another option."""
    line = one_line(run("prune", "nets:net", "-s", "uniform_plus:0.99", "-o", "out"))
    assert "Use erk, uniform or --scope global." in line


def test_a_config_without_a_model(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "gpt2", tmp_path / "gpt2")
    (tmp_path / "gpt2/config.json").unlink()
    line = one_line(run("inspect", "gpt2"))
    assert "Pass a factory (package.module:factory) and --input." in line


def test_a_warning_of_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(options: object) -> int:
        errors.warn("All is dense. Give {normalize='lamp'} or {on_unsupported=\"cut\"}.")
        return 0

    monkeypatch.setitem(commands.COMMANDS, "prune", warned)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        line = run(*PRUNE)[2]
    said = "All is dense. Give --normalize lamp or --on-unsupported cut.\n"
    assert line == f"lap-ext prune: warning: {said}"
    with pytest.warns(errors.LapWarning, match=r"^All is dense. Give normalize='lamp' or "):
        warned(None)


# --- one line, and what fits ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (PRUNE, "96 of 192 weights kept, sparsity 50.00%; written: out\n"),
        (["score", "nets:net"], "2 layers scored\n"),
        (["inspect", "nets:net"], "2 layers, 192 weights, 0.00% of them zero; 848 bytes\n"),
        (["info"], "; CPU: "),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_quiet_prints_one_line(run: Run, argv: list[str], said: str) -> None:
    status, out, error = run(*argv, "--quiet")
    assert (status, error) == (0, "") and said in out and out.count("\n") == 1


def test_quiet_verdicts_and_reports(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    dense = checkpoints / "llama"
    assert run("prune", dense, "-s", "0.5", "-o", "out", "--quiet")[1].count("\n") == 1
    status, out, _ = run("verify", "out", dense, "--quiet")
    assert status == 0 and out.startswith("ok: ") and out.count("\n") == 1
    status, out, _ = run("verify", dense, "out", "--quiet")
    assert status == 1 and "wrong order" in out and out.count("\n") == 1
    status, out, _ = run("verify", dense, dense, "--quiet")
    assert status == 1 and "nothing is pruned" in out
    assert run("report", "out", "--quiet") == (0, "written: out.html\n", "")
    page = (tmp_path / "out.html").read_text()
    assert "model.layers.0.self_attn.q_proj" in page and "lookahead" in page


def test_inspect_fits_the_terminal(
    run: Run, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = run("inspect", checkpoints / "llama")[1]
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "72")
        patch.setattr(type(sys.stdout), "isatty", lambda self: True)
        narrow = run("inspect", checkpoints / "llama")[1]
        assert run("inspect", checkpoints / "llama", "--wide")[1] == wide
    assert max(map(len, narrow.splitlines())) <= 72 < max(map(len, wide.splitlines()))
    assert "..." in narrow and "more" not in wide


# --- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["out"], ["out.json"]], ids=" ".join)
def test_the_page_of_an_earlier_result(run: Run, tmp_path: Path, given: list[str]) -> None:
    """The same figures as those of the page that prune itself makes."""
    given = [*given, "nets:net"]
    status, out, _ = run(*PRUNE, "--report", "first.html", "--json")
    (tmp_path / "out.json").write_text(out)
    measured = json.loads(out)["measured"]
    status, out, error = run("report", *given, "--json", "-o", "page.html")
    shown = json.loads(out)
    assert (status, error) == (0, "")
    assert shown["measured"] == measured and shown["out"] == "page.html"
    page = (tmp_path / "page.html").read_text()
    assert "<dt>scope</dt><dd><code>layer</code></dd>" in page


def test_the_name_of_a_page(run: Run, tmp_path: Path) -> None:
    """That of the directory, dots and all."""
    assert run("prune", "nets:net", "-s", "0.5", "-o", "net-0.5")[0] == 0
    assert run("report", "net-0.5", "nets:net")[0] == 0
    assert (tmp_path / "net-0.5.html").is_file()


def test_reports_that_cannot_be_made(run: Run, tmp_path: Path) -> None:
    run(*PRUNE)
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "bare.json").write_text("{}")
    for argv, said in (
        (["nowhere"], "expected RESULT to be a directory that prune has written"),
        (["bare.json"], "expected RESULT to be a file with what prune has printed with --json"),
        (["out", "nets:net", "-o", "mine.html"], "add --force"),
        (["out", "nets:net", "-o", "out/page.html"], "--out apart from RESULT"),
        (["out", "nowhere"], "no such directory"),
    ):
        assert said in one_line(run("report", *argv)), argv
    assert run("report", "out", "nets:net", "-o", "mine.html", "--force")[0] == 0
    record = json.loads((tmp_path / "out/lap_ext.json").read_text())
    (tmp_path / "out/lap_ext.json").write_text(json.dumps(record | {"model": None}))
    assert "expected MODEL (the original" in one_line(run("report", "out"))
    evil = {"out": "out", "model": "evil:net"}  # a file of someone else's must run no code
    (tmp_path / "evil.json").write_text(json.dumps(evil))
    (tmp_path / "evil.py").write_text("raise SystemExit('sprung')")
    line = one_line(run("report", "evil.json"))
    assert "got a result of 'evil:net', which is no directory here. Give it after RESULT." in line
    (tmp_path / "out/lap_ext_masks.safetensors").unlink()
    assert "lap_ext_masks.safetensors, got 'out' without" in one_line(
        run("report", "out", "nets:net")
    )


def test_exit_status_of_the_entry_point() -> None:
    assert main(["help", "info"]) == 0
