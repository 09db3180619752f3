# SPDX-License-Identifier: MIT
"""lap-ext that is stopped by a signal, or whose output nobody reads: status and text."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from lap_ext.cli import commands, output
from tests.helpers.command_line import Run

ROOT = Path(__file__).parents[2]
TRAP = """
import os
try:
    os.kill(os.getpid(), {number})
    for _ in range(1000): pass
except BaseException:
    {then}
"""
STOPPED = [
    (signal.SIGTERM, 143, ""),
    (signal.SIGINT, 130, "lap-ext prune: stopped. 'out' was not written.\n"),
]


@pytest.fixture
def heard() -> Iterator[None]:
    """A process in the background may have been started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "status", "said"), STOPPED, ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    "then",
    [
        "raise",
        "raise ImportError('broken')",
        "raise RuntimeError('x') from None",
        "raise SystemExit",
    ],
    ids=["as it is", "as ImportError", "as RuntimeError", "as SystemExit"],
)
def test_a_signal_in_an_import(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int, said: str,
    then: str,
) -> None:  # fmt: skip
    """Whatever the imported module makes of it."""
    (tmp_path / "trap.py").write_text(TRAP.format(number=int(number), then=then))
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    shown = run("prune", "trap:net", "--sparsity", "0.5", "--out", "out")
    assert shown == (status, "", said)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_a_signal_while_torch_is_imported(tmp_path: Path) -> None:
    """The command as users start it."""
    trap = TRAP.format(number=int(signal.SIGTERM), then="raise ImportError('torch is broken')")
    (tmp_path / "torch.py").write_text(trap)
    shown = subprocess.run(
        [sys.executable, "-m", "lap_ext", "inspect", "nets:net"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (shown.returncode, shown.stdout, shown.stderr) == (143, b"", b"")


def test_an_ignored_signal_stays_ignored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job that a shell without job control has put into the background."""
    seen: list[Any] = []

    def see(options: object) -> int:
        seen.append(signal.getsignal(signal.SIGINT))
        return 0

    monkeypatch.setitem(commands.COMMANDS, "info", see)  # type: ignore[arg-type]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("info")[0] == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN]


# --- streams --------------------------------------------------------------------------------------


@pytest.fixture
def unread() -> Iterator[IO[str]]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@pytest.mark.parametrize(
    "argv", [["info"], ["info", "--json"], ["--help"], ["--completion", "bash"]], ids=" ".join
)
def test_nobody_reads_the_output(
    run: Run, unread: IO[str], monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    if "--completion" in argv:
        pytest.importorskip("shtab", reason="shtab writes the scripts")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", unread)
        assert run(*argv) == (141, "", "")


@pytest.mark.parametrize(("argv", "status"), [(["info"], 0), (["inspect", "nowhere"], 2)], ids=str)
def test_nobody_reads_the_errors(
    run: Run, unread: IO[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], status: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", unread)
        assert run(*argv)[0] == status


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids=" ".join)
def test_closed_streams(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: list[str]
) -> None:
    """The work is done where a stream was closed from the start, as by >&- in a shell."""
    with monkeypatch.context() as patch:
        for name in closed:
            patch.setattr(sys, name, None)
        assert run("prune", "nets:net", "--sparsity", "0.5", "--out", "out")[0] == 0
        assert run("prune", "nets:net", "--sparsity", "0.5", "--out", "out")[0] == 2
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["\N{GREEK SMALL LETTER ALPHA}", "\udc80"], ids=ascii)
def test_letters_that_the_terminal_lacks(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        output.result(Namespace(json=False, quiet=False), {}, name)
    assert stream.buffer.getvalue().decode() == f"{ascii(name)[1:-1]}\n"


def test_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"a": [math.nan, 1.5], "b": {"c": math.inf, "d": (-math.inf, "x", None, 3)}}
    output.result(Namespace(json=True, quiet=False), facts, "")
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"a": ["nan", 1.5], "b": {"c": "inf", "d": ["-inf", "x", None, 3]}}
