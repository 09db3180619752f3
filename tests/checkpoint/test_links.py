# SPDX-License-Identifier: MIT
"""Links, pipes and files of others, planted where something is read or written: never followed."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lap_ext import checkpoint
from lap_ext.checkpoint import Progress, files, inside, state, writing
from lap_ext.checkpoint.reporting import checkpoint_facts
from tests.helpers.checkpoints import INPUTS, network, prune, write
from tests.helpers.interrupted import SHARDS, WORK, contents, facts, interrupt

MASKS = "lap_ext_masks.safetensors"
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"
NORMS = "squared norms.safetensors"
GIVEN = {"model": network(), "example_inputs": INPUTS}


# --- the working directory ------------------------------------------------------------------------


def link_to_file(path: Path, victim: Path) -> None:
    path.symlink_to(victim / "thesis.txt")


def link_to_directory(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim / "new")


def pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


KINDS = {"file": link_to_file, "directory": link_to_directory, "dangling": dangling, "pipe": pipe}
NAMES = ("", "lock", "files", "state.json", "state.json.part", NORMS, f"{NORMS}.part")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory that looks like a working one, with something precious in it."""
    path = tmp_path / "victim"
    (path / "files").mkdir(parents=True)
    for name in ("thesis.txt", "files/thesis.txt"):
        (path / name).write_text("years of work")
    return path


def all_of(path: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_planted_in_the_working_directory(
    kind: str, name: str, victim: Path, tmp_path: Path
) -> None:
    before = all_of(victim)
    if name:
        (tmp_path / WORK).mkdir()
    KINDS[kind](tmp_path / WORK / name, victim)
    shown = name or WORK
    with pytest.raises(
        (ValueError, OSError), match=rf"^expected .*{shown}.*Remove it, or choose another name\.$"
    ):
        with state.working(tmp_path / "out", {}, True):
            pass
    assert all_of(victim) == before
    assert not (tmp_path / "out").exists()
    assert os.path.lexists(tmp_path / WORK / name)


def test_a_directory_whose_working_directory_is_a_link(tmp_path: Path) -> None:
    """With what the options of a real run need: nothing of it is cleared."""
    source = write(tmp_path / "dense", network().state_dict())
    real = tmp_path / "victim"
    (real / "files").mkdir(parents=True)
    (real / "files" / "thesis.txt").write_text("years of work")
    (tmp_path / WORK).symlink_to(real)
    with pytest.raises((ValueError, OSError), match=rf"checkpoint.prune: expected .*{WORK}"):
        prune(source, tmp_path / "out")
    assert (real / "files" / "thesis.txt").read_text() == "years of work"


def test_a_working_directory_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / WORK).mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises((ValueError, OSError), match=rf"{WORK}.* somebody else's"):
        with state.working(tmp_path / "out", {}, True):
            pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["lock", "files", "state.json"])
def test_a_part_of_somebody_else(name: str, tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / name).mkdir() if name == "files" else (tmp_path / WORK / name).touch()
    os.chown(tmp_path / WORK / name, 12345, 12345)
    with pytest.raises((ValueError, OSError), match=rf"{name} \(somebody else's\)"):
        with state.working(tmp_path / "out", {}, True):
            pass


def test_the_working_directory_is_closed_to_others(tmp_path: Path) -> None:
    for made_before in (False, True):
        if made_before:
            (tmp_path / WORK).mkdir(mode=0o777)
            (tmp_path / WORK).chmod(0o777)
        with state.working(tmp_path / f"{made_before}", {}, True) as work:
            assert stat.S_IMODE(work.directory.stat().st_mode) == 0o700
        shutil.rmtree(tmp_path / WORK, ignore_errors=True)


