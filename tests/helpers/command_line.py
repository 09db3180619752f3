# SPDX-License-Identifier: MIT
"""For the tests of the command line: small folders, a module with factories, a way to run lap-ext."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lap_ext.cli import main

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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama, in shards, and gpt2, with tied embeddings, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers", reason="transformers makes the folders")
    place = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(llama).save_pretrained(place / "llama", max_shard_size="12KB")
    gpt2 = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(place / "gpt2")
    return place


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs lap-ext in an empty folder with a module `nets` in it: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(FACTORY)

    def call(*argv: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in argv])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


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
