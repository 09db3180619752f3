# SPDX-License-Identifier: MIT
"""Masks on disk: the exact bytes, what the safetensors package reads, interrupted saves.

The oracle of the bits is numpy.packbits. Files that save did not write: test_hostile_files.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lap_ext
from lap_ext.masks import Masks, file
from tests.helpers import masked_network as cases
from tests.helpers.processes import run_python

BITS = torch.tensor([[True, False, True], [False, False, True]])  # 1 + 4 + 32


def metadata(masks: dict[str, Tensor]) -> dict[str, str]:
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    sums = {
        name: file.checksum(name, mask.shape, [bytes(file.pack(mask).tolist())])
        for name, mask in masks.items()
    }
    texts = {"layers": json.dumps(shapes), "checksums": json.dumps(sums)}
    return {"lap_ext": "0.1.0", "format": "2", **texts}


# --- what is written ------------------------------------------------------------------------------


def test_the_bytes(tmp_path: Path) -> None:
    """The format, spelled out: a change of it must change FORMAT."""
    Masks({"fc": BITS, "b": torch.ones(9, dtype=torch.bool)}).save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    head = int.from_bytes(data[:8], "little")
    assert head % 8 == 0 and data[8 + head :] == bytes([0b100101, 0xFF, 1])
    sums = {
        "fc": hashlib.blake2b(b'["fc", [2, 3]]' + bytes([0b100101]), digest_size=16).hexdigest(),
        "b": hashlib.blake2b(b'["b", [9]]' + bytes([0xFF, 1]), digest_size=16).hexdigest(),
    }
    assert json.loads(data[8 : 8 + head]) == {
        "__metadata__": {
            "lap_ext": lap_ext.__version__,
            "format": "2",
            "layers": '{"fc":[2,3],"b":[9]}',
            "checksums": json.dumps(sums, separators=(",", ":")),
        },
        "fc": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
    }
    Masks.load(tmp_path / "m").save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data


@pytest.mark.parametrize("structure", ["2:4", "1:8/flat", "16x3", "row", "column", "groups"])
def test_the_structure_is_in_the_file(structure: str, tmp_path: Path) -> None:
    masks = Masks({"fc": BITS}, structure)
    masks.save(tmp_path / "m")
    text = json.dumps(["fc", [2, 3], structure]).encode()
    with safetensors.safe_open(tmp_path / "m", framework="pt") as reader:
        facts = reader.metadata()
    assert facts["structure"] == structure and facts["format"] == "2"
    sums = {"fc": hashlib.blake2b(text + bytes([0b100101]), digest_size=16).hexdigest()}
    assert json.loads(facts["checksums"]) == sums
    loaded = Masks.load(tmp_path / "m")
    assert loaded == masks and loaded.structure == structure
    model = nn.ModuleDict({"fc": nn.Linear(3, 2)})
    assert Masks.load(tmp_path / "m", model).structure == structure


def test_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    masks = cases.random_masks(cases.net())
    masks.save(tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m")
    assert set(tensors) == set(masks)
    for name, mask in masks.items():
        bits = np.packbits(mask.numpy().ravel(), bitorder="little")
        assert np.array_equal(tensors[name].numpy(), bits)


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    """Its order of tensors and metadata is its own; the layers' order is in the metadata."""
    packed = {"b": file.pack(BITS), "a": file.pack(~BITS)}
    safetensors.torch.save_file(packed, tmp_path / "m", metadata({"b": BITS, "a": ~BITS}))
    masks = Masks.load(tmp_path / "m")
    assert list(masks) == ["b", "a"] and masks == Masks({"b": BITS, "a": ~BITS})


SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (8,), (9,), (2, 2, 2), (64,), (5, 3, 3, 3), (1000, 13)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], tmp_path: Path, device: str) -> None:
    masks = Masks({"x": (torch.rand(shape) < 0.5).to(device), "y": torch.rand(3) < 0.5})
    masks.save(tmp_path / "m")
    loaded = Masks.load(tmp_path / "m")
    assert loaded == masks and loaded["x"].device.type == "cpu" and loaded["x"].shape == shape


