# SPDX-License-Identifier: MIT
"""What --checkpoint refuses: numbers that would be other numbers, and what is no file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.command_line import Run, dense, one_line

NORM = """
import torch
from torch import nn

def net():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return model, torch.zeros(1, 3, 4, 4)

def codes():
    model, inputs = net()
    model.register_buffer("codes", torch.zeros(4, dtype=torch.int8))
    return model, inputs
"""


def load(run: Run, tmp_path: Path, change: dict[str, Tensor]) -> tuple[int, str, str]:
    save_file(dense() | change, tmp_path / "w.safetensors")
    return run("inspect", "nets:net", "--checkpoint", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "int8"),
        (torch.uint8, "uint8"),
        (torch.int64, "int64"),
        (torch.bool, "bool"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.float8_e5m2, "float8_e5m2"),
        (torch.complex64, "complex64"),
    ],
)
def test_other_numbers_are_not_loaded_as_floats(
    dtype: torch.dtype, name: str, run: Run, tmp_path: Path
) -> None:
    line = one_line(load(run, tmp_path, {"2.weight": torch.ones(4, 16).to(dtype)}))
    assert f"expected '2.weight' as float32, as the model has it, got {name}" in line
    assert line.endswith("Dequantize or convert it first.\n")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_are_converted(dtype: torch.dtype, run: Run, tmp_path: Path) -> None:
    status, _, error = load(run, tmp_path, {name: x.to(dtype) for name, x in dense().items()})
    assert status == 0, error


def test_buffers(run: Run, tmp_path: Path) -> None:
    (tmp_path / "norms.py").write_text(NORM)
    space: dict[str, object] = {}
    exec(NORM, space)
    model, _ = space["codes"]()  # type: ignore[operator]
    state = dict(model.state_dict())
    file = tmp_path / "w.safetensors"
    save_file(state, file)
    status, _, error = run("inspect", "norms:codes", "--checkpoint", file)
    assert status == 0, error
    save_file(state | {"codes": torch.full((4,), 0.7)}, file)
    line = one_line(run("inspect", "norms:codes", "--checkpoint", file))
    assert "expected 'codes' as int8, as the model has it, got float32" in line


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_no_file(kind: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    line = one_line(run("inspect", "nets:net", "--checkpoint", path))
    assert "expected --checkpoint to be a file" in line
