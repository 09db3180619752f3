# SPDX-License-Identifier: MIT
"""A criterion of ten lines prunes a model in memory, and a directory larger than the memory.

Neither says where weights live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint, criteria
from tests.helpers.checkpoints import bits, write
from tests.helpers.place_nets import state_of

INPUTS = torch.zeros(1, 40)


class Damped(criteria.Criterion):
    """The square of a weight, by the norm of what feeds it."""

    def weight(self, network: Any, chunk: Any) -> Tensor:
        return chunk.weight**2

    def norms(self, network: Any, role: Any) -> criteria.Norms:
        into, _ = network.norms(role)
        return into, None


def squares(layer: lap_ext.Layer) -> Tensor:
    """Scores of a layer that depend on all of it."""
    weight = layer.weight.float()
    return weight**2 / weight.square().mean(dim=1, keepdim=True)


@pytest.fixture
def registered() -> Iterator[Callable[[Any], str]]:
    """Registers a criterion for one test."""
    before = dict(criteria.REGISTRY)

    def register(own: Any) -> str:
        criteria.register("own")(own)
        return "own"

    yield register
    criteria.REGISTRY.clear()
    criteria.REGISTRY.update(before)


def three(kind: torch.dtype) -> nn.Sequential:
    """Layers of which a few rows fit."""
    layers = [nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 60)]
    return nn.Sequential(*layers).to(kind)


def many() -> nn.Sequential:
    """Layers of which one fits, with 36 bytes per weight beside it."""
    return nn.Sequential(nn.Linear(40, 128), *(nn.Linear(128, 128) for _ in range(28)))


HOWS: list[dict[str, Any]] = [
    {},
    {"scope": "global"},
    {"scope": "global", "normalize": "none", "rounds": 2},
    {"order": "backward"},
]
each_how = pytest.mark.parametrize(
    "how", HOWS, ids=lambda how: "-".join(map(str, how.values())) or "layer"
)


def check(model: nn.Module, memory: int, tmp_path: Path, **how: Any) -> None:
    """Prunes both, and compares masks, tables and every bit of the weights."""
    source = write(tmp_path / "dense", state_of(model))
    assert memory < sum(path.stat().st_size for path in source.glob("*.safetensors"))
    result = checkpoint.prune(
        source, tmp_path / "out", 0.7, model=model, example_inputs=INPUTS, memory=memory, **how
    )
    want = lap_ext.prune(model, INPUTS, 0.7, **how)
    assert result.masks == want.masks and list(result.layers) == list(want.layers)
    assert result.criterion == want.criterion == "own"
    pruned = {}
    for path in (tmp_path / "out").glob("model*.safetensors"):
        pruned |= load_file(path)
    assert pruned.keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert torch.equal(bits(pruned[name]), bits(x)), name


@each_how
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_class(kind: torch.dtype, how: dict[str, Any], registered: Any, tmp_path: Path) -> None:
    model = three(kind)
    memory = 200_000 if kind == torch.float32 else 150_000
    check(model, memory, tmp_path, criterion=registered(Damped), **how)


@each_how
def test_a_function(how: dict[str, Any], registered: Any, tmp_path: Path) -> None:
    check(many(), 1_750_000, tmp_path, criterion=registered(squares), **how)