@given(st.lists(st.lists(st.booleans()), max_size=4))
def test_pack_against_numpy(rows: list[list[bool]]) -> None:
    for row in rows:
        mask = torch.tensor(row, dtype=torch.bool)
        packed = file.pack(mask)
        assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), bitorder="little"))
        assert torch.equal(file.unpack(packed, (len(row),)), mask)


def test_any_strides(tmp_path: Path) -> None:
    """Bits are in C order, whatever lies in memory; an expanded mask is written out."""
    strided = {
        "t": BITS.t(),
        "last": (torch.rand(2, 3, 4, 5) < 0.5).to(memory_format=torch.channels_last),
        "one": torch.tensor([True]).expand(20),
        "step": (torch.rand(40) < 0.5)[1::3],
    }
    Masks(strided).save(tmp_path / "m")
    assert Masks.load(tmp_path / "m") == Masks(strided)


def test_no_layers_and_any_names(tmp_path: Path) -> None:
    for masks in (
        Masks({}),
        Masks({"层.é \n\"'": BITS, "": BITS, "a" * 1000: ~BITS, "lap_ext": BITS, "layers": BITS}),
    ):
        masks.save(tmp_path / "m")
        loaded = Masks.load(tmp_path / "m")
        assert loaded == masks and list(loaded) == list(masks)


