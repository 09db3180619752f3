# SPDX-License-Identifier: MIT
"""Runs that stop in the middle: nothing is there under its name, and the next run goes on."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import signal
import textwrap
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lap_ext.checkpoint import Progress, reading, shards
from lap_ext.criteria.context import Network
from lap_ext.pruning import pipeline
from tests.helpers.checkpoints import network, prune, write
from tests.helpers.interrupted import SHARDS, WORK, contents, facts, interrupt, stopping
from tests.helpers.processes import run_python


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "dense", network().state_dict(), SHARDS)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "step, count", [("measure", 1), ("measure", 3), ("write", 1), ("write", 5)]
)
def test_a_stopped_run_goes_on(
    scope: str, step: str, count: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = prune(source, tmp_path / "full", scope=scope)
    with pytest.raises(KeyboardInterrupt):
        stop = stopping(step, count, KeyboardInterrupt())
        prune(source, tmp_path / "out", scope=scope, on_progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lap_ext", "dense", "full"]
    before = facts(tmp_path / WORK)
    monkeypatch.setattr(pipeline, "_live_counts", every_weight)  # reads a bit
    monkeypatch.setattr(reading.Source, "fill", counted(reading.Source.fill, read := []))
    seen: list[Progress] = []
    again = prune(source, tmp_path / "out", scope=scope, on_progress=seen.append)
    assert list(again.layers) == list(full.layers)
    assert contents(tmp_path / "out") == contents(tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "full", "out"]
    assert not {name for name, _ in read} & set(before["done"])
    assert ("measure" in {x.step for x in seen}) == (step == "measure")
    assert seen[-1].done == seen[-1].total


def every_weight(scoring: Any) -> dict[str, int]:
    """Counts the weights of layers without reading them: none is zero."""
    return {layer.name: math.prod(layer.shape) for layer in scoring.plan.layers}


def counted(real: Callable[..., None], read: list[tuple[str, int]]) -> Callable[..., None]:
    """Notes where weights are read; what is smaller is a norm's."""

    def fill(self: Any, entry: Any, offset: int, into: memoryview) -> None:
        if entry.size > 1000:
            read.append((entry.shard, offset))
        real(self, entry, offset, into)

    return fill


