# SPDX-License-Identifier: MIT
"""What an interrupted run has left, of another source or damaged: it is done anew, and said so."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lap_ext.checkpoint import identity, inside, state
from tests.helpers.checkpoints import INPUTS, network, prune, write
from tests.helpers.interrupted import SHARDS, WORK, contents, facts, interrupt

FIRST = f"model-00001-of-0000{SHARDS}.safetensors"
MASKS = "lap_ext_masks.safetensors"
NORMS = "squared norms.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "dense", network().state_dict(), SHARDS)


def others() -> dict[str, Tensor]:
    """Other weights of the same shapes."""
    return {name: 0.25 - x.flip(0) for name, x in network().state_dict().items()}


@pytest.fixture(scope="module")
def from_nothing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """Gives the files that a run writes that finds nothing."""
    known: dict[str, dict[str, bytes]] = {}

    def run(name: str, tensors: dict[str, Tensor], **options: Any) -> dict[str, bytes]:
        if name not in known:
            folder = tmp_path_factory.mktemp("full")
            source = write(folder / "dense", tensors, SHARDS)
            prune(source, folder / "out", **options)
            known[name] = contents(folder / "out")
        return known[name]

    return run


def keep_times(old: Path, new: Path) -> None:
    for path in [*old.rglob("*"), old]:
        stat = path.stat()
        os.utime(new / path.relative_to(old), ns=(stat.st_atime_ns, stat.st_mtime_ns))


def another_directory(source: Path) -> Path:
    new = write(source.parent / "other", others(), SHARDS)
    keep_times(source, new)
    return new


def replaced_directory(source: Path) -> Path:
    new = another_directory(source)
    source.rename(source.parent / "old")
    return new.rename(source)


def replaced_files(source: Path) -> Path:
    """As rsync -t and tar do: a new file is renamed over the old one."""
    new = another_directory(source)
    for path in new.iterdir():
        path.replace(source / path.name)
    new.rmdir()
    return source


def rewritten_files(source: Path) -> Path:
    """As cp -p does: the same inode, other bytes."""
    new = another_directory(source)
    for path in new.iterdir():
        stat = path.stat()
        with (source / path.name).open("r+b") as file:
            file.write(path.read_bytes())
        os.utime(source / path.name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    shutil.rmtree(new)
    return source


SOURCES = {
    "another_directory": (another_directory, "another directory"),
    "replaced_directory": (replaced_directory, "its files have changed"),
    "replaced_files": (replaced_files, "its files have changed"),
    "rewritten_files": (rewritten_files, "its files have changed"),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("count", [1, 5])
def test_another_source(
    count: int, name: str, source: Path, tmp_path: Path, from_nothing: Any
) -> None:
    """Of the same sizes and times: with count 1 only its squared norms would be mixed in."""
    interrupt(source, count=count)
    change, reason = SOURCES[name]
    new = change(source)
    with pytest.warns(UserWarning, match=rf"starts anew: .*{reason}\.$"):
        prune(new, tmp_path / "out")
    assert contents(tmp_path / "out") == from_nothing("others", others())


def test_a_change_that_no_stamp_shows(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_nothing: Any
) -> None:
    """A disk without inodes and times: the hash of headers and samples is left."""
    monkeypatch.setattr(inside.Stamp, "of", lambda facts: inside.Stamp(facts.st_size, 0, 0, 0, 0))
    interrupt(source)
    replaced_files(source)
    with pytest.warns(UserWarning, match=r"starts anew: .*its files have changed\.$"):
        prune(source, tmp_path / "out")
    assert contents(tmp_path / "out") == from_nothing("others", others())


def test_what_of_a_shard_is_hashed(tmp_path: Path) -> None:
    """Its header, its ends, and blocks between them that leave no large gap."""
    size, head = 10**9, 1000
    ranges = list(identity._ranges(size, head))
    assert ranges[0] == (0, head) and ranges[1][0] == head and ranges[-1][1] == size
    gaps = [new[0] - old[1] for old, new in itertools.pairwise(ranges)]
    assert min(gaps) >= 0 and max(gaps) < size / 60
    assert sum(end - begin for begin, end in ranges) == head + 64 * 4096
    assert list(identity._ranges(5000, head)) == [(0, head), (head, 5000)]


class Plain(nn.Sequential):
    """The layers of network()."""

    def forward(self, x: Tensor) -> Tensor:
        return self[5](self[4](self[3](self[2](self.normed(self[0](x))))))

    def normed(self, x: Tensor) -> Tensor:
        return self[1](x)


class Skipping(Plain):
    """The same with a skip around the norm."""

    def normed(self, x: Tensor) -> Tensor:
        return self[1](x) + x


class Flipped(Plain):
    """The same where the norm's weights meet other channels."""

    def normed(self, x: Tensor) -> Tensor:
        return self[1](x.flip(1)).flip(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "skip": lambda: Skipping(*network()),
    "order": lambda: Flipped(*network()),
    "epsilon": lambda: normed(eps=10.0),
    "buffer": lambda: normed(variance=3.0),
}


