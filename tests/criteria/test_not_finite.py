# SPDX-License-Identifier: MIT
"""A weight that is not finite is one and the same error, whatever scores it, and wherever it is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint, criteria
from lap_ext.checkpoint.plan import DATA_FREE
from lap_ext.options import NORMALIZATIONS
from lap_ext.topology import Topology
from tests.helpers.checkpoints import change, least_memory, prune, write

INPUTS = torch.ones(2, 6)
DATA = [(torch.rand(5, 6), torch.tensor([0, 1, 2, 3, 0]))]
WITH_DATA = ("lookahead_act", "wanda", "weight_gradient", "obd", "obd_lookahead")
VALUES = (torch.nan, torch.inf, -torch.inf)
SCOPES: dict[str, dict[str, Any]] = {
    "layer": {},
    "global": {"scope": "global"},
    "norm": {"scope": "global", "normalize": "norm"},
    "lamp": {"scope": "global", "normalize": "lamp"},
}
ORDERS: dict[str, dict[str, Any]] = {
    "forward": {"order": "forward"},
    "backward": {"order": "backward"},
    "rounds": {"rounds": 2},
}


class Ones(criteria.Criterion):
    """Reads no weight."""

    def weight(self, network: Any, layer: Any) -> Tensor:
        return torch.ones(layer.shape)


OWN: dict[str, Any] = {
    "ones": lambda layer: torch.ones(layer.shape),
    "squares": lambda layer: layer.weight**2,
    "class": Ones(),
}
SAID = (
    "^{}: expected finite weights in layer '3', got 1 non-finite values, the first at flat index "
    r"13\. Repair them\.$"
)


def damaged() -> nn.Sequential:
    """Three layers; the second one has 50 weights."""
    return nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5), nn.ReLU(),
        nn.Linear(5, 4),
    ).eval()  # fmt: skip


@functools.cache
def traced() -> Topology:
    return lap_ext.trace(damaged(), INPUTS)


@pytest.fixture
def weight() -> Iterator[Tensor]:
    """The second layer's weights, flat; they are mended at the end."""
    flat = traced().model[3].weight.data.view(-1)
    kept = flat.clone()
    yield flat
    flat.copy_(kept)


def scored_by(criterion: str) -> dict[str, Any]:
    """Options of a criterion."""
    data = DATA if criterion in WITH_DATA else None
    return {"topology": traced(), "criterion": OWN.get(criterion, criterion), "data": data}


@pytest.mark.parametrize("order", [*SCOPES, *ORDERS])
@pytest.mark.parametrize("criterion", [*sorted(criteria.REGISTRY), *OWN])
def test_in_memory(criterion: str, order: str, weight: Tensor) -> None:
    """Also where nothing is ranked; and nothing is changed."""
    model = traced().model
    for value, sparsity in zip(VALUES, (0.5, 0.0, 1.0), strict=True):
        weight[13] = value
        before = {name: x.clone() for name, x in model.state_dict().items()}
        with pytest.raises(ValueError, match=SAID.format("prune")):
            options = scored_by(criterion) | (SCOPES | ORDERS)[order]
            lap_ext.prune(model, None, sparsity, min_keep=0, **options)
        for name, x in model.state_dict().items():
            assert torch.equal(x.nan_to_num(7), before[name].nan_to_num(7))


@pytest.mark.parametrize("criterion", [*sorted(criteria.REGISTRY), *OWN])
def test_scores_in_memory(criterion: str, weight: Tensor) -> None:
    weight[13] = torch.nan
    for normalize in NORMALIZATIONS:
        with pytest.raises(ValueError, match=SAID.format("scores")):
            lap_ext.scores(traced().model, **scored_by(criterion), normalize=normalize)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", [kind.name for kind in DATA_FREE])
def test_from_files(criterion: str, scope: str, tmp_path: Path) -> None:
    """With the least memory and with plenty; sparsities that rank nothing, too."""
    net = damaged()
    source = write(tmp_path / "dense", net.state_dict())
    mine: dict[str, Any] = {"model": net, "example_inputs": INPUTS, "criterion": criterion}
    mine |= SCOPES[scope]
    few = least_memory(lambda few: prune(source, tmp_path / "out", memory=few, **mine))
    for value, sparsity, memory in (
        (torch.nan, 0.5, few),
        (torch.inf, 0.5, "1GB"),
        (torch.nan, 0.0, few),
        (-torch.inf, 1.0, "1GB"),
    ):
        change(source, "3.weight", lambda weight, x=value: weight.view(-1)[13].fill_(x))
        with pytest.raises(ValueError, match=SAID.format("checkpoint.prune")):
            prune(source, tmp_path / "out", sparsity, memory=memory, min_keep=0, **mine)
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    mine.pop("scope", None)
    with pytest.raises(ValueError, match=SAID.format("checkpoint.scores")):
        list(checkpoint.scores(source, **mine))
