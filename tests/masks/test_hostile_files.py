# SPDX-License-Identifier: MIT
"""Files that Masks.save did not write: damaged, foreign, or made to deceive.

Each is one ValueError that names the file. Nothing in it is ever run, and nothing is allocated that
its bytes do not fill.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import lap_ext
from lap_ext.errors import LapValueError
from lap_ext.masks import BitMasks, Masks, file

BITS = torch.tensor([[True, False, True], [False, False, True]])


def container(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file by hand; header: bytes, or what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> Any:
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def metadata(shapes: Any, **changes: str) -> dict[str, str]:
    sums = dict.fromkeys(shapes, "0" * 32) if isinstance(shapes, (dict, list)) else {}
    texts = {"layers": json.dumps(shapes), "checksums": json.dumps(sums)}
    return {"lap_ext": "0.1.0", "format": "2", **texts, **changes}


class Bomb:
    """Pickle would call this."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


OTHER, DAMAGED = "it is a safetensors file of something else", "its metadata is damaged"
LISTS = "its tensors are not those its metadata lists"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header"),
    "text": (b"hello world, this is no file of masks", "header"),
    "pickle": (pickle.dumps(Bomb()), "header"),
    "zeros": (bytes(100), ""),
    "endless header": (b"\xff" * 8 + b"{}", "header"),
    "no json": (container(b"{nothing"), ""),
    "not utf-8": (container(b'{"\xff": 1}'), ""),
    "a list": (container([]), ""),
    "no metadata": (container({"a": entry(0, 1)}, b"\1"), OTHER),
    "foreign metadata": (container({"__metadata__": {"format": "pt"}}), OTHER),
    "format 1": (
        container({"__metadata__": metadata({}, format="1")}),
        "its format is '1' and this lap_ext reads '2'. Prune again, or read it with lap_ext 0.1.0",
    ),
    "layers no json": (container({"__metadata__": metadata({}, layers="{")}), DAMAGED),
    "layers a list": (container({"__metadata__": metadata([])}), DAMAGED),
    "layers deep": (container({"__metadata__": metadata({}, layers="[" * 100_000)}), DAMAGED),
    "layers long number": (
        container({"__metadata__": metadata({}, layers='{"a": [' + "9" * 5000 + "]}")}),
        DAMAGED,
    ),
    "layers not a number": (
        container({"__metadata__": metadata({}, layers='{"a": [NaN]}')}),
        DAMAGED,
    ),
    "layers infinite": (
        container({"__metadata__": metadata({}, layers='{"a": [1e400]}')}),
        DAMAGED,
    ),
    "layers twice": (
        container({"__metadata__": metadata({"a": [8]}, layers='{"a": [1], "a": [8]}')}),
        DAMAGED,
    ),
    "layers without end": (
        container({"__metadata__": metadata({}, layers="[" + "[]," * 6_000_000)}),
        DAMAGED,
    ),
    "no checksums": (
        container({"__metadata__": {"lap_ext": "0", "format": "2", "layers": "{}"}}),
        OTHER,
    ),
    "checksums no json": (container({"__metadata__": metadata({}, checksums="{")}), DAMAGED),
    "checksums deep": (container({"__metadata__": metadata({}, checksums="[" * 10**6)}), DAMAGED),
    "checksums of others": (
        container({"__metadata__": metadata({"a": [1]}, checksums='{"b": "00"}')}),
        DAMAGED,
    ),
    "checksums numbers": (
        container({"__metadata__": metadata({"a": [1]}, checksums='{"a": 1}')}),
        DAMAGED,
    ),
    "structure unknown": (
        container({"__metadata__": metadata({}, structure="2:4:8")}),
        "its structure is '2:4:8', which this lap_ext does not know",
    ),
    "structure spelled otherwise": (
        container({"__metadata__": metadata({}, structure="02:4")}),
        "its structure is '02:4'",
    ),
    "structure of no masks": (
        container({"__metadata__": metadata({}, structure="4:2")}),
        "its structure is '4:2'",
    ),
    "structure empty": (
        container({"__metadata__": metadata({}, structure="")}),
        "its structure is ''",
    ),
    "structure long": (
        container({"__metadata__": metadata({}, structure="2" * 10**6)}),
        "its structure is '22222222222222222222'",
    ),
    "no such tensor": (container({"__metadata__": metadata({"a": [1]})}), LISTS),
    "one tensor more": (
        container(
            {"__metadata__": metadata({"a": [1]}), "a": entry(0, 1), "b": entry(1, 2)}, b"\1\1"
        ),
        LISTS,
    ),
    "bits missing": (
        container({"__metadata__": metadata({"a": [9]}), "a": entry(0, 1)}, b"\1"),
        "the bits of 'a' do not fit its shape [9]",
    ),
    "bits too many": (
        container({"__metadata__": metadata({"a": [8]}), "a": entry(0, 2)}, b"\1\1"),
        "the bits of 'a' do not fit its shape [8]",
    ),
    "bits after the last": (
        container(
            {
                "__metadata__": metadata(
                    {"a": [9]}, checksums=json.dumps({"a": file.checksum("a", (9,), [b"\1\2"])})
                ),
                "a": entry(0, 2),
            },
            b"\1\2",
        ),
        "'a' has bits after its last weight",
    ),
    "as matrix": (
        container({"__metadata__": metadata({"a": [16]}), "a": entry(0, 2, shape=[1, 2])}, b"\1\1"),
        "do not fit",
    ),
    "as floats": (
        container({"__metadata__": metadata({"a": [16]}), "a": entry(0, 8, "F32", [2])}, bytes(8)),
        "do not fit",
    ),
    "as int8": (
        container({"__metadata__": metadata({"a": [16]}), "a": entry(0, 2, "I8")}, bytes(2)),
        "do not fit",
    ),
    "past the end": (
        container({"__metadata__": metadata({"a": [8]}), "a": entry(0, 1)}, b""),
        "",
    ),
    "a hole": (
        container({"__metadata__": metadata({"a": [8]}), "a": entry(5, 6)}, bytes(6)),
        "",
    ),
    "trailing": (
        container({"__metadata__": metadata({"a": [8]}), "a": entry(0, 1)}, bytes(6)),
        "",
    ),
}
for index, shape in enumerate(
    [[-1], [1.0], ["1"], [True], 1, None, {}, [[1]], [2**63], [0, 2**63], [2**32, 2**32], [1] * 65]
):
    bad = container({"__metadata__": metadata({"a": shape}), "a": entry(0, 1)}, b"\1")
    HOSTILE[f"shape {index}"] = (bad, DAMAGED)
