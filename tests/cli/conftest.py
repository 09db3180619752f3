# SPDX-License-Identifier: MIT
"""Checkpoint directories of Hugging Face models, and lap-ext run within this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lap_ext.cli import main
from tests.helpers.command_line import FACTORY, Run


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama, in shards, and GPT-2, with tied embeddings, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers", reason="transformers makes the checkpoints")
    directory = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(directory / "llama", max_shard_size="12KB")
    gpt2 = transformers.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(directory / "gpt2")
    return directory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs lap-ext in a directory with only a module `nets`: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(FACTORY)

    def call(*argv: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in argv])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call
