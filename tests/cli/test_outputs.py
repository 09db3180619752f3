# SPDX-License-Identifier: MIT
"""No output is an input, lies in one or is another output; files of other kinds are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from socket import AF_UNIX, socket

import pytest
from safetensors.torch import save_file

import lap_ext
from lap_ext.report import kinds
from tests.helpers.command_line import Run, dense, one_line

PRUNE = ["prune", "nets:net", "--sparsity", "0.5", "--out", "out"]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def check_refused(run: Run, directory: Path, argv: list[str], *said: str) -> None:
    """One line that names the options, and no file has changed."""
    before, names = contents(directory), sorted(directory.rglob("*"))
    line = one_line(run(*argv))
    assert all(text in line for text in said), line
    assert contents(directory) == before and sorted(directory.rglob("*")) == names


# --- inputs ---------------------------------------------------------------------------------------


@pytest.fixture
def model(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory `in` of the Hub's cache: config.json is a link to a file outside of it."""
    directory = tmp_path / "models--a--b/snapshots"
    shutil.copytree(checkpoints / "llama", directory / "in")
    (directory / "../blobs").mkdir()
    (directory / "in/config.json").rename(directory / "../blobs/1234")
    (directory / "in/config.json").symlink_to("../../blobs/1234")
    (directory / "link.html").symlink_to("in/generation_config.json")
    (directory / "new.html").symlink_to("in/new.html")
    (directory / "inner").symlink_to("in")
    os.link(directory / "in/generation_config.json", directory / "hard.html")
    monkeypatch.chdir(directory)
    return directory / "in"


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize(
    "more",
    [
        ["--report", "in/model.safetensors.index.json"],
        ["--report", "in/config.json"],
        ["--report", "in/../in/r.html"],
        ["--report", "link.html"],
        ["--report", "new.html"],
        ["--report", "inner/r.html"],
        ["--report", "../blobs/1234"],
        ["--report", "hard.html"],
        ["--plot", "in/p.png"],
        ["--plot", "inner/p.pdf"],
        ["--out", "in/out"],
        ["--out", "inner/out"],
    ],
    ids=" ".join,
)
def test_outputs_in_the_model(
    run: Run, model: Path, tmp_path: Path, more: list[str], force: list[str]
) -> None:
    argv = ["prune", "in", "--sparsity", "0.5", "--out", "out", *more, *force]
    check_refused(run, tmp_path, argv, more[0], "MODEL, which is only read")


@pytest.mark.parametrize("name", ["w.png", "link.png", "hard.png", "./x/../w.png"])
@pytest.mark.parametrize("option", ["--report", "--plot"])
def test_an_output_is_the_checkpoint(run: Run, tmp_path: Path, name: str, option: str) -> None:
    save_file(dense(), tmp_path / "w.png")
    os.link(tmp_path / "w.png", tmp_path / "hard.png")
    (tmp_path / "link.png").symlink_to("w.png")
    (tmp_path / "x").mkdir()
    argv = [*PRUNE, "--checkpoint", "w.png", option, name, "--force"]
    check_refused(run, tmp_path, argv, option, "--checkpoint")


def test_the_second_plot_is_the_checkpoint(run: Run, tmp_path: Path) -> None:
    save_file(dense(), tmp_path / "p-distributions.png")
    argv = [*PRUNE, "--checkpoint", "p-distributions.png", "--plot", "p.png", "--force"]
    check_refused(run, tmp_path, argv, "--plot", "--checkpoint")


def test_scores_never_replace_a_file(run: Run, tmp_path: Path) -> None:
    save_file(dense(), tmp_path / "w.safetensors")
    argv = ["score", "nets:net", "--checkpoint", "w.safetensors", "--out", "w.safetensors"]
    check_refused(run, tmp_path, argv, "--out", "--checkpoint")
    argv = ["score", "nets:net", "--out", "w.safetensors"]
    check_refused(run, tmp_path, argv, "--out to be a new file")


# --- other outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--report", "x.png", "--plot", "x.png"], ["--plot", "--report", "'x.png'"]),
        (["--report", "x.png", "--plot", "./a/../x.png"], ["--plot", "--report"]),
        (
            ["--report", "x-distributions.png", "--plot", "x.png"],
            ["--plot", "--report", "'x-distributions.png'"],
        ),
        (["--report", "link.png", "--plot", "x.png"], ["--plot", "--report"]),
        (["--report", "X.png", "--plot", "x.png"], ["--plot", "--report"]),
        (["--report", "out"], ["--report", "--out"]),
        (["--report", "out/model.safetensors"], ["--report", "--out"]),
        (["--plot", "out/x.png"], ["--plot", "--out"]),
        (["--report", ".out.lap_ext/r.html"], ["--report", "--out"]),
    ],
    ids=[
        "same",
        "same path",
        "second plot",
        "link",
        "case",
        "out",
        "in out",
        "plot in out",
        "work",
    ],
)
def test_outputs_that_are_one(run: Run, tmp_path: Path, more: list[str], said: list[str]) -> None:
    for name in ("out", "a", ".out.lap_ext"):
        (tmp_path / name).mkdir()
    (tmp_path / "link.png").symlink_to("x.png")
    check_refused(run, tmp_path, [*PRUNE, *more, "--force"], *said)


@pytest.mark.parametrize("more", [["--report", ""], ["--plot", ""], ["--report", "."]], ids=str)
def test_no_name_at_all(run: Run, tmp_path: Path, more: list[str]) -> None:
    check_refused(run, tmp_path, [*PRUNE, *more], "expected a")
    check_refused(run, tmp_path, [*PRUNE[:-1], "/"], "--out to be a new directory")


