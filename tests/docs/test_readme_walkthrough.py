# SPDX-License-Identifier: MIT
"""The README's walk-through, as it stands there: a folder pruned by one command, its report opened,
fine-tuned by Trainer with the masks kept. The folder is a Llama from a config, trained a little."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from lap_ext.cli import main

transformers = pytest.importorskip("transformers", reason="the walk-through uses transformers")
pytest.importorskip("accelerate", reason="Trainer uses accelerate")

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("## From a checkpoint to a fine-tuned one\n")[2].partition("\n## ")[0]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WORDS = 16


def texts(count: int) -> list[dict[str, Tensor]]:
    """Counting by one, two or three: easy to learn."""
    begin, step = torch.randint(WORDS, (count, 1)), torch.randint(1, 4, (count, 1))
    ids = (begin + step * torch.arange(12)) % WORDS
    return [{"input_ids": row, "labels": row} for row in ids]


@torch.no_grad()
def loss(folder: str, data: list[dict[str, Tensor]]) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.stack([text["input_ids"] for text in data])
    return float(model(input_ids=ids, labels=ids).loss)


def make(folder: str, data: list[dict[str, Tensor]]) -> None:
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    args = transformers.TrainingArguments(
        "dense-run",
        max_steps=150,
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    transformers.Trainer(model, args, train_dataset=data).train()
    model.save_pretrained(folder, max_shard_size="60KB")


def commands() -> Iterator[list[str]]:
    """The arguments of each `lap-ext ...` line."""
    for line in SECTION.splitlines():
        if line.startswith("    lap-ext "):
            yield shlex.split(line, comments=True)[1:]


def looks_right(page: Path) -> None:
    """Opened by a browser: the layers are in the drawn document, and the picture isn't empty."""
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'p'}"]
    dom = subprocess.run(
        [BROWSER, *flags, "--dump-dom", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
        text=True,
    ).stdout
    assert "model.layers.1.mlp.down_proj" in dom and "<svg" in dom


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")  # Trainer's default, without a GPU
def test_walkthrough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = texts(512)
    make("llama", data)
    lines = list(commands())
    assert [line[0] for line in lines] == ["prune", "verify", "inspect"]
    for line in lines[:2]:
        assert main(line) == 0
    if BROWSER is not None:
        looks_right(tmp_path / "llama-80.html")
    (code,) = re.findall(r"^```py\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names: dict[str, Any] = {"texts": data, "lap_ext": lap_ext}
    exec(compile(code, "README.md", "exec"), names)
    assert main(lines[2]) == 0
    dense, pruned, tuned = (
        loss(folder, data[:64]) for folder in ("llama", "llama-80", "llama-tuned")
    )
    assert tuned < pruned and dense < pruned
    masks = names["masks"]
    assert masks.sparsity == pytest.approx(0.8, abs=1e-3)
    model = transformers.AutoModelForCausalLM.from_pretrained("llama-tuned")
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(f"{name}.weight") != 0, mask), name
