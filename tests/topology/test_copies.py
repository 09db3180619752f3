# SPDX-License-Identifier: MIT
"""A topology is plain data beside its model: it can be copied and pickled, and scores the same."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.topology import Topology


class Mixed(nn.Module):
    """Batch norm, LSTM, a scale that is computed, constants, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.gain = nn.Parameter(torch.randn(6))
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.register_buffer("shift", torch.rand(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.fc(x)) * (1 + self.gain.exp()[:6]) + self.shift
        x = x + self.rnn(x[:, None])[0][:, 0] * torch.arange(6)
        return self.head(x)


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


WAYS = [copy.deepcopy, pickled, saved]
EXAMPLE = torch.randn(3, 4)


@pytest.mark.parametrize("way", WAYS[:2], ids=lambda f: f.__name__)
@pytest.mark.parametrize("criterion", ["lookahead", "lookahead_act"])
def test_a_copy_scores_its_own_model(way: Callable[[Any], Any], criterion: str) -> None:
    model = Mixed().eval()
    topology = lap_ext.trace(model, EXAMPLE)
    data = [(EXAMPLE, torch.zeros(3))] if criterion == "lookahead_act" else None
    expected = lap_ext.scores(model, topology=topology, criterion=criterion, data=data)
    twin, again = way((model, topology))
    assert isinstance(again, Topology) and again.model is twin is not model
    assert str(again) == str(topology)
    found = lap_ext.scores(twin, topology=again, criterion=criterion, data=data)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        twin.fc.weight.zero_()
    changed = lap_ext.scores(twin, topology=again, criterion=criterion, data=data)
    assert not changed["fc"].any() and expected["fc"].any()
    assert all(layer.topology is again for layer in again.layers.values())


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_results_and_masks(way: Callable[[Any], Any]) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    result = lap_ext.prune(net, torch.ones(1, 4), sparsity=0.5)
    again = way(result)
    assert again.masks == result.masks and again.layers == result.layers
    assert str(again) == str(result)
