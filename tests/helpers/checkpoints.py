# SPDX-License-Identifier: MIT
"""Small checkpoint directories, and the same models in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint
from tests import zoo

INPUTS = torch.zeros(1, 6)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers whose sizes are no powers of two, with a norm between them."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(6, 150),
        nn.LayerNorm(150),
        nn.ReLU(),
        nn.Linear(150, 70),
        nn.ReLU(),
        nn.Linear(70, 9),
    )
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    return net.to(dtype)


def write(directory: Path, state: dict[str, Tensor], shards: int = 2) -> Path:
    """Writes the tensors to so many files, with an index and a file without weights."""
    directory.mkdir()
    state = {name: x.contiguous() for name, x in state.items()}
    (directory / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(state, directory / "model.safetensors", {"format": "pt"})
        return directory
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    table = {name: files[index * shards // len(state)] for index, name in enumerate(state)}
    for file in files:
        tensors = {name: x for name, x in state.items() if table[name] == file}
        save_file(tensors, directory / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def change(directory: Path, name: str, edit: Callable[[torch.Tensor], object]) -> None:
    """Edits a tensor in the files of a checkpoint."""
    for path in directory.glob("model*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            edit(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})


def prune(source: Path, out: Path, sparsity: Any = 0.6, **options: Any) -> Any:
    """Runs checkpoint.prune on network()."""
    options = {"model": network(), "example_inputs": INPUTS} | options
    return checkpoint.prune(source, out, sparsity, **options)


def least_memory(call: Callable[[int], Any]) -> int:
    """Reads the smallest budget that checkpoint.prune takes from its error."""
    with pytest.raises(ValueError, match=r"memory of [\d,]+ bytes or more") as caught:
        call(1)
    match = re.search(r"memory of ([\d,]+) bytes", str(caught.value))
    assert match
    return int(match[1].replace(",", ""))


def saved(name: str, directory: Path, dtype: torch.dtype | None = None, size: str = "2KB") -> Any:
    """Saves a model of the zoo's transformers in shards: (the model as it is loaded, inputs)."""
    pytest.importorskip("transformers")
    (entry,) = (entry for entry in zoo.HF if entry.name == name)
    model, args, kwargs = entry.make()
    model.to(dtype or model.dtype).save_pretrained(directory, max_shard_size=size)
    return type(model).from_pretrained(directory, dtype="auto").eval(), args or kwargs


def check_same(out: Path, got: Any, model: nn.Module, want: lap_ext.PruneResult) -> None:
    """Checks that a checkpoint, its masks and its table are those of the model in memory."""
    assert got.masks == want.masks
    assert list(got.layers) == list(want.layers)
    assert got.criterion == want.criterion
    again = type(model).from_pretrained(out, dtype="auto")
    mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert theirs[name].dtype == parameter.dtype
        assert torch.equal(bits(theirs[name]), bits(parameter)), name


def bits(x: Tensor) -> Tensor:
    """Views the bits of a tensor as integers: -0.0 is not 0.0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(kinds[x.element_size()])
