# SPDX-License-Identifier: MIT
"""Masked and scaled weights are measured without a copy of them, to the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext.criteria import context
from lap_ext.criteria.context import Network
from lap_ext.places import Memory


def model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(4, 150, 3, groups=2), nn.BatchNorm2d(150), nn.ReLU()),
        *(nn.ConvTranspose2d(150, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 64, 70), nn.BatchNorm1d(70), nn.Linear(70, 3)),
    ).eval()


@pytest.mark.parametrize("batch_norm", ["edge", "fold"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_rows_at_a_time_have_the_bits_of_all(
    masked: bool, batch_norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model()
    for norm in net:
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 2)
    topology = lap_ext.trace(net, torch.zeros(2, 4, 8, 8))
    masks = {x.name: torch.rand(x.shape) > 0.5 for x in topology.layers.values() if masked}
    norms = []
    for copied in (0, 1 << 20):
        monkeypatch.setattr(context, "_COPIED", copied)
        network = Network(Memory(topology, masks), batch_norm)
        norms.append([norm for role in topology.roles for norm in network.norms(role)])
    assert all(torch.equal(got, want) for got, want in zip(*norms, strict=True))