def normed(eps: float = 1e-5, variance: float = 1.0) -> nn.Sequential:
    """network() with a batch norm, whose running variance is in no file."""
    net = network()
    net[1] = nn.BatchNorm1d(150, eps)
    net[1].running_var.copy_(torch.linspace(0.01, variance, 150))
    return net


@pytest.mark.parametrize("name", MODELS)
def test_another_model_of_the_same_layers(name: str, tmp_path: Path) -> None:
    """An edge more, another number in it, another buffer: shapes, names and files are the same."""
    old = {"model": Plain(*network()) if name in ("skip", "order") else normed()}
    tensors = {n: x for n, x in network().state_dict().items() if n != "1.running_var"}
    source = write(tmp_path / "dense", tensors, SHARDS)
    interrupt(source, **old)
    new = {"model": MODELS[name]()}
    with pytest.warns(UserWarning, match=r"starts anew: .*another model\.$"):
        prune(source, tmp_path / "out", **new)
    prune(source, tmp_path / "full", **new)
    assert contents(tmp_path / "out") == contents(tmp_path / "full")
    prune(source, tmp_path / "old", **old)
    assert contents(tmp_path / "old") != contents(tmp_path / "full")


def flip(path: Path, at: int, bits: int = 1) -> None:
    """Damages one byte."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        (old,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ bits]))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def swapped_norms(work: Path) -> None:
    tensors = load_file(work / NORMS)
    save_file({name: torch.rand_like(x) for name, x in tensors.items()}, work / NORMS)


def in_place_of(path: Path) -> None:
    """A directory with a file in it."""
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("x")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "x").write_text("x")


def mask_bytes(work: Path) -> tuple[int, int]:
    """Says where the first and the last mask of the file begin."""
    data = (work / "files" / MASKS).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:begin])
    table.pop("__metadata__")
    offsets = sorted(x["data_offsets"][0] for x in table.values())
    return begin + offsets[0], begin + offsets[-1]


SHARD_AGAIN = r"damaged in part\. These are done again: 'model-00001-of-00003.safetensors'\.$"
MASKS_AGAIN = r"damaged in part\. These are done again: the masks, 'model-00001"
NORMS_AGAIN = r"damaged in part\. These are done again: the squared norms\.$"
ANEW = r"^The pruning starts anew: what an interrupted one has left in '.*' is damaged\.$"

DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard": (lambda w: flip(w / "files" / FIRST, -9), SHARD_AGAIN),
    "shard_header": (lambda w: flip(w / "files" / FIRST, 20), SHARD_AGAIN),
    "shard_gone": (lambda w: (w / "files" / FIRST).unlink(), SHARD_AGAIN),
    "shard_longer": (lambda w: longer(w / "files" / FIRST), SHARD_AGAIN),
    "shard_is_directory": (
        lambda w: in_place_of(w / "files" / FIRST),
        SHARD_AGAIN,
    ),
    "masks": (lambda w: flip(w / "files" / MASKS, mask_bytes(w)[0] + 3), MASKS_AGAIN),
    "masks_header": (lambda w: flip(w / "files" / MASKS, 20), ""),  # written again at the end
    "masks_gone": (lambda w: (w / "files" / MASKS).unlink(), MASKS_AGAIN),
    "masks_is_directory": (lambda w: in_place_of(w / "files" / MASKS), MASKS_AGAIN),
    "norms": (lambda w: flip(w / NORMS, -1), NORMS_AGAIN),
    "norms_swapped": (swapped_norms, NORMS_AGAIN),
    "norms_gone": (lambda w: (w / NORMS).unlink(), NORMS_AGAIN),
    "norms_is_directory": (lambda w: in_place_of(w / NORMS), NORMS_AGAIN),
    "files_is_file": (lambda w: in_place_of(w / "files"), SHARD_AGAIN),
    "state_is_directory": (lambda w: in_place_of(w / "state.json"), ANEW),
    "state_gone": (lambda w: (w / "state.json").unlink(), ANEW),
    "state_not_text": (lambda w: flip(w / "state.json", 5, 0x80), ANEW),
    "state_empty": (lambda w: (w / "state.json").write_text(""), ANEW),
    "state_deep": (
        lambda w: (w / "state.json").write_text("[" * 100_000),
        ANEW,
    ),
    "part_is_directory": (lambda w: in_place_of(w / "state.json.part"), ""),
    "norms_part_is_directory": (lambda w: in_place_of(w / f"{NORMS}.part"), ""),
}


OPTIONS = {"scope": "global", "normalize": "norm", "count_scores": True}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint, and what an interrupted run has left, beside its place."""
    folder = tmp_path_factory.mktemp("stopped")
    work = interrupt(write(folder / "dense", network().state_dict(), SHARDS), **OPTIONS)
    assert facts(work)["done"].keys() == {FIRST}
    return work.rename(folder / "left")


