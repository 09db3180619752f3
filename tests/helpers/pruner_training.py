# SPDX-License-Identifier: MIT
"""Models that a Pruner prunes, and steps of training that check its masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lap_ext.pruning.pruner import Pruner
from tests.helpers import masked_network as cases

EXAMPLE = torch.zeros(1, 1, 6, 6)


def train(model: nn.Module, optimizer: Any, steps: int, pruner: Pruner | None = None) -> None:
    """Steps of training, the model and the masks checked after each."""
    for batch in cases.batches(steps):
        cases.train(model, optimizer, [batch])
        if pruner is not None:
            pruner.step()
            cases.check_zero(model, pruner.masks)


def two_layers() -> nn.Sequential:
    """Weights 1, -2, 3, -4 and 5, -6."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    net[2].weight.data = torch.tensor([[5.0, -6.0]])
    return net