def test_finished_shards_are_not_written_again(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", on_progress=stopping("write", 4, KeyboardInterrupt()))
    files = tmp_path / ".out.lap_ext" / "files"
    (name, *_) = facts(tmp_path / WORK)["done"]
    before = (files / name).stat()
    prune(source, tmp_path / "out")
    after = (tmp_path / "out" / name).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


CHANGES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "sparsity": (lambda path: None, {"sparsity": 0.5}, "is of other options"),
    "scope": (lambda path: None, {"scope": "global"}, "is of other options"),
    "criterion": (lambda path: None, {"criterion": "magnitude"}, "is of other options"),
    "touched": (
        lambda path: os.utime(path / f"model-00001-of-0000{SHARDS}.safetensors"),
        {},
        "is of this directory before its files have changed",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_task_starts_anew(name: str, source: Path, tmp_path: Path) -> None:
    """The result is as if nothing had been there; what differs is said in one warning."""
    interrupt(source)
    change, options, text = CHANGES[name]
    change(source)
    with pytest.warns(UserWarning, match=rf"^The pruning starts anew: .* {text}\.$") as caught:
        prune(source, tmp_path / "out", **options)
    assert len(caught) == 1 and caught[0].filename.endswith("helpers/checkpoints.py")
    prune(source, tmp_path / "full", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "full")


def test_what_is_not_to_be_resumed_is_not_mentioned(source: Path, tmp_path: Path) -> None:
    interrupt(source)
    prune(source, tmp_path / "out", 0.5, resume=False)
    prune(source, tmp_path / "full", 0.5)
    assert contents(tmp_path / "out") == contents(tmp_path / "full")


def test_a_run_that_stopped_before_its_first_note(source: Path, tmp_path: Path) -> None:
    """Only its lock, or a note that is not complete, is there: nothing is lost, nothing said."""
    (tmp_path / WORK).mkdir()
    for name in ("lock", "state.json.part"):
        (tmp_path / WORK / name).write_text("{")
    prune(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


def test_without_resume_nothing_is_left(source: Path, tmp_path: Path) -> None:
    for step in ("measure", "write"):
        with pytest.raises(KeyboardInterrupt):
            stop = stopping(step, 2, KeyboardInterrupt())
            prune(source, tmp_path / "out", resume=False, on_progress=stop)
        assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_files_that_change_meanwhile(source: Path, tmp_path: Path) -> None:
    def touch(progress: Progress) -> None:
        os.utime(source / f"model-00001-of-0000{SHARDS}.safetensors")

    with pytest.raises(ValueError, match="expected files that do not change while"):
        prune(source, tmp_path / "out", on_progress=touch)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_files_that_become_shorter_meanwhile(source: Path, tmp_path: Path) -> None:
    def shorten(progress: Progress) -> None:
        os.truncate(source / f"model-0000{SHARDS}-of-0000{SHARDS}.safetensors", 400)

    with pytest.raises(ValueError, match="expected files that do not change while they are read"):
        prune(source, tmp_path / "out", on_progress=shorten)


def test_a_killed_run_goes_on(source: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a shard: not even a finally runs."""
    prune(source, tmp_path / "full")
    code = f"""
        import os, signal
        from pathlib import Path
        from tests.helpers.checkpoints import prune
        left = [5]
        def stop(progress):
            left[0] -= progress.step == "write"
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        prune(Path({str(source)!r}), Path({str(tmp_path / "out")!r}), on_progress=stop)
    """
    run = run_python(textwrap.dedent(code))
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "out").exists()
    assert facts(tmp_path / WORK)["done"]
    prune(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "full")


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_is_told_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 1000))
    with pytest.raises(
        OSError, match=r"expected [\d,]+ bytes on the disk .*, got 1,000 bytes"
    ) as e:
        prune(source, tmp_path / "out", resume=False)
    assert e.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("where", ["header", "layer", "copied", "masks", "others", "state"])
def test_a_disk_that_becomes_full(
    where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]
    with monkeypatch.context() as patched:
        fill_up(patched, where, full)
        with pytest.raises(OSError, match=r"expected space on the disk of .*, got none. Free") as e:
            prune(source, tmp_path / "out")
    assert e.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()
    prune(source, tmp_path / "out")
    prune(source, tmp_path / "full")
    assert contents(tmp_path / "out") == contents(tmp_path / "full")


def fill_up(monkeypatch: pytest.MonkeyPatch, where: str, full: list[bool]) -> None:
    """Makes the system's calls fail where a real disk would: at the second shard, or at the end."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "masks":
        monkeypatch.setattr(os, "pwrite", fail)
    elif where == "others":
        monkeypatch.setattr(shutil, "copyfileobj", fail)
    elif where == "state":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        real, calls = shards.ShardFile.write, [{"header": 1, "layer": 2, "copied": 3}[where]]

        def write(self: Any, data: Any) -> None:
            calls[0] -= 1
            self._file = self._file if calls[0] else Failing(self._file, fail)
            real(self, data)

        monkeypatch.setattr(shards.ShardFile, "write", write)


class Failing:
    """A file that cannot be written."""

    def __init__(self, file: Any, fail: Any) -> None:
        self.write, self.fileno, self.close = fail, file.fileno, file.close


def test_one_run_at_a_time(source: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.lap_ext"
    work.mkdir()
    with (work / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="expected one process at a time that writes"):
            prune(source, tmp_path / "out")
    prune(source, tmp_path / "out")


def test_squared_norms_are_taken_from_an_interrupted_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ones in their place give another result: the weights are not measured again."""
    real = Network.squared_norms
    with monkeypatch.context() as patched:
        patched.setattr(
            Network, "squared_norms", lambda self: {n: x.sqrt() for n, x in real(self).items()}
        )
        interrupt(source, count=1)
    prune(source, tmp_path / "out")
    prune(source, tmp_path / "full")
    assert contents(tmp_path / "out") != contents(tmp_path / "full")
