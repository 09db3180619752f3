# SPDX-License-Identifier: MIT
"""Files that Masks.save did not write: damaged, foreign, or made to deceive.

Each is one ValueError that names the file. Nothing in it is ever run, and nothing is allocated that
its bytes do not fill.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lap_ext.errors import LapValueError
from lap_ext.masks import Masks

BITS = torch.tensor([[True, False, True], [False, False, True]])


def container(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file by hand; header: bytes, or what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> Any:
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def metadata(shapes: Any, **changes: str) -> dict[str, str]:
    return {"lap_ext": "0.1.0", "format": "1", "layers": json.dumps(shapes), **changes}


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
    "format 2": (
        container({"__metadata__": metadata({}, format="2")}),
        "its format is '2' and this lap_ext reads '1'",
    ),
    "layers no json": (container({"__metadata__": metadata({}, layers="{")}), DAMAGED),
    "layers a list": (container({"__metadata__": metadata([])}), DAMAGED),
    "layers deep": (container({"__metadata__": metadata({}, layers="[" * 100_000)}), DAMAGED),
    "layers long number": (
        container({"__metadata__": metadata({}, layers='{"a": [' + "9" * 5000 + "]}")}),
        DAMAGED,
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
        container({"__metadata__": metadata({"a": [9]}), "a": entry(0, 2)}, b"\1\2"),
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


def test_every_flipped_byte(tmp_path: Path) -> None:
    """Each damage is a ValueError or a valid file with other content: no other error, no crash."""
    masks = Masks({"fc": BITS, "b": torch.ones(9, dtype=torch.bool)})
    masks.save(tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    refused = 0
    for at in range(len(data)):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            data[at] ^= flip
            (tmp_path / "flipped").write_bytes(data)
            data[at] ^= flip
            try:
                assert [m.dtype for m in Masks.load(tmp_path / "flipped").values()]
            except ValueError as error:
                assert "expected a file written by" in str(error)
                refused += 1
    assert refused > 0.8 * 4 * len(data)
