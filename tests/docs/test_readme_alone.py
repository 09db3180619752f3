# SPDX-License-Identifier: MIT
"""Every command and block of the README in a fresh directory: all in order, and each section alone.

What a reader must bring is made here: a checkpoint directory `llama`, the reader's own factory
`my.nets:resnet` and its weights. A section may use what it has made itself, and nothing else.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import lap_ext
from lap_ext.cli import bench, main

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTIONS = {text.partition("\n")[0].strip(): text for text in re.split(r"^## ", README, flags=re.M)}
COMMANDS = {
    name: [
        shlex.split(line, comments=True)[1:]
        for line in re.findall(r"^    (lap-ext .*)$", text, re.M)
    ]
    for name, text in SECTIONS.items()
}
BLOCKS = {
    name: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) for name, text in SECTIONS.items()
}
FACTORY = """
import torch

def resnet():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10),
    )
    return net.eval(), torch.ones(1, 3, 8, 8)
"""


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a reader has: a language model, a module of their own, its weights."""
    transformers = pytest.importorskip("transformers", reason="the commands use transformers")
    from safetensors.torch import save_model

    home = tmp_path_factory.mktemp("reader")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(home / "llama")
    (home / "my").mkdir()
    (home / "my" / "nets.py").write_text(FACTORY)
    names: dict[str, Any] = {}
    exec(FACTORY, names)
    save_model(names["resnet"]()[0], str(home / "resnet.safetensors"))
    return home


def enter(brought: Path, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Goes to a fresh directory with what the reader has brought."""
    for path in brought.iterdir():
        (home / path.name).symlink_to(path)
    patch.chdir(home)
    patch.syspath_prepend(str(home))
    for name in ("my", "my.nets"):
        patch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("section", [name for name, lines in COMMANDS.items() if lines])
def test_the_commands_of_a_section(
    section: str, brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(brought, tmp_path, monkeypatch)
    monkeypatch.setattr(bench, "_STANDARD", bench._STANDARD[:2])  # the third takes seconds
    monkeypatch.setattr(bench, "_SAMPLE_S", 1e-5)
    monkeypatch.setattr(bench, "_PAIRS", 3)
    for line in COMMANDS[section]:
        if line[0] == "inspect" and line[1] == "./llama-tuned":  # made by Trainer: the walk-through
            continue
        assert main([*line, "--quiet"] if line[0] == "bench" else line) == 0, line


def test_all_commands_in_order(
    brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(brought, tmp_path, monkeypatch)
    made = {path.name for path in tmp_path.iterdir()}
    for line in (line for lines in COMMANDS.values() for line in lines):
        if line[0] != "bench" and line[1] != "./llama-tuned":
            assert main(line) == 0, line
    new = {path.name for path in tmp_path.iterdir()} - made
    assert {"llama-50", "llama-80", "resnet-90", "llama-80.html"} <= new


@pytest.mark.parametrize("section", [name for name, blocks in BLOCKS.items() if blocks])
def test_the_blocks_of_a_section(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what another section has imported or made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lap_ext.criteria, "REGISTRY", dict(lap_ext.criteria.REGISTRY))
    names: dict[str, Any] = {"__name__": "readme"}
    for block in BLOCKS[section]:
        exec(compile(block, "README.md", "exec"), names)


def test_there_is_something_to_run() -> None:
    assert sum(map(len, COMMANDS.values())) >= 9 and sum(map(len, BLOCKS.values())) >= 5