def test_names_that_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got '__metadata__'"):
        Masks({"__metadata__": BITS}).save(tmp_path / "m")
    with pytest.raises(UnicodeEncodeError):
        Masks({"\ud800": BITS}).save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_more_names_than_a_file_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be read again is not written."""
    masks = Masks({"a": BITS, "b": BITS})
    masks.save(tmp_path / "m")
    monkeypatch.setattr(file, "_LONGEST", 70)
    with pytest.raises(ValueError, match=r"Masks.save: expected names .* at most, got 79"):
        masks.save(tmp_path / "n")
    with pytest.raises(ValueError, match="its metadata is damaged"):
        Masks.load(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# --- an interrupted save, and where files go ------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_save_leaves_the_old_file(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Masks({"a": BITS, "b": BITS}), Masks({"a": ~BITS, "b": ~BITS})
    old.save(tmp_path / "m")
    calls = []

    def pack(mask: Tensor) -> Tensor:
        calls.append(mask)
        if len(calls) == 2:
            raise kind
        return torch.zeros(1, dtype=torch.uint8)

    monkeypatch.setattr(file, "pack", pack)
    with pytest.raises(kind):
        new.save(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and Masks.load(tmp_path / "m") == old


def test_a_killed_save_leaves_the_old_file(tmp_path: Path) -> None:
    """No clean-up runs: the file is the old one, and the next save removes the temporary one."""
    masks = Masks({"a": BITS})
    masks.save(tmp_path / "m")
    script = f"""
        import os, torch
        from lap_ext.masks import Masks
        os.fsync = lambda number: os._exit(9)
        Masks({{"a": torch.zeros(2, 3, dtype=torch.bool)}}).save({str(tmp_path / "m")!r})
    """
    done = run_python(textwrap.dedent(script))
    assert done.returncode == 9, done.stderr
    assert Masks.load(tmp_path / "m") == masks and len(list(tmp_path.iterdir())) == 2
    masks.save(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_concurrent_reader_has_one_complete_file(tmp_path: Path) -> None:
    """The old file is replaced, not overwritten."""
    Masks({"a": BITS}).save(tmp_path / "m")
    old = (tmp_path / "m").read_bytes()
    with (tmp_path / "m").open("rb") as reader:
        Masks({"a": ~BITS}).save(tmp_path / "m")
        assert reader.read() == old != (tmp_path / "m").read_bytes()


def test_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = Masks({"a": BITS})
    monkeypatch.chdir(tmp_path)
    masks.save("plain")
    assert Masks.load("plain") == masks
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(Path("plain").stat().st_mode) == 0o666 & ~umask
    Path("link").symlink_to("plain")
    Masks({"a": ~BITS}).save("link")
    assert Path("link").is_symlink() and Masks.load("plain") == Masks({"a": ~BITS})
    with pytest.raises(FileNotFoundError) as caught:
        masks.save("nowhere/m")
    assert str(caught.value) == (
        "Masks.save: expected a directory for the file 'nowhere/m', got none at "
        f"'{tmp_path}/nowhere'. Make it first, or correct the path."
    )
    with pytest.raises(FileNotFoundError) as caught:
        Masks.load("plane")
    assert str(caught.value) == (
        "Masks.load: expected a file written by Masks.save, got nothing at 'plane'. Did you mean "
        "'plain'?"
    )
    with pytest.raises(FileNotFoundError, match=r"nothing at 'nowhere/m'\. Check the path\.$"):
        Masks.load("nowhere/m")
    with pytest.raises(OSError, match=r"Masks.save, got the directory .*\. Pass the file in it\.$"):
        Masks.load(tmp_path)
    for call in (Masks.load, masks.save):
        with pytest.raises(TypeError, match="expected path to be a str or a Path, got int"):
            call(5)
    with pytest.raises(OSError, match=r"expected a file, or none yet, at .*, got a directory"):
        masks.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "plain"]


def test_loaded_masks_do_not_hang_on_the_file(tmp_path: Path) -> None:
    Masks({"a": BITS}).save(tmp_path / "m")
    masks = Masks.load(tmp_path / "m")
    (tmp_path / "m").write_bytes(b"\xff" * 1000)
    masks["a"][0, 1] = True  # and they can be changed
    assert masks.kept == 4


# --- without other packages -----------------------------------------------------------------------


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving does not need it; loading says what to install."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    Masks({"a": BITS}).save(tmp_path / "m")
    with pytest.raises(ModuleNotFoundError) as caught:
        Masks.load(tmp_path / "m")
    assert str(caught.value) == (
        "Masks.load: expected the safetensors package (it reads the file), got none. "
        "Run: pip install safetensors."
    )


def test_without_numpy(tmp_path: Path) -> None:
    script = f"""
        import sys
        sys.modules["numpy"] = None
        import torch
        from lap_ext.masks import Masks
        masks = Masks({{"a": torch.eye(5) == 1, "b": torch.ones(0) == 1}})
        masks.save({str(tmp_path / "m")!r})
        assert Masks.load({str(tmp_path / "m")!r}) == masks
    """
    done = run_python(textwrap.dedent(script))
    assert done.returncode == 0, done.stderr


# --- against a model ------------------------------------------------------------------------------


def test_load_for_a_model(tmp_path: Path, device: str) -> None:
    model = cases.net().to(device)
    masks = cases.random_masks(model)
    masks.save(tmp_path / "m")
    loaded = Masks.load(tmp_path / "m", model)
    assert loaded == masks and {m.device.type for m in loaded.values()} == {device}
    loaded.apply(model)
    cases.check_zero(model.cpu(), masks)
    with torch.device("meta"):
        shell = cases.net()
    assert Masks.load(tmp_path / "m", shell) == masks


def change_shape(model: nn.Sequential) -> None:
    model.fc1 = nn.Linear(64, 9)


def rename(model: nn.Sequential) -> None:
    model.last = model.fc2
    del model.fc2


MISFITS: list[tuple[Callable[[nn.Sequential], None], str]] = [
    (change_shape, "got 1 that do not. They are:\n  'fc1': mask [8, 64], parameter [9, 64]."),
    (
        rename,
        "got 1 that do not. They are:\n  'fc2': the model has no such parameter.\n"
        "Layers of the model without a mask: last.",
    ),
]


@pytest.mark.parametrize(("change", "text"), MISFITS, ids=["shape", "name"])
def test_load_for_another_model(
    change: Callable[[nn.Sequential], None], text: str, tmp_path: Path
) -> None:
    model = cases.net()
    cases.random_masks(model).save(tmp_path / "m")
    change(model)
    with pytest.raises(ValueError) as caught:
        Masks.load(tmp_path / "m", model)
    assert str(caught.value) == f"Masks.load: expected masks that fit the model, {text}"
