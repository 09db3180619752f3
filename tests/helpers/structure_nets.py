# SPDX-License-Identifier: MIT
"""Two small models that have every kind of layer that structures see differently."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext.criteria.statistics.measured import name_of
from tests.helpers.networks import Net
from tests.helpers.pruned_by_structure import View

ZEROS = 0.2  # of the weights


def convolutions() -> nn.Module:
    """A plain, a grouped, a depthwise and a transposed convolution, and linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, groups=2), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(16, 8, 2, groups=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)),
    )


def sequence() -> nn.Module:
    """Packed projections of attention, a weight [in, out], a tied one, and an LSTM."""

    def rule(m: Any, x: Tensor) -> Tensor:
        x = m.head(x)
        x = m.norm(x + m.attn(x, x, x, need_weights=False)[0])
        x = F.relu(x @ m.mix)
        x = F.relu(m.tied(F.relu(m.tied(x))))
        return m.tail(m.lstm(x)[0])

    layers = {"head": nn.Linear(4, 8), "norm": nn.LayerNorm(8), "tail": nn.Linear(8, 3)}
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    lstm = nn.LSTM(12, 8, batch_first=True)
    mix = nn.Parameter(torch.empty(8, 12))
    return Net(rule, **layers, attn=attention, mix=mix, tied=nn.Linear(12, 12), lstm=lstm)


NETS: dict[str, Any] = {  # how to build it, and a batch
    "convolutions": (convolutions, (2, 3, 6, 6)),
    "sequence": (sequence, (2, 5, 4)),
}
VIEWS: Mapping[str, View] = {"mix": View((8, 12), transposed=True)}


@lru_cache
def traced(name: str) -> lap_ext.Topology:
    """The topology of a model, traced once."""
    build, shape = NETS[name]
    return lap_ext.trace(build().eval(), torch.zeros(shape))


def topology_of(name: str, *, zeros: float = ZEROS, levels: int = 0) -> lap_ext.Topology:
    """Builds a model with random values, and binds its topology.

    zeros: the share of weights that are zero. levels: how many values weights have; 0: all differ.
    """
    model = NETS[name][0]().eval()
    with torch.no_grad():
        for x in model.parameters():
            values = 0.2 + torch.rand_like(x)
            if levels:
                values = (values * levels).ceil()
            x.copy_(values * (1 - 2 * torch.randint_like(x, 2)))
            if x.dim() > 1:
                x.mul_(torch.rand_like(x) >= zeros)
    return traced(name).bind(model)


def statistics(topology: lap_ext.Topology, directory: Path) -> Path:
    """Writes statistics that wanda reads: any numbers."""
    tensors = {
        name_of(topology, role, "mean_square"): torch.rand(role.part.channels[0]).double()
        for role in topology.roles
    }
    save_file(tensors, directory / "statistics.safetensors")
    return directory / "statistics.safetensors"
