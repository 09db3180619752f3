# SPDX-License-Identifier: MIT
"""Layers named by patterns, modules, types and parameters: in layers=, exclude= and a sparsity."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext

IDS = torch.tensor([[1, 2, 0]])


class Tiny(nn.Module):
    """An embedding tied to the head, and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 4, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


FIRST, SECOND = ["blocks.0.0", "blocks.0.2"], ["blocks.1.0", "blocks.1.2"]
CHOICES: dict[str, tuple[Callable[[Tiny], Any], list[str]]] = {
    "a module": (lambda m: m.blocks[0], FIRST),
    "a list of modules": (lambda m: [m.blocks[0][0], m.blocks[1]], ["blocks.0.0", *SECOND]),
    "modules in a generator": (lambda m: (block[0] for block in m.blocks), ["blocks.0.0",
                                                                            "blocks.1.0"]),
    "a type": (lambda m: nn.Embedding, ["emb"]),
    "a type of blocks": (lambda m: [nn.ModuleList], FIRST + SECOND),
    "a tied module": (lambda m: m.head, ["emb"]),
    "a parameter": (lambda m: m.blocks[1][2].weight, ["blocks.1.2"]),
    "parameters": (lambda m: list(m.blocks[0][0].parameters())[:1], ["blocks.0.0"]),
    "of all kinds": (lambda m: ["blocks.1.*", nn.Embedding, m.blocks[0][2]],
                     ["emb", "blocks.0.2", *SECOND]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHOICES))
def test_layers_and_exclude_take_parts_of_the_model(name: str) -> None:
    choice, expected = CHOICES[name]
    model = Tiny()
    topology = lap_ext.trace(model, IDS)
    scored = lap_ext.scores(model, topology=topology, layers=choice(model))
    assert list(scored) == expected
    left = lap_ext.prune(
        model, None, 0.5, topology=topology, exclude=choice(model), layers="*", apply=False
    )
    assert list(left.masks) == [name for name in topology.layers if name not in expected]
    pruner = lap_ext.Pruner(
        model, None, lap_ext.one_shot(0.5), topology=topology, layers=choice(model)
    )
    assert [layer.name for layer in pruner.layers] == expected


def test_keys_of_a_sparsity_take_parts_of_the_model() -> None:
    """The first match counts, as for patterns; the pruner's state has names."""
    model = Tiny()
    topology = lap_ext.trace(model, IDS)
    sparsity = {"blocks.0.0": 0.75, model.blocks[0]: 0.5, nn.ModuleList: 0.25}
    named = {"blocks.0.0": 0.75, "blocks.0.*": 0.5, "blocks.*": 0.25}
    mine, expected = (
        lap_ext.prune(model, None, x, topology=topology, apply=False) for x in (sparsity, named)
    )
    assert mine.masks == expected.masks
    pruner = lap_ext.Pruner(model, None, lambda step: sparsity, topology=topology)
    pruner.step()
    state = pruner.state_dict()
    assert state["prunings"] == [
        [0, "blocks.0.0=0.75, blocks.0.2=0.5, blocks.1.0=0.25, blocks.1.2=0.25"]
    ]
    other = lap_ext.Pruner(Tiny(), None, lambda step: sparsity, topology=topology)
    with pytest.raises(ValueError, match=r"got a Sequential, with none\. Pass a part of this"):
        other.step()


KINDS = "patterns of layer names, modules, types of modules (nn.Embedding) or parameters"
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a number": ({"exclude": 5}, TypeError, f"expected exclude to be {KINDS}, got int."),
    "numbers": ({"layers": [0, 1]}, TypeError, f"expected layers to be {KINDS}, got int."),
    "another type": ({"exclude": [int]}, TypeError, f"exclude to be {KINDS}, got the type int."),
    "a type without layers": (
        {"exclude": [nn.LayerNorm]},
        ValueError,
        "expected exclude patterns that name a layer, got the type LayerNorm, with none. The "
        "layers are emb, blocks.0.0,",
    ),
    "a module of another model": (
        {"exclude": Tiny().head},
        ValueError,
        "expected exclude patterns that name a layer, got a Linear, with none. Pass a part of "
        "this model. The layers are emb,",
    ),
    "a key": (
        {"sparsity": {5: 0.5}},
        TypeError,
        f"prune: expected keys of sparsity to be {KINDS}, got int.",
    ),
    "a key without layers": (
        {"sparsity": {nn.LayerNorm: 0.5}},
        ValueError,
        "expected keys of sparsity that name a layer, got the type LayerNorm, with none.",
    ),
    "a share": ({"sparsity": {nn.Linear: "0.5"}}, TypeError, "to be a number"),
    "a shadowed key": (
        {"sparsity": {"*": 0.5, nn.Embedding: 0.9}, "layers": "*"},
        ValueError,
        "got 'emb', whose layers all match '*' before it. Put it first.",
    ),
    "neighbors": (
        {"neighbors": 5},
        TypeError,
        "prune: expected neighbors to be a dict: layer name -> (previous, next), got int.",
    ),
    "on_progress": (
        {"on_progress": 5},
        TypeError,
        "prune: expected on_progress to be a function of a lap_ext.progress.Progress, got int.",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_say_what_is_expected(name: str) -> None:
    options, error, text = MISTAKES[name]
    with pytest.raises(error, match=re.escape(text)):
        lap_ext.prune(Tiny(), IDS, **{"sparsity": 0.5, **options})


@pytest.mark.parametrize(
    "make", [lap_ext.allocation.per_layer, lambda ratios: lap_ext.allocation.compounded(ratios, 1)]
)
def test_allocations_know_no_modules(make: Callable[[Any], Any]) -> None:
    text = "expected keys to be patterns of layer names, got Embedding. Modules and types of"
    with pytest.raises(TypeError, match=re.escape(text)):
        make({nn.Embedding: 0.5})
