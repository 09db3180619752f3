# SPDX-License-Identifier: MIT
"""Structures on the zoo's models: a streamed checkpoint has the bits of the model in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint
from tests import zoo
from tests.helpers.checkpoints import bits, saved, write
from tests.helpers.one_trace import one_trace

pytestmark = pytest.mark.filterwarnings("ignore:.* does not fit some layers:UserWarning")

STRUCTURES: dict[str, dict[str, Any]] = {
    "2:4": {},
    "row": {"sparsity": 0.5, "scope": "global", "rounds": 2},
    "16x16": {"sparsity": 0.5},
    "4x4": {"sparsity": 0.6},
}
SMALL = "130KB"  # most layers do not fit beside their scores
PLAIN = ["resnet_basic", "resnext", "mobilenet_v1", "vit_mha"]
TRANSFORMERS = ["hf_gpt2_eager", "hf_llama_eager", "hf_mixtral_batched_mm"]


def written(directory: Path) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint."""
    return {
        name: x
        for path in directory.glob("model*.safetensors")
        for name, x in load_file(path).items()
    }


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    one_trace(monkeypatch)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_torch(name: str, tmp_path: Path) -> None:
    (entry,) = (x for x in zoo.VISION if x.name == name)
    model, args, _ = entry.make()
    topology = lap_ext.trace(model, args)
    source = write(tmp_path / "dense", model.state_dict())
    for structure, how in STRUCTURES.items():
        twin, out = copy.deepcopy(model), tmp_path / structure
        want = lap_ext.prune(twin, None, topology=topology, structure=structure, **how)
        given: dict[str, Any] = {"model": model, "example_inputs": args, "memory": SMALL}
        got = checkpoint.prune(source, out, structure=structure, **given, **how)
        check(got, want, structure)
        assert all(
            torch.equal(bits(x), bits(twin.state_dict()[k])) for k, x in written(out).items()
        )
        if structure == "2:4":
            check_groups(twin, want)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, tmp_path: Path) -> None:
    """GPT-2's weights are [in, out]; Llama has grouped queries, Mixtral packed experts."""
    model, inputs = saved(name, tmp_path / "dense")
    if "experts" in "".join(model.state_dict()):
        model.set_experts_implementation("batched_mm")  # as the zoo has it
    topology = lap_ext.trace(model, inputs)
    for structure, how in STRUCTURES.items():
        twin, out = copy.deepcopy(model), tmp_path / structure
        want = lap_ext.prune(twin, None, topology=topology, structure=structure, **how)
        got = checkpoint.prune(tmp_path / "dense", out, structure=structure, memory=SMALL, **how)
        check(got, want, structure)
        again = dict(type(model).from_pretrained(out, dtype="auto").named_parameters())
        assert all(torch.equal(bits(x), bits(again[k])) for k, x in twin.named_parameters())


def check(got: Any, want: lap_ext.PruneResult, structure: str) -> None:
    """Checks that masks, the table and what was left dense are the same."""
    assert got.masks == want.masks and len(want.masks) > 1
    assert list(got.layers) == list(want.layers)
    assert dict(got.left_dense) == dict(want.left_dense)
    assert structure == "16x16" or want.sparsity > 0.35  # few layers have more than a block


def check_groups(model: nn.Module, want: lap_ext.PruneResult) -> None:
    """Counts two of every four inputs of a plain layer, at each kernel position."""
    counted = 0
    for name in want.masks:
        layer = model.get_submodule(name.removesuffix(".in_proj_weight"))
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            moved = layer.weight.detach().movedim(1, -1)
            groups = moved.reshape(-1, 4)
            assert ((groups != 0).sum(1) <= 2).all() and moved.shape[-1] % 4 == 0
            counted += 1
    assert counted
