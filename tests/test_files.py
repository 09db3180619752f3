# SPDX-License-Identifier: MIT
"""Files are complete or not there; headers that safetensors reads; one grammar of sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from lap_ext import _files


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
