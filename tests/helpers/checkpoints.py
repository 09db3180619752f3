# SPDX-License-Identifier: MIT
"""Small checkpoint folders, and the same models in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint
from tests import zoo

INPUTS = torch.zeros(1, 6)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers whose sizes are no powers of two, with a norm between them."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(6, 150), nn.LayerNorm(150), nn.ReLU(), nn.Linear(150, 70), nn.ReLU(),
        nn.Linear(70, 9),
    )  # fmt: skip
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    return net.to(dtype)


def write(folder: Path, state: dict[str, Tensor], shards: int = 2) -> Path:
    """A folder with the tensors in so many files, an index, and a file that is no weight."""
    folder.mkdir()
    state = {name: x.contiguous() for name, x in state.items()}
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    table = {name: files[place * shards // len(state)] for place, name in enumerate(state)}
    for file in files:
        part = {name: x for name, x in state.items() if table[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def prune(source: Path, out: Path, sparsity: Any = 0.6, **options: Any) -> Any:
    """checkpoint.prune of network()."""
    options = {"model": network(), "example_inputs": INPUTS} | options
    return checkpoint.prune(source, out, sparsity, **options)


def least_memory(call: Callable[[int], Any]) -> int:
    """The smallest budget that checkpoint.prune takes, as its error says."""
    with pytest.raises(ValueError, match=r"memory of [\d,]+ bytes or more") as caught:
        call(1)
    found = re.search(r"memory of ([\d,]+) bytes", str(caught.value))
    assert found
    return int(found[1].replace(",", ""))


def saved(name: str, folder: Path, dtype: torch.dtype | None = None, size: str = "2KB") -> Any:
    """A model of the zoo's transformers, saved in shards: (model as it is loaded, args, kwargs)."""
    pytest.importorskip("transformers")
    (entry,) = (entry for entry in zoo.HF if entry.name == name)
    model, args, kwargs = entry.make()
    model.to(dtype or model.dtype).save_pretrained(folder, max_shard_size=size)
    return type(model).from_pretrained(folder, dtype="auto").eval(), args, kwargs


def check_same(out: Path, got: Any, model: nn.Module, want: lap_ext.PruneResult) -> None:
    """The checkpoint, its masks and its table are those of the model in memory."""
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
    """The bits of a tensor as integers: -0.0 is not 0.0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(kinds[x.element_size()])
