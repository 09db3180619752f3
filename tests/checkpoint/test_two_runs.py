# SPDX-License-Identifier: MIT
"""Two runs that write one output at the same time: one of them does, the other says so."""

from __future__ import annotations

import collections
import fcntl
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lap_ext.checkpoint import pruning, state
from tests.helpers.checkpoints import network, prune, write
from tests.helpers.interrupted import SHARDS, WORK, contents, interrupt
from tests.helpers.processes import run_python


@pytest.mark.parametrize("left", [False, True])
def test_another_run_that_ends_before_the_lock(
    left: bool, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output came after ours was checked; what an earlier run has left does not matter."""
    if left:
        interrupt(dense, count=2)
    real = pruning.working

    def second(*args: Any) -> Any:
        monkeypatch.setattr(pruning, "working", real)
        prune(dense, tmp_path / "out")
        return real(*args)

    monkeypatch.setattr(pruning, "working", second)
    with pytest.raises(
        OSError, match=r"expected out not to exist.* another run that has just ended"
    ):
        prune(dense, tmp_path / "out")
    monkeypatch.undo()
    prune(dense, tmp_path / "full")
    assert contents(tmp_path / "out") == contents(tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "full", "out"]


def test_a_lock_that_is_removed_while_it_is_taken(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that fails at that moment: the lock on a file without a name excludes nobody."""
    real, left = fcntl.flock, [2]

    def flock(file: Any, how: int) -> None:
        if left[0]:
            left[0] -= 1
            shutil.rmtree(tmp_path / WORK)
            if left[0]:  # and a third run has begun
                (tmp_path / WORK).mkdir()
                (tmp_path / WORK / "lock").touch()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    prune(dense, tmp_path / "out")
    assert not left[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


def test_a_run_that_fails_takes_nothing_from_the_next(tmp_path: Path) -> None:
    """The lock goes last: until then, nobody else is at work in the directory."""
    source = write(tmp_path / "dense", network().state_dict(), SHARDS)
    interrupt(source)
    real, locked = shutil.rmtree, []

    def rmtree(path: Any, *args: Any, **options: Any) -> None:
        locked.append((tmp_path / WORK / "lock").exists())
        real(path, *args, **options)
        locked.append((tmp_path / WORK / "lock").exists())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(ValueError, match="wrong"):
            with state.working(tmp_path / "out", {}, False):
                raise ValueError("wrong")
    assert locked and all(locked)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


RACE = """
    import os, sys, traceback
    from pathlib import Path
    from lap_ext.checkpoint import state
    from lap_ext.errors import LapError

    def write(out):
        with state.working(out, {}, True) as work:
            (work.files / "x").write_text("done")
            work.finish(out)

    def run(out, ready, go):
        os.write(ready, b"r")
        os.read(go, 1)
        try:
            write(out)
            return 0
        except LapError as error:
            return 1
        except BaseException:
            traceback.print_exc()
            return 2

    for number in range(ROUNDS):
        out = Path(ROOT) / f"out{number}"
        ready, go = os.pipe(), os.pipe()
        children = []
        for _ in range(3):
            child = os.fork()
            if not child:
                os._exit(run(out, ready[1], go[0]))
            children.append(child)
        for _ in children:
            os.read(ready[0], 1)
        os.write(go[1], b"ggg")
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        left = sorted(path.name for path in Path(ROOT).glob(f"*out{number}*"))
        print(ends.count(0), ends.count(2), *left)
        for end in (*ready, *go):
            os.close(end)
"""


def test_many_races(tmp_path: Path) -> None:
    """Three processes at a time, without a trace before: they meet in every step."""
    rounds = 20
    code = textwrap.dedent(RACE).replace("ROUNDS", str(rounds)).replace("ROOT", repr(str(tmp_path)))
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    seen = collections.Counter(run.stdout.splitlines())
    expected = [f"1 0 out{number}" for number in range(rounds)]
    assert sorted(seen) == sorted(expected), run.stderr
