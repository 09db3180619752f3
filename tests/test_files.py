# SPDX-License-Identifier: MIT
"""Files are complete or not there; headers that safetensors reads; one grammar of sizes."""

from __future__ import annotations

import os
import socket
import stat
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from lap_ext import _files
from lap_ext.errors import LapOSError
from tests.helpers.processes import run_python


def test_replacing_puts_a_complete_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_bytes(b"old")
    with _files.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and [x.name for x in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_replacing_leaves_the_old_file_where_it_fails(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "note"
    path.write_bytes(b"old")
    with pytest.raises(error), _files.replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and [x.name for x in tmp_path.iterdir()] == ["note"]


def test_replacing_writes_through_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)
    with _files.replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink() and real.read_bytes() == b"new"


def test_a_new_directory_is_complete_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError), _files.new_directory(out) as temporary:
        (temporary / "a").write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with _files.new_directory(out) as temporary:
        (temporary / "a").write_text("complete")
        assert not out.exists()
    assert [x.name for x in out.iterdir()] == ["a"] and list(tmp_path.iterdir()) == [out]


def test_a_new_directory_does_not_replace_a_full_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "theirs").write_text("stays")
    with pytest.raises(OSError, match="not empty"), _files.new_directory(out) as temporary:
        (temporary / "a").write_text("complete")
    assert [x.name for x in out.iterdir()] == ["theirs"] and list(tmp_path.iterdir()) == [out]


# --- what a killed writer has left, and what is in the way ----------------------------------------

KILLED = """
    import os, signal
    from lap_ext._files import new_directory, replacing
    with {writer}({path!r}) as new:
        {write}
        os.kill(os.getpid(), signal.SIGKILL)
"""
WRITERS = {
    "replacing": "new.write(b'half')",
    "new_directory": "(new / 'a').write_text('half')",
}


def write(writer: str, path: Path) -> None:
    """Writes a complete file or directory."""
    if writer == "replacing":
        with _files.replacing(path) as file:
            file.write(b"complete")
    else:
        with _files.new_directory(path) as directory:
            (directory / "a").write_text("complete")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("writer", list(WRITERS))