def test_out_has_the_usual_permissions(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("name", ["shard", "masks", "other", "sub"])
def test_links_among_the_files_of_an_interrupted_run(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "dense", network().state_dict(), SHARDS)
    (source / "sub").mkdir()
    (source / "sub" / "merges.txt").write_text("a b")
    full = contents(prune(source, tmp_path / "full").directory)
    work = interrupt(source)
    folder = work / "files"
    last = f"model-0000{SHARDS}-of-0000{SHARDS}.safetensors"
    assert last not in facts(work)["done"]
    (tmp_path / "victim").mkdir()
    kept = tmp_path / "victim" / "merges.txt"
    kept.write_bytes((folder / MASKS).read_bytes() if name == "masks" else b"years of work")
    before = kept.read_bytes()
    place = {"shard": last, "masks": MASKS, "other": "tokenizer.json", "sub": "sub"}[name]
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to(kept.parent if name == "sub" else kept)
    if name == "masks":
        with pytest.warns(UserWarning, match="are done again: the masks"):
            prune(source, tmp_path / "out")
    else:
        prune(source, tmp_path / "out")
    assert kept.read_bytes() == before
    assert contents(tmp_path / "out") == full
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_mask_file_with_a_second_name(tmp_path: Path) -> None:
    """A backup by hard links: the mask file, which is written in place, is made anew."""
    source = write(tmp_path / "dense", network().state_dict(), SHARDS)
    work = interrupt(source)
    (tmp_path / "backup").hardlink_to(work / "files" / MASKS)
    before = (tmp_path / "backup").read_bytes()
    with pytest.warns(UserWarning, match="are done again: the masks"):
        prune(source, tmp_path / "out")
    assert (tmp_path / "backup").read_bytes() == before


# --- the input ------------------------------------------------------------------------------------


def to_outside(path: Path, outside: Path) -> None:
    """Moves a file out of the directory and leaves a link."""
    outside.mkdir(exist_ok=True)
    if path.exists():
        path.rename(outside / path.name)
    else:
        (outside / path.name).write_text("{}")
    path.symlink_to(outside / path.name)


def directory_outside(path: Path, outside: Path) -> None:
    (outside / "etc").mkdir(parents=True)
    (outside / "etc" / "shadow").write_text("root:secret")
    path.symlink_to(outside / "etc")


def nested(path: Path, outside: Path) -> None:
    path.mkdir()
    to_outside(path / "tokenizer.model", outside)


LEAVING: dict[str, Callable[[Path, Path], Any]] = {
    SECOND: to_outside,
    INDEX: to_outside,
    "config.json": to_outside,
    "tokenizer.json": to_outside,
    MASKS: to_outside,
    "lap_ext.json": to_outside,
    "directory": directory_outside,
    "deep": nested,
    "dangling": lambda path, outside: path.symlink_to(outside / "not there yet"),
}


def calls(dense: Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """All that reads a checkpoint directory."""
    return {
        "prune": lambda: prune(dense, tmp_path / "out"),
        "scores": lambda: checkpoint.scores(dense, **GIVEN),
        "inspect": lambda: checkpoint.inspect(dense, **GIVEN),
        "verify": lambda: checkpoint.verify(dense, tmp_path / "good"),
        "verify original": lambda: checkpoint.verify(tmp_path / "good", dense),
    }


@pytest.mark.parametrize("name", LEAVING)
def test_links_that_leave_the_input(name: str, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "good")
    LEAVING[name](dense / name, tmp_path / "outside")
    for call in calls(dense, tmp_path).values():
        with pytest.raises(ValueError, match=rf"expected .*'{name}.*a link to .*Copy") as caught:
            call()
        assert "outside" in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"dense", "good", "outside"}


def test_a_report_reads_no_link_that_leaves(dense: Path, tmp_path: Path) -> None:
    result = prune(dense, tmp_path / "out")
    to_outside(dense / "tokenizer.json", tmp_path / "outside")
    with pytest.raises(ValueError, match=r"expected .*'tokenizer.json'.*a link to"):
        checkpoint_facts(dense, result, **GIVEN)


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


SPECIAL: dict[str, Callable[[Path], Any]] = {"pipe": os.mkfifo, "socket": a_socket}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [SECOND, INDEX, "config.json", "vocab.txt", MASKS])
def test_special_files_in_the_input(kind: str, name: str, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "good")
    (dense / name).unlink(missing_ok=True)
    SPECIAL[kind](dense / name)
    for call in calls(dense, tmp_path).values():
        with pytest.raises(ValueError, match=rf"expected a file '{name}' in .*, got a {kind}"):
            call()
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "good"}