def test_the_directory_where_it_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be replaced, and relative paths would lead nowhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check_refused(run, tmp_path, [*PRUNE[:-1], "."], "--out to be a new directory")


def test_an_earlier_result_is_replaced_by_force(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only then: another directory never is, and an error leaves the old one."""
    assert run(*PRUNE)[0] == 0
    before = contents(tmp_path / "out")
    check_refused(run, tmp_path, PRUNE, "--out to be a new directory", "add --force to replace")
    again = ["prune", "nets:net", "-s", "0.75", "-o", "out", "--force"]
    check_refused(run, tmp_path, [*again[:3], "7", *again[4:]], "expected 0 <= --sparsity <= 1")
    check_refused(run, tmp_path, [*again, "--exclude", "x"], "name a layer")
    with monkeypatch.context() as patch:

        def stop(*given: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(lap_ext.Masks, "save", stop)
        assert run(*again) == (130, "", "lap-ext prune: stopped. 'out' is as it was.\n")
        assert contents(tmp_path / "out") == before
    assert run(*again)[0] == 0 and contents(tmp_path / "out") != before
    assert {x.name for x in tmp_path.iterdir()} == {"nets.py", "out"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    check_refused(run, tmp_path, [*again[:5], "mine", "--force"], "--out to be a new directory")
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", "../out"):
        check_refused(run, tmp_path, [*again[:5], out, "--force"], "--out to be a new directory")


def test_what_lies_around_a_result_that_is_replaced(
    run: Run, checkpoints: Path, tmp_path: Path
) -> None:
    """A link stays a link; an original that lies in it is never lost."""
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert run(*PRUNE)[0] == run(*PRUNE, "--force")[0] == 0 and (tmp_path / "out").is_symlink()
    shutil.copytree(checkpoints / "llama", tmp_path / "real/inner")
    argv = ["prune", "out/inner", "-s", "0.5", "-o", "out", "--force"]
    check_refused(run, tmp_path, argv, "--out apart from MODEL")
    (tmp_path / ".real.previous").mkdir()
    check_refused(run, tmp_path, [*PRUNE, "--force"], ".real.previous", "Move it back or remove")


# --- files that are there -------------------------------------------------------------------------


def test_a_file_of_another_kind_is_replaced_only_by_force(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a-distributions.png").write_bytes(b"%PDF-1.4")
    (tmp_path / "page.html").write_text('<!doctype html>\n<html lang="en">a page of mine')
    for more in (["--report", "nets.py"], ["--report", "page.html"], ["--plot", "a.png"]):
        check_refused(run, tmp_path, [*PRUNE, *more], more[0], "--force")
    assert run(*PRUNE, "--report", "page.html", "--force")[0] == 0
    assert "lowest kept" in (tmp_path / "page.html").read_text()


def test_what_it_wrote_is_replaced(run: Run, tmp_path: Path) -> None:
    """And what is empty, as from mktemp."""
    report, plots = tmp_path / "r.html", [tmp_path / "p.svg", tmp_path / "p-distributions.svg"]
    report.write_bytes(b"".join(kinds.PAGE))
    plots[0].touch()
    plots[1].write_text("<?xml an old plot")
    assert run(*PRUNE, "--report", "r.html", "--plot", "p.svg")[0] == 0
    assert "lowest kept" in report.read_text() and kinds.is_one(report, kinds.PAGE)
    for plot in plots:
        assert plot.stat().st_size > 1000 and kinds.is_one(plot, kinds.PLOTS[".svg"])


def make_socket(path: Path) -> None:
    with socket(AF_UNIX) as made:
        made.bind(path.name)  # a whole path is too long for it


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "a pipe"),
        (Path.mkdir, "directory"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (make_socket, "a socket"),
    ],
    ids=["pipe", "directory", "loop", "socket"],
)
def test_what_is_no_file_is_never_replaced(
    run: Run, tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    make(tmp_path / "x.png")
    for option in ("--report", "--plot"):
        check_refused(run, tmp_path, [*PRUNE, option, "x.png", "--force"], "x.png", said)


@pytest.mark.parametrize("name", ["a" * 250, "b" * 240])
def test_a_name_that_the_disk_cannot_hold_is_known_before(
    run: Run, tmp_path: Path, name: str
) -> None:
    check_refused(run, tmp_path, [*PRUNE, "--report", f"{name}.html"], "File name too long")
    check_refused(run, tmp_path, [*PRUNE, "--plot", f"{name}.png"], "File name too long")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_known_before(run: Run, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    check_refused(run, tmp_path, [*PRUNE, "--report", "closed/r.html"], "Permission denied")


# --- the demo -------------------------------------------------------------------------------------


def test_the_demo_keeps_a_file_of_another_kind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    monkeypatch.setattr("lap_ext.demo.TRAIN_STEPS", 1)
    monkeypatch.setattr("lap_ext.demo.ROUNDS", (3,))
    argv = ["demo", "--seeds", "1", "--steps", "1", "--out", "plots"]
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/accuracy.png").write_text("mine")
    status, out, error = run(*argv)
    assert status == 2 and "plots/accuracy.png" in error and error.count("\n") == 1
    assert (tmp_path / "plots/accuracy.png").read_text() == "mine" and "dense" not in out
    (tmp_path / "plots/accuracy.png").unlink()
    assert run(*argv)[0] == 0
    assert kinds.is_one(tmp_path / "plots/accuracy.png", kinds.PLOTS[".png"])
