# SPDX-License-Identifier: MIT
"""Rounds and orders of a checkpoint: the result in memory, however often a run is interrupted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lap_ext
from lap_ext.checkpoint import Progress
from lap_ext.report import Histogram
from tests.helpers.checkpoints import INPUTS, least_memory, network, prune, write
from tests.helpers.interrupted import SHARDS, WORK, contents, facts, interrupt, stopping

WAYS: dict[str, dict[str, Any]] = {
    "forward": {"order": "forward", "rounds": 2},
    "backward": {"order": "backward"},
    "rounds": {"rounds": 3},
    "global": {"rounds": 2, "scope": "global"},
    "norm": {"rounds": 2, "scope": "global", "normalize": "norm"},
    "raw": {"rounds": 2, "scope": "global", "normalize": "none", "min_keep": 0.1},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "dense", network().state_dict(), SHARDS)


def least(source: Path, **options: Any) -> int:
    """The smallest budget, with which no layer of more than a few rows fits."""
    return least_memory(lambda few: prune(source, source.parent / "no", memory=few, **options))


def reports(source: Path, out: Path, **options: Any) -> list[Progress]:
    """What a run reports that nothing stops."""
    seen: list[Progress] = []
    prune(source, out, on_progress=seen.append, **options)
    return seen


@pytest.mark.parametrize("memory", ["least", "4GB"])
@pytest.mark.parametrize("name", WAYS)
def test_a_run_that_is_stopped_anywhere_goes_on(
    name: str, memory: str, source: Path, tmp_path: Path
) -> None:
    """At every kind of step, at its first report, in the middle and at the last one."""
    options = {**WAYS[name], "memory": least(source, **WAYS[name]) if memory == "least" else memory}
    seen = [x.step for x in reports(source, tmp_path / "full", **options)]
    want = contents(tmp_path / "full")
    in_memory = lap_ext.prune(network(), INPUTS, 0.6, apply=False, **WAYS[name])
    assert lap_ext.Masks.load(tmp_path / "full" / "lap_ext_masks.safetensors") == in_memory.masks
    assert {"measure", "rank", "write"} <= set(seen)
    for step in ("measure", "rank", "write"):
        times = seen.count(step)
        counts = {(times + 1) // 2} if memory == "least" else {1, (times + 1) // 2, times}
        for count in sorted(counts):
            interrupt(source, step, count, **options)
            assert not (tmp_path / "out").exists()
            prune(source, tmp_path / "out", **options)
            assert contents(tmp_path / "out") == want, (step, count)
            assert sorted(x.name for x in tmp_path.iterdir()) == ["dense", "full", "out"]
            shutil.rmtree(tmp_path / "out")


def test_a_run_that_is_stopped_again_and_again(source: Path, tmp_path: Path) -> None:
    """Each attempt comes a little further, through two rounds."""
    options = {**WAYS["forward"], "memory": least(source, **WAYS["forward"])}
    prune(source, tmp_path / "full", **options)
    for step in ("measure", "rank", "rank", "write", "write"):
        interrupt(source, step, 2, **options)
    prune(source, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "full")


def test_a_finished_round_is_not_done_again(source: Path, tmp_path: Path) -> None:
    """Nothing is measured or ranked once the last round has ended: only shards are written."""
    work = interrupt(source, "write", 1, **WAYS["forward"])
    assert facts(work)["round"][0] == 2
    assert [x.name for x in (work / "rounds").iterdir()] == ["round 2.safetensors"]
    seen = reports(source, tmp_path / "out", **WAYS["forward"])
    assert {x.step for x in seen} <= {"check", "write"}


def round_file(work: Path) -> Path:
    """The masks of the last round that has ended."""
    return work / "rounds" / f"round {facts(work)['round'][0]}.safetensors"


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def linked(path: Path) -> None:
    """A link to the same masks, and a file that must not be written."""
    shutil.move(path, path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def a_second_name(path: Path) -> None:
    os.link(path, path.parents[2] / "elsewhere")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flipped,
    "gone": Path.unlink,
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "linked": linked,
    "second_name": a_second_name,
    "directory": a_directory,
    "no_directory_of_rounds": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("step", ["rank", "write"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_masks_of_a_round_are_made_anew(
    name: str, step: str, source: Path, tmp_path: Path
) -> None:
    prune(source, tmp_path / "full", **WAYS["forward"])
    work = interrupt(source, step, 5 if step == "rank" else 4, **WAYS["forward"])
    DAMAGE[name](round_file(work))
    elsewhere = tmp_path / "elsewhere"
    before = elsewhere.read_bytes() if elsewhere.exists() else b""
    text = r"damaged in part\. These are done again: the masks of its rounds\.$"
    with pytest.warns(UserWarning, match=text) as caught:
        prune(source, tmp_path / "out", **WAYS["forward"])
    assert len(caught) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "full")
    assert not before or elsewhere.read_bytes() == before
    assert not (tmp_path / WORK).exists()


def test_files_beside_the_masks_of_a_round(source: Path, tmp_path: Path) -> None:
    """Masks of a round that has not ended, and what else is there, are not taken over."""
    work = interrupt(source, "rank", 5, **WAYS["forward"])
    for name in ("round 1.safetensors", "round 2.safetensors", "x"):
        path = work / "rounds" / name
        if path != round_file(work):
            path.unlink(missing_ok=True)
            path.mkdir()
    prune(source, tmp_path / "out", **WAYS["forward"])
    prune(source, tmp_path / "full", **WAYS["forward"])
    assert contents(tmp_path / "out") == contents(tmp_path / "full")
    assert not (tmp_path / WORK).exists()


@pytest.mark.parametrize("other", [{"rounds": 3}, {"order": "backward"}, {"rounds": 1}], ids=str)
def test_another_order_or_number_starts_anew(
    other: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    interrupt(source, "write", 2, **WAYS["forward"])
    options = WAYS["forward"] | other
    with pytest.warns(UserWarning, match=r"starts anew: .* is of other options\.$"):
        prune(source, tmp_path / "out", **options)
    prune(source, tmp_path / "full", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "full")


def test_other_statistics_start_anew(source: Path, tmp_path: Path) -> None:
    """Another file, and another content of the same size under the same name."""
    batches = [torch.rand(5, 6), torch.rand(5, 6)]
    path = tmp_path / "statistics"
    for batch in batches:
        if path.exists():
            interrupt(source, "write", 2, criterion="wanda", data=path)
        save_file(lap_ext.criteria.measure(network(), INPUTS, "wanda", [batch]), path)
    with pytest.warns(UserWarning, match=r"starts anew: .* is of other options\.$"):
        prune(source, tmp_path / "out", criterion="wanda", data=path)
    want = lap_ext.prune(network(), INPUTS, 0.6, criterion="wanda", data=batches[1:], apply=False)
    got = lap_ext.Masks.load(tmp_path / "out" / "lap_ext_masks.safetensors")
    assert got == want.masks


@pytest.mark.parametrize("place", ["pwrite", "fsync"])
def test_a_disk_that_becomes_full_in_a_round(
    place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(source, tmp_path / "full", **WAYS["forward"])
    interrupt(source, "rank", 1, **WAYS["forward"])

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, place, fail)
        with pytest.raises(OSError, match=r"expected space on the disk of .*, got none. Free") as e:
            prune(source, tmp_path / "out", **WAYS["forward"])
    assert e.value.errno == errno.ENOSPC
    prune(source, tmp_path / "out", **WAYS["forward"])
    assert contents(tmp_path / "out") == contents(tmp_path / "full")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["dense", "full", "out"]


def test_without_resume_nothing_is_left(source: Path, tmp_path: Path) -> None:
    for step in ("measure", "rank", "write"):
        with pytest.raises(KeyboardInterrupt):
            stop = stopping(step, 2, KeyboardInterrupt())
            prune(source, tmp_path / "out", resume=False, on_progress=stop, **WAYS["forward"])
        assert [x.name for x in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("name", ["forward", "norm", "rounds"])
def test_counted_scores_are_those_of_the_unpruned_weights(
    name: str, source: Path, tmp_path: Path
) -> None:
    """Also where a run goes on after its first round."""
    options = {"count_scores": True, **WAYS[name]}
    normalize = options.get("normalize", "none")
    scores = lap_ext.scores(network(), INPUTS, normalize=normalize)
    for step, count in (("measure", 1), ("rank", 4), ("write", 3)):
        interrupt(source, step, count, **options)
        got = prune(source, tmp_path / "out", **options)
        for layer, counts in got.scores.items():
            want = Histogram()
            want.add(scores[layer], got.masks[layer])
            assert counts == want, layer
        shutil.rmtree(tmp_path / "out")
