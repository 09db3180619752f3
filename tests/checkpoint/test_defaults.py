# SPDX-License-Identifier: MIT
"""Defaults of checkpoint.prune, as in memory: zeros are pruned, floors hold, embeddings stay."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import record, verifying
from tests.helpers.checkpoints import INPUTS, least_memory, network, prune, write


def pruned_before() -> nn.Sequential:
    """Two thirds of the weights are zero, of either sign; some live ones have dead neighbors."""
    net = network()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in (net[0], net[3], net[5]):
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) > 0.66)
        net[5].weight[:, :35] = 0  # dead: half of the outputs of 3
    return net


GIVEN: dict[str, dict[str, Any]] = {
    "layer": {},
    "few": {"sparsity": 0.9},
    "magnitude": {"criterion": "magnitude", "sparsity": 0.9},
    "lamp": {"scope": "global", "sparsity": 0.9},
    "lamp_all": {"scope": "global", "sparsity": 0.2},
    "norm": {"scope": "global", "normalize": "norm", "sparsity": 0.9},
    "raw": {"scope": "global", "normalize": "none", "criterion": "magnitude", "sparsity": 0.9},
    "random": {"scope": "global", "normalize": "none", "criterion": "random"},
    "floor": {"min_keep": 100, "sparsity": 0.99},
    "floor_lamp": {"min_keep": 0.08, "scope": "global", "sparsity": 0.9},
    "floor_raw": {"min_keep": 0.08, "scope": "global", "sparsity": 0.9, "normalize": "none"},
    "floor_clamped": {"min_keep": 400, "scope": "global", "sparsity": 0.9},
    "floor_more": {"min_keep": 0.5, "scope": "global", "sparsity": 0.4, "normalize": "norm"},
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_pruned_checkpoint_is_pruned_as_in_memory(name: str, tmp_path: Path) -> None:
    net, out = pruned_before(), tmp_path / "out"
    options = {"sparsity": 0.5} | GIVEN[name]
    source = write(tmp_path / "dense", net.state_dict())
    few = least_memory(lambda few: prune(source, out, memory=few, **options))
    for memory in (few, "1GB"):
        got = prune(source, tmp_path / str(memory), memory=memory, **options)
        want = lap_ext.prune(net, INPUTS, **options, apply=False)
        assert got.masks == want.masks
        assert got.to_json() == want.to_json()
        live = {n: net.get_parameter(f"{n}.weight") != 0 for n in got.masks}
        assert all(bool((live[n] | ~mask).all()) for n, mask in got.masks.items())
        assert got.kept == got.nonzero


def test_a_layer_of_zeros_and_one_before_it(tmp_path: Path) -> None:
    net = network()
    net[5].weight.data.zero_()
    source = write(tmp_path / "dense", net.state_dict())
    for scope in ("layer", "global"):
        with pytest.warns(UserWarning, match="All scores are 0 in '3'.*by magnitude"):
            got = prune(source, tmp_path / scope, 0.8, scope=scope)
        with pytest.warns(UserWarning, match="All scores are 0 in '3'.*by magnitude"):
            want = lap_ext.prune(net, INPUTS, 0.8, scope=scope, apply=False)
        assert got.masks == want.masks and list(got.masks) == ["0", "3"]
        assert got.left_dense == want.left_dense == {"5": "all zero"}


def test_an_empty_layer_is_said(tmp_path: Path) -> None:
    net = network()
    net[3].weight.data.mul_(1e-9)
    source = write(tmp_path / "dense", net.state_dict())
    raw = {"scope": "global", "normalize": "none", "criterion": "magnitude"}
    with pytest.warns(UserWarning, match=r"1 of 3 layers keep no weight: '3'"):
        result = prune(source, tmp_path / "raw", 0.9, **raw)
    assert result.empty_layers == ["3"] and "EMPTY" in str(result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prune(source, tmp_path / "lamp", 0.9, scope="global").empty_layers == []


class Words(nn.Module):
    """An embedding, a hidden layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.hidden = nn.Embedding(30, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.tokens(x)))


def test_embeddings_and_heads_stay_dense(tmp_path: Path) -> None:
    net, ids = Words(), torch.ones(1, 5, dtype=torch.int64)
    source = write(tmp_path / "dense", net.state_dict(), shards=1)
    given: dict[str, Any] = {"model": net, "example_inputs": ids}
    result = checkpoint.prune(source, tmp_path / "out", 0.5, **given)
    want = lap_ext.prune(net, ids, 0.5, apply=False)
    assert result.masks == want.masks and str(result) == str(want)
    assert result.left_dense == {"tokens": "embedding", "head": "output head"}
    assert [layer.name for layer in checkpoint.scores(source, **given).layers] == ["hidden"]
    every = checkpoint.prune(source, tmp_path / "every", 0.5, layers="*", **given)
    assert list(every.masks) == ["tokens", "hidden", "head"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_verify_knows_zeros_of_the_original(scope: Any, tmp_path: Path) -> None:
    net = pruned_before()
    source = write(tmp_path / "dense", net.state_dict())
    prune(source, tmp_path / "out", 0.5, scope=scope)
    verdict = verifying.verify(tmp_path / "out", source, sparsity=0.5, scope=scope)
    assert verdict.ok, verdict.findings
    assert not verifying.verify(tmp_path / "out", source, sparsity=0.9, scope=scope).ok


def test_verify_knows_layers_of_zeros(tmp_path: Path) -> None:
    """A layer that is all zero has no share of an allocation, neither here nor there."""
    net = network()
    net[0].weight.data.zero_()
    source = write(tmp_path / "dense", net.state_dict())
    with pytest.warns(UserWarning, match="All scores are 0 in '3'"):
        result = prune(source, tmp_path / "out", lap_ext.erk(0.9))
    assert result.kept == 1113 and list(result.left_dense) == ["0"]  # a tenth of 11,130
    assert verifying.verify(tmp_path / "out", source, sparsity=lap_ext.erk(0.9)).ok


def test_verify_knows_the_floors_of_the_record(tmp_path: Path) -> None:
    source = write(tmp_path / "dense", network().state_dict())
    result = prune(source, tmp_path / "out", 0.99, min_keep=100)
    options = {"sparsity": ["0.99"], "scope": "layer", "min_keep": 100}
    record.write(tmp_path / "out", options, result)
    for sparsity in (None, 0.99):
        assert verifying.verify(tmp_path / "out", source, sparsity=sparsity).ok
    record.write(tmp_path / "out", options | {"min_keep": 90}, result)
    assert not verifying.verify(tmp_path / "out", source, sparsity=0.99).ok
