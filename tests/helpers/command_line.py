# SPDX-License-Identifier: MIT
"""For the tests of the command line: small folders, a module with factories, a way to run lap-ext."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, torch.zeros(1, 8)

def bare():
    return net()[0]

def named():
    return net()[0], {"input": torch.zeros(1, 8)}

def broken():
    raise RuntimeError("no luck\\nat all")

def wrong():
    return 3

value = 3
"""

Run = Callable[..., tuple[int, str, str]]


def dense() -> dict[str, torch.Tensor]:
    space: dict[str, Any] = {}
    exec(FACTORY, space)
    return {name: value.clone() for name, value in space["bare"]().state_dict().items()}


def one_line(shown: tuple[int, str, str]) -> str:
    """The line that a mistake gave."""
    status, out, error = shown
    assert (status, out) == (2, "")
    assert error.endswith("\n") and error.count("\n") == 1 and "Traceback" not in error
    return error


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], object]) -> None:
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            edit(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})