@pytest.mark.parametrize("name", ["config.json", MASKS, "lap_ext.json"])
def test_what_lies_beside_a_single_file(name: str, tmp_path: Path) -> None:
    """A single file may be a link (that is the user's choice); what is read beside it may not."""
    for place in ("dense", "pruned"):
        write(tmp_path / place, network().state_dict(), shards=1)
    file = tmp_path / "pruned" / "model.safetensors"
    to_outside(file, tmp_path / "outside")
    verdict = checkpoint.verify(file, tmp_path / "dense" / "model.safetensors")
    assert verdict.unpruned and len(verdict.findings) == 1
    to_outside(file.parent / name, tmp_path / "outside")
    with pytest.raises(ValueError, match=rf"expected .*'{name}'.*a link to"):
        checkpoint.verify(file, tmp_path / "dense" / "model.safetensors")


def hub(tmp_path: Path, sub: str = "") -> Path:
    """The layout of a hub's cache: links to files that are named by their hash."""
    made = write(tmp_path / "made", network().state_dict())
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text("{}")
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123abcd" / sub
    for number, path in enumerate(sorted(p for p in made.rglob("*") if p.is_file())):
        blob = repo / "blobs" / f"{number:040x}"
        path.rename(blob)
        link = snapshot / path.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(made)
    return snapshot


@pytest.mark.parametrize("given", ["directory", "link", "subdirectory"])
def test_the_cache_of_a_hub(given: str, tmp_path: Path) -> None:
    source = hub(tmp_path, "text_encoder" if given == "subdirectory" else "")
    blobs = contents(tmp_path / "models--a--b" / "blobs")
    if given == "link":
        (tmp_path / "here").symlink_to(source)
        source = tmp_path / "here"
    prune(source, tmp_path / "out")
    got = contents(tmp_path / "out")
    assert got.keys() == contents(source).keys() | {MASKS}
    assert got["1_Pooling/config.json"] == b"{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert checkpoint.verify(tmp_path / "out", source).ok
    checkpoint.scores(source, **GIVEN).table()
    assert contents(tmp_path / "models--a--b" / "blobs") == blobs


def through_blobs(repo: Path, secret: Path) -> str:
    """The directory of blobs is itself a link."""
    for blob in (repo / "blobs").iterdir():
        blob.rename(secret.parent / blob.name)
    (repo / "blobs").rmdir()
    (repo / "blobs").symlink_to(secret.parent)
    return f"../../blobs/{secret.name}"


def blob_that_is_a_link(repo: Path, secret: Path) -> str:
    (repo / "blobs" / "f00").symlink_to(secret)
    return "../../blobs/f00"


def beside_blobs(repo: Path, secret: Path) -> str:
    (repo / "refs").mkdir()
    secret.rename(repo / "refs" / "main")
    return "../../refs/main"


def below_blobs(repo: Path, secret: Path) -> str:
    (repo / "blobs" / "deep").symlink_to(secret.parent)
    return f"../../blobs/deep/{secret.name}"