huge = container({"__metadata__": metadata({"a": [2**40]}), "a": entry(0, 1)}, b"\1")
HOSTILE["2**40 weights in one byte"] = (huge, "do not fit its shape [1099511627776]")


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, text = HOSTILE[name]
    Path("m").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        Masks.load("m")
    message = str(caught.value)
    assert isinstance(caught.value, LapValueError) and text in message and len(message) < 300
    assert message.startswith("Masks.load: expected a file written by Masks.save, got 'm': ")
    assert not Path("exploded").exists()


def test_every_truncation(tmp_path: Path) -> None:
    Masks({"fc": BITS, "b": torch.ones(9, dtype=torch.bool)}).save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    for length in range(len(data)):
        (tmp_path / "short").write_bytes(data[:length])
        with pytest.raises(ValueError, match="expected a file written by"):
            Masks.load(tmp_path / "short")
    (tmp_path / "long").write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="expected a file written by"):
        Masks.load(tmp_path / "long")


@pytest.mark.parametrize("structure", [None, "2:4"])
def test_every_flipped_bit(structure: str | None, tmp_path: Path) -> None:
    """Each is an error, or the same masks (in the version's text): never other masks."""
    masks = Masks({"fc": BITS, "b": torch.ones(9, dtype=torch.bool)}, structure)
    masks.save(tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    version = data.index(lap_ext.__version__.encode(), data.index(b"lap_ext"))
    same = range(version, version + len(lap_ext.__version__))
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            (tmp_path / "flipped").write_bytes(data)
            data[at] ^= 1 << bit
            try:
                loaded = Masks.load(tmp_path / "flipped")
            except ValueError as error:
                assert "expected a file written by" in str(error)
            else:
                assert loaded == masks and list(loaded) == list(masks) and at in same, (at, bit)
                assert loaded.structure == structure


def damaged(path: Path) -> None:
    """Masks of which one has another bit than its checksum says."""
    Masks({"fc": BITS, "other": torch.ones(5000, dtype=torch.bool)}).save(path)
    data = bytearray(path.read_bytes())
    data[-300] ^= 4
    path.write_bytes(data)


def test_the_first_reading_of_a_layer_checks_it(tmp_path: Path, monkeypatch: Any) -> None:
    """A chunk too, though the flipped bit is not in it; the other layers can be read."""
    monkeypatch.setattr(file, "CHUNK", 100)
    damaged(tmp_path / "m")
    for read in (lambda masks: masks.chunk("other", 8, 16), lambda masks: masks.mask("other")):
        with BitMasks(tmp_path / "m") as masks:
            assert torch.equal(masks.mask("fc"), BITS)
            with pytest.raises(ValueError) as caught:
                read(masks)
            assert str(caught.value) == (
                f"expected a file written by Masks.save, got {str(tmp_path / 'm')!r}: the mask of "
                "'other' does not match its checksum. Copy it again, or prune again."
            )
    with pytest.raises(ValueError, match="'other' does not match its checksum"):
        Masks.load(tmp_path / "m")


def test_each_layer_is_checked_once_and_in_chunks(tmp_path: Path, monkeypatch: Any) -> None:
    Masks({"fc": torch.ones(80_000, dtype=torch.bool)}).save(tmp_path / "m")
    hashed = []

    class Counted:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.inner = hashlib.blake2b(*_, **__)

        def update(self, data: Any) -> None:
            hashed.append(len(data))
            self.inner.update(data)

        def hexdigest(self) -> str:
            return self.inner.hexdigest()

    monkeypatch.setattr(file, "blake2b", Counted)
    monkeypatch.setattr(file, "CHUNK", 1000)
    with BitMasks(tmp_path / "m") as masks:
        assert hashed == []
        for first in range(0, 80_000, 8000):
            assert masks.chunk("fc", first, 8000).all()
    assert max(hashed) == 1000 and sum(size == 1000 for size in hashed) == 10


@pytest.mark.parametrize("change", ["name", "shape", "exchanged"])
def test_checksums_are_of_the_layer_too(tmp_path: Path, change: str) -> None:
    """Not only of the bits: a renamed, reshaped or exchanged mask is found."""
    masks = Masks({"aa": torch.arange(6) % 2 == 0, "bb": torch.arange(6) % 3 == 0})
    masks.save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, bits = data[8 : 8 + size], data[8 + size :]
    if change == "name":
        head = head.replace(b"aa", b"cc")
    elif change == "shape":
        head = head.replace(b'{\\"aa\\":[6]', b'{\\"aa\\":[5]')
    else:
        bits = bits[::-1]
    assert head + bits != data[8:] and len(head) == size
    (tmp_path / "m").write_bytes(data[:8] + head + bits)
    with pytest.raises(ValueError, match="does not match its checksum"):
        Masks.load(tmp_path / "m")


def test_a_pipe_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    writer = os.open(tmp_path / "m", os.O_RDWR)  # without one, to open the pipe would wait
    try:
        with pytest.raises(ValueError, match="it is a pipe or a device"):
            Masks.load(tmp_path / "m")
    finally:
        os.close(writer)