@pytest.fixture
def work(stopped: Path) -> Iterator[Path]:
    """The working directory of that run."""
    work = shutil.copytree(stopped, stopped.parent / WORK)
    yield work
    for path in (work, work.parent / "out"):
        shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, work: Path, from_nothing: Any) -> None:
    out = work.parent / "out"
    damage, text = DAMAGE[name]
    damage(work)
    if text:
        with pytest.warns(UserWarning, match=text) as caught:
            prune(work.parent / "dense", out, **OPTIONS)
        assert len(caught) == 1
    else:
        prune(work.parent / "dense", out, **OPTIONS)
    assert contents(out) == from_nothing("network", network().state_dict(), **OPTIONS)
    assert sorted(p.name for p in work.parent.iterdir()) == ["dense", "left", "out"]


def test_bits_after_the_last_weight_of_a_mask(tmp_path: Path) -> None:
    """They belong to no weight: damage among them must not stay."""
    net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 9))  # 18 and 27 weights
    options = {"model": net, "example_inputs": INPUTS}
    source = write(tmp_path / "dense", net.state_dict())
    work = interrupt(source, count=3, **options)
    for begin, size in zip(mask_bytes(work), (3, 4), strict=True):
        flip(work / "files" / MASKS, begin + size - 1, 0x80)
    with pytest.warns(UserWarning, match=MASKS_AGAIN):
        prune(source, tmp_path / "out", **options)
    prune(source, tmp_path / "full", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "full")


def test_files_that_are_gone_by_now(work: Path, from_nothing: Any) -> None:
    """What an earlier run has copied is copied again, or not at all."""
    (work / "files" / "sub").mkdir()
    for name in ("vocab.txt", "sub/merges.txt"):
        (work / "files" / name).write_text("copied before it was deleted")
    prune(work.parent / "dense", work.parent / "out", **OPTIONS)
    want = from_nothing("network", network().state_dict(), **OPTIONS)
    assert contents(work.parent / "out") == want


def spoiled(value: Any) -> Iterator[Any]:
    """Gives copies of a JSON value with one part dropped, or of another type."""
    yield from (None, 7, "x", [[]])
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: new} for new in spoiled(inner))
    if isinstance(value, list):
        for index, inner in enumerate(value[:2]):
            yield value[:index] + value[index + 1 :]
            yield from ([*value[:index], new, *value[index + 1 :]] for new in spoiled(inner))


def test_every_damage_of_the_state_is_seen(work: Path) -> None:
    """Each key of state.json dropped, and of other types: never taken over, never an exception."""
    good = json.loads((work / "state.json").read_text())
    assert not state.Work(work, good["options"]).take_over()
    count = 0
    for bad in spoiled(good):
        if bad != good:
            (work / "state.json").write_text(json.dumps(bad))
            assert state.Work(work, good["options"]).take_over() == "damaged"
            count += 1
    assert count > 300


@pytest.mark.parametrize("key", ["options", "facts", "done", "notes", "tensors of"])
def test_a_damaged_key(key: str, work: Path) -> None:
    value = json.loads((work / "state.json").read_text())
    at = value if key in value else value["facts"]
    assert key in at
    at[key] = [1]
    (work / "state.json").write_text(json.dumps(value))
    with pytest.warns(UserWarning, match=ANEW):
        prune(work.parent / "dense", work.parent / "out", **OPTIONS)
    assert sorted(p.name for p in work.parent.iterdir()) == ["dense", "left", "out"]