@pytest.mark.parametrize(
    "attack",
    [through_blobs, blob_that_is_a_link, beside_blobs, below_blobs],
    ids=lambda x: x.__name__,
)
def test_a_directory_that_looks_like_a_cache(attack: Any, tmp_path: Path) -> None:
    source = hub(tmp_path)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "shadow").write_text("root:secret")
    (source / "vocab.txt").symlink_to(
        attack(tmp_path / "models--a--b", tmp_path / "etc" / "shadow")
    )
    assert (source / "vocab.txt").is_file()
    with pytest.raises(ValueError, match=r"expected .*a link to"):
        prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_within_the_input(dense: Path, tmp_path: Path) -> None:
    """They leave nothing: files are copied as content, the others are left out."""
    (dense / "vocab.txt").symlink_to("tokenizer.json")
    (dense / "broken").symlink_to("nowhere")
    (dense / "loop").symlink_to(".")
    (dense / "self").symlink_to("self")
    prune(dense, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == b"{}"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert not any((tmp_path / "out" / name).exists() for name in ("broken", "loop", "self"))


def test_hidden_caches_are_neither_read_nor_refused(dense: Path, tmp_path: Path) -> None:
    (dense / ".git").mkdir()
    (dense / ".git" / "objects").symlink_to("/")
    os.mkfifo(dense / ".git" / "daemon")
    prune(dense, tmp_path / "out")
    assert not (tmp_path / "out" / ".git").exists()


def test_permissions_of_copied_files(dense: Path, tmp_path: Path) -> None:
    """Not those that let a program run as another user."""
    (dense / "tokenizer.json").chmod(0o6755)
    os.utime(dense / "tokenizer.json", ns=(10**18, 10**18))
    prune(dense, tmp_path / "out")
    got = (tmp_path / "out" / "tokenizer.json").stat()
    assert (stat.S_IMODE(got.st_mode), got.st_mtime_ns) == (0o755, 10**18)


def swapped(path: Path, secret: Path) -> None:
    """A link to a file of the same size and times, in place of a shard."""
    shutil.copy2(path, secret)
    path.unlink()
    path.symlink_to(secret)


def test_what_is_opened_is_what_was_checked(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"weights")
    stamp = inside.Stamp.of(path.stat())
    with inside.opened(path, stamp) as file:
        assert file.read() == b"weights"
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    os.utime(path)
    for name in ("link", "pipe", "gone", "shard"):
        with pytest.raises(ValueError, match=f"expected files that do not change .*'{name}'"):
            inside.opened(tmp_path / name, stamp)
    with pytest.raises(ValueError, match="expected files that do not change"):
        inside.opened(tmp_path / "link")


def test_a_shard_that_is_replaced_while_its_header_is_checked(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors opens it by its name: it must check the very file that is read."""
    real = files._checked
    shutil.copy2(dense / SECOND, tmp_path / "good")
    bad = (dense / SECOND).read_bytes().replace(b"data_offsets", b"data_offset_")
    (dense / SECOND).write_bytes(bad)

    def checked(name: str, path: Path) -> set[str]:
        if name == SECOND:
            (tmp_path / "good").replace(path)
        return real(name, path)

    monkeypatch.setattr(files, "_checked", checked)
    with pytest.raises(ValueError, match="expected files that do not change while they are read"):
        prune(dense, tmp_path / "out")


def test_a_shard_is_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("years of work")
    (tmp_path / "shard").symlink_to("victim")
    with pytest.raises(FileExistsError):
        writing.ShardFile(tmp_path / "shard").__enter__()
    assert (tmp_path / "victim").read_text() == "years of work"


@pytest.mark.parametrize("step", ["measure", "write"])
def test_a_shard_that_becomes_a_link_meanwhile(step: str, dense: Path, tmp_path: Path) -> None:
    left = [True]

    def attack(progress: Progress) -> None:
        if left[0] and progress.step == step:
            left[0] = False
            swapped(dense / SECOND, tmp_path / "secret")

    with pytest.raises(ValueError, match="expected files that do not change while they are read"):
        prune(dense, tmp_path / "out", on_progress=attack)
    assert not left[0] and not (tmp_path / "out").exists()


def test_another_file_that_becomes_a_pipe_meanwhile(dense: Path, tmp_path: Path) -> None:
    def attack(progress: Progress) -> None:
        if progress.step == "write" and (dense / "tokenizer.json").is_file():
            (dense / "tokenizer.json").unlink()
            os.mkfifo(dense / "tokenizer.json")

    # it is no file any more: not copied, and not waited for
    prune(dense, tmp_path / "out", on_progress=attack)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


# --- out ------------------------------------------------------------------------------------------


def test_out_that_is_a_link(dense: Path, tmp_path: Path) -> None:
    """What the user names is the user's: a link stays a link, and its target becomes the result."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "to_empty").symlink_to(tmp_path / "empty")
    (tmp_path / "to_new").symlink_to(tmp_path / "new")
    for name, real in (("to_empty", "empty"), ("to_new", "new")):
        prune(dense, tmp_path / name)
        assert (tmp_path / name).is_symlink() and (tmp_path / real / SECOND).is_file()
    os.mkfifo(tmp_path / "a_pipe")
    (tmp_path / "into").symlink_to(dense / "sub")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("a_pipe", "into", "circle"):
        with pytest.raises(ValueError, match="out"):
            prune(dense, tmp_path / name)
        with pytest.raises((ValueError, OSError), match="path"):
            checkpoint.scores(dense, **GIVEN).save(tmp_path / name)
    with pytest.raises(ValueError, match="expected a checkpoint directory"):
        prune(tmp_path / "circle", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