def test_the_next_writer_removes_what_a_killed_one_has_left(tmp_path: Path, writer: str) -> None:
    code = KILLED.format(writer=writer, path=str(tmp_path / "out"), write=WRITERS[writer])
    done = run_python(textwrap.dedent(code))
    assert done.returncode == -9, done.stderr
    (left,) = names(tmp_path)
    assert left.startswith(".out.") and left.endswith(".part")
    write(writer, tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("writer", list(WRITERS))
def test_a_writer_that_lives_keeps_its_own(tmp_path: Path, writer: str) -> None:
    with _files.replacing(tmp_path / "out") as file:
        file.write(b"first")
        (left,) = names(tmp_path)
        write(writer, tmp_path / "out")
        assert names(tmp_path) == [left, "out"]
        if writer == "new_directory":
            (tmp_path / "out" / "a").unlink()
            (tmp_path / "out").rmdir()
    assert (tmp_path / "out").read_bytes() == b"first" and names(tmp_path) == ["out"]


def test_only_what_a_writer_can_have_left_is_removed(tmp_path: Path) -> None:
    """Not a link, a pipe, another name's file, nor one that only looks like it."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("stays")
    mark = "0123456789abcdef"
    (tmp_path / f".out.{mark}.part").symlink_to(victim / "file")
    (tmp_path / f".out.{mark[::-1]}.part").symlink_to(victim)
    os.mkfifo(tmp_path / f".out.{mark[1:]}0.part")
    others = [".out.part", ".out.x.part", f".out.b.{mark}.part", f".our.{mark}.part", f"out.{mark}"]
    for name in others:
        (tmp_path / name).write_text("stays")
    before = names(tmp_path)
    for writer in WRITERS:
        write(writer, tmp_path / "out" if writer == "replacing" else tmp_path / "out2")
    assert names(tmp_path) == sorted([*before, "out", "out2"])
    assert (victim / "file").read_text() == "stays"


def test_a_clean_up_that_fails_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.0123456789abcdef.part").write_text("left")

    def fails(*_: object, **__: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fails)
        write("replacing", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"complete"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", fails)
        write("replacing", tmp_path / "out")
    assert len(names(tmp_path)) == 2


def test_a_file_taken_away_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove it between its creation and the lock."""
    taken, lock = [], _files.fcntl.flock

    def late(descriptor: int, how: int) -> None:
        if not taken:
            taken.extend(names(tmp_path))
            (tmp_path / taken[0]).unlink()
        lock(descriptor, how)

    monkeypatch.setattr(_files.fcntl, "flock", late)
    write("replacing", tmp_path / "out")
    assert len(taken) == 1 and (tmp_path / "out").read_bytes() == b"complete"
    assert names(tmp_path) == ["out"]


def test_where_the_disk_has_no_locks_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.0123456789abcdef.part").write_text("left")

    def none(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(_files.fcntl, "flock", none)
    write("replacing", tmp_path / "out")
    assert names(tmp_path) == [".out.0123456789abcdef.part", "out"]


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def a_link_to_a_pipe(path: Path) -> None:
    """Not to a device: were it replaced, the machine would lose it."""
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": a_socket,
    "directory": Path.mkdir,
    "link to a pipe": a_link_to_a_pipe,
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", list(OBSTACLES))
def test_what_is_no_file_is_not_replaced(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    OBSTACLES[kind](Path("out"))
    before = {name: os.lstat(name) for name in names(tmp_path)}
    written = False
    with pytest.raises(OSError) as caught, _files.replacing("out"):
        written = True
    assert not written and {name: os.lstat(name) for name in names(tmp_path)} == before
    if kind != "link to itself":
        assert isinstance(caught.value, LapOSError)
        assert str(caught.value).startswith("expected a file, or none yet, at 'out', got ")


def test_standard_output_is_not_replaced(tmp_path: Path) -> None:
    """It is a pipe here, and its name in /proc leads nowhere."""
    code = """
        from lap_ext._files import replacing
        try:
            with replacing("/dev/stdout") as file:
                file.write(b"written")
        except OSError as error:
            print(error)
    """
    done = run_python(textwrap.dedent(code))
    assert done.stdout.startswith("expected a file, or none yet, at '/dev/stdout', got a pipe.")


def test_a_new_directory_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("stays")
    with pytest.raises(LapOSError) as caught, _files.new_directory(tmp_path / "out"):
        raise AssertionError("entered")
    assert str(caught.value).startswith("expected a new or empty directory at ")
    assert (tmp_path / "out").read_text() == "stays" and names(tmp_path) == ["out"]


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write("replacing", tmp_path / "out")
        write("new_directory", tmp_path / "dir")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o750


# --- what is read ---------------------------------------------------------------------------------


def test_small_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert _files.small_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="of 4 bytes at most, got 5"):
        _files.small_file(tmp_path / "file", 4)
    with pytest.raises(FileNotFoundError):
        _files.small_file(tmp_path / "none")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("kind", ["pipe", "directory", "link to a pipe"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    OBSTACLES[kind](tmp_path / "out")
    before = open_files()
    with pytest.raises(ValueError, match=r"expected a regular file '.*', got a (pipe|directory)"):
        _files.small_file(tmp_path / "out")
    assert open_files() == before, "nothing stays open"


NO_JSON = {
    "twice": ('{"a": {"b": 1, "b": 1}}', "'b' twice"),
    "infinite": ("[1e400]", "the number 1e400"),
    "NaN": ("[NaN]", "the number NaN"),
    "Infinity": ("[-Infinity]", "the number -Infinity"),
    "digits": ("[" + "9" * 5000 + "]", "4300 digits"),
    "lists": ("[" * 100_000, "nested too deeply"),
    "objects": ('{"a":' * 100_000, "nested too deeply"),
    "long": ('"' + "a" * 10**6 + '"', "1,000,002 characters where 1,000,000 are allowed"),
    "bytes": (b"\xff", ""),
}


@pytest.mark.parametrize("name", list(NO_JSON))
def test_json_that_is_refused(name: str) -> None:
    text, problem = NO_JSON[name]
    with pytest.raises(ValueError) as caught:
        _files.parsed_json(text, 10**6)
    assert problem in str(caught.value) and len(str(caught.value)) < 200


def test_json_with_infinity_where_it_is_allowed() -> None:
    assert _files.parsed_json('{"a": Infinity}', finite=False) == {"a": float("inf")}


def test_safetensors_reads_the_header(tmp_path: Path) -> None:
    tensors = [("a.weight", "F32", [2, 3], 24), ("empty", "U8", [0], 0), ("ä", "F64", [], 8)]
    head = _files.safetensors_header(tensors, {"who": "lap_ext"})
    assert len(head) % 8 == 0
    (tmp_path / "file").write_bytes(head + bytes(32))
    with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"who": "lap_ext"}
        assert {name: list(file.get_tensor(name).shape) for name in file.keys()} == {
            "a.weight": [2, 3],
            "empty": [0],
            "ä": [],
        }
        assert file.get_tensor("ä").dtype == torch.float64


@pytest.mark.parametrize("names", [["__metadata__"], ["a", "a"]])
def test_names_that_a_header_cannot_hold(names: list[str]) -> None:
    tensors = [(name, "U8", [1], 1) for name in names]
    with pytest.raises(ValueError, match=r"^expected layer names .* Rename that parameter"):
        _files.safetensors_header(tensors, {})


SIZES = {
    "0": 0, "1000": 1000, "12B": 12, "4GB": 4 * 10**9, "4 gb": 4 * 10**9, "4G": 4 * 10**9,
    "512MiB": 512 * 2**20, "1.5 KiB": 1536, "0.5kB": 500, "2TiB": 2 * 2**40, " 7 ": 7,
    "": None, "GB": None, "-1": None, "4iB": None, "1e9": None, "4GBs": None, ".5GB": None,
    "1,5GB": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str, size: int | None) -> None:
    assert _files.parsed_size(text) == size


@given(st.integers(0, 10**15), st.sampled_from(["", "K", "M", "G", "T"]), st.booleans())
def test_whole_numbers_of_units_are_exact(count: int, unit: str, binary: bool) -> None:
    base = 1024 if binary and unit else 1000
    text = f"{count}{unit}{'i' if binary and unit else ''}B"
    assert _files.parsed_size(text) == count * base ** ["", "K", "M", "G", "T"].index(unit)
