# SPDX-License-Identifier: MIT
"""A weight that is not finite is one and the same error, whatever scores it, and wherever it is."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint, criteria
from lap_ext.checkpoint import structure
from lap_ext.criteria.context import Network
from lap_ext.options import NORMALIZATIONS
from lap_ext.places import Chunk
from lap_ext.topology import Topology
from tests.helpers.checkpoints import change, least_memory, prune, write
from tests.helpers.criterion_names import of_weights
from tests.helpers.traced_once import traced_once

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

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        return torch.ones_like(chunk.weight)


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
@pytest.mark.parametrize("criterion", [*of_weights(), *OWN])
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


@pytest.mark.parametrize("criterion", [*of_weights(), *OWN])
def test_scores_in_memory(criterion: str, weight: Tensor) -> None:
    weight[13] = torch.nan
    for normalize in NORMALIZATIONS:
        with pytest.raises(ValueError, match=SAID.format("scores")):
            lap_ext.scores(traced().model, **scored_by(criterion), normalize=normalize)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", [*of_weights(), *OWN])
def test_from_files(
    criterion: str, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the least memory and with plenty; sparsities that rank nothing, too."""
    monkeypatch.setattr(structure, "trace", traced_once)
    net = damaged()
    source = write(tmp_path / "dense", net.state_dict())
    mine: dict[str, Any] = {"model": net, "example_inputs": INPUTS}
    mine["criterion"] = OWN.get(criterion, criterion)
    if criterion in WITH_DATA:
        if criterion.startswith("obd"):
            pytest.importorskip("backpack")
        mine["data"] = tmp_path / "statistics"
        save_file(criteria.measure(net, INPUTS, criterion, DATA), mine["data"])
    kept = sorted(path.name for path in tmp_path.iterdir())
    mine |= SCOPES[scope]
    few: int | str = "1GB"  # functions see full layers
    if criterion not in ("ones", "squares"):
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
        assert sorted(path.name for path in tmp_path.iterdir()) == kept
    mine.pop("scope", None)
    with pytest.raises(ValueError, match=SAID.format("checkpoint.scores")):
        list(checkpoint.scores(source, **mine))


BATCH_NORM = "{} in batch norm '1', got {} at index 2. Repair it."
SCALES: dict[str, tuple[int, str, float, str]] = {  # module, its tensor, value, what is said
    "weight": (1, "weight", torch.nan, BATCH_NORM.format("finite weight", "nan")),
    "infinite": (1, "running_var", torch.inf, BATCH_NORM.format("finite running_var", "inf")),
    "nan": (1, "running_var", torch.nan, BATCH_NORM.format("finite running_var", "nan")),
    "negative": (1, "running_var", -1.0, BATCH_NORM.format("running_var > -1e-05 (-eps)", "-1")),
    "layer_norm": (4, "weight", -torch.inf, "entries of '4.weight' that are finite, as factors of "
                   "channels, got -inf at index 2. Repair it."),
}  # fmt: skip


def scaled(case: str) -> nn.Sequential:
    """A batch norm and a layer norm between layers, one with an entry that makes no scale."""
    net = nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5), nn.LayerNorm(5),
        nn.Linear(5, 4),
    ).eval()  # fmt: skip
    module, tensor, value, _ = SCALES[case]
    net.state_dict()[f"{module}.{tensor}"][2] = value
    return net


@pytest.mark.parametrize("case", SCALES)
def test_scales_between_layers(case: str, tmp_path: Path) -> None:
    """The error names what is damaged, not a layer beside it; nothing else reads it."""
    net, module, said = scaled(case), SCALES[case][0], SCALES[case][3]
    mine: dict[str, Any] = {"sparsity": 0.5, "apply": False}
    wrong: list[dict[str, Any]] = [{}, {"scope": "global", "rounds": 2}, {"residual": "chain"}]
    if module == 1:
        wrong += [{"batch_norm": "fold"}, {"criterion": "magnitude_bn"}]
        assert lap_ext.prune(net, INPUTS, **mine, batch_norm="ignore").kept == 65
        with pytest.raises(ValueError, match=r"^bn_scale: expected .* in module, got "):
            lap_ext.bn_scale(net[1])
    assert lap_ext.prune(net, INPUTS, **mine, criterion="magnitude").kept == 65
    for options in wrong:
        with pytest.raises(ValueError) as error:
            lap_ext.prune(net, INPUTS, **mine, **options)
        assert str(error.value).endswith(f": expected {said}"), options
    source = write(tmp_path / "dense", net.state_dict())
    with pytest.raises(ValueError, match=f"^checkpoint.prune: expected {re.escape(said)}"):
        prune(source, tmp_path / "out", 0.5, model=scaled(case), example_inputs=INPUTS)
