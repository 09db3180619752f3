# SPDX-License-Identifier: MIT
"""Small models whose units go through several layers in every way that sums can get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU in between."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def residual() -> nn.Module:
    """A convolution with a batch norm, a sum around two others, and a linear layer."""

    def rule(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.norm(m.first(x)))
        x = x + m.last(F.relu(m.inner(x)))
        return m.out(x.mean((2, 3)))

    return Net(
        rule,
        first=nn.Conv2d(3, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        inner=nn.Conv2d(8, 5, 3, padding=1),
        last=nn.Conv2d(5, 8, 1),
        out=nn.Linear(8, 4),
    )


def depthwise() -> nn.Module:
    """An inverted residual whose middle is depthwise, flattened into a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 12, 3, groups=6, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 4, 1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4 * 4, 3)),
    )


def grouped() -> nn.Module:
    """A convolution in four groups between two others, and a transposed one in two."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=4, padding=1)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, groups=2)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)),
    )


def recurrent() -> nn.Module:
    """An LSTM between linear layers."""

    def rule(m: Any, x: Tensor) -> Tensor:
        return m.out(m.lstm(F.relu(m.first(x)))[0])

    lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
    return Net(rule, first=nn.Linear(4, 6), lstm=lstm, out=nn.Linear(5, 3))


def tied() -> nn.Module:
    """A weight that reads its own outputs, and an embedding that is the output head too."""

    def rule(m: Any, x: Tensor) -> Tensor:
        x = m.table(x)
        x = x + m.down(F.relu(m.same(F.relu(m.same(F.relu(m.up(x)))))))
        return F.linear(x, m.table.weight)

    table, up, down = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 6)
    return Net(rule, table=table, up=up, same=nn.Linear(8, 8), down=down)


def packed() -> nn.Module:
    """Attention whose queries, keys and values are one weight, and a gated feed-forward block."""

    def rule(m: Any, x: Tensor) -> Tensor:
        q, k, v = (y.view(2, 5, 4, 3).transpose(1, 2) for y in m.qkv(x).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
        x = x + m.o(a)
        gate, up = m.both(x).chunk(2, -1)
        return m.out(x + m.down(F.silu(gate) * up))

    qkv, o, both = nn.Linear(8, 36), nn.Linear(12, 8), nn.Linear(8, 20)
    return Net(rule, qkv=qkv, o=o, both=both, down=nn.Linear(10, 8), out=nn.Linear(8, 3))


def gqa() -> nn.Module:
    """Attention in which two queries share a key and a value."""

    def rule(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).view(2, 5, 6, 2).transpose(1, 2)
        k, v = (y(x).view(2, 5, 3, 2).transpose(1, 2) for y in (m.k, m.v))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
        return m.out(F.relu(m.o(a)))

    k, v = nn.Linear(8, 6), nn.Linear(8, 6)
    return Net(rule, q=nn.Linear(8, 12), k=k, v=v, o=nn.Linear(12, 7), out=nn.Linear(7, 3))


class Experts(nn.Module):
    """Four experts in a list, two for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(mlp(6, 5, 6) for _ in range(4))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(self.router(x).softmax(-1), 2)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        picked = torch.gather(every, -2, chosen.unsqueeze(-1).expand(*chosen.shape, 6))
        return self.out((weights.unsqueeze(-1) * picked).sum(-2))


def _sentences() -> tuple[Tensor, ...]:
    return (torch.randint(11, (2, 5)),)


Build = Callable[[], nn.Module]
NETS: Mapping[str, tuple[Build, Callable[[], tuple[Tensor, ...]]]] = {
    "mlp": (lambda: mlp(5, 9, 7, 3), lambda: (torch.randn(2, 5),)),
    "residual": (residual, lambda: (torch.randn(2, 3, 6, 6),)),
    "depthwise": (depthwise, lambda: (torch.randn(2, 3, 4, 4),)),
    "grouped": (grouped, lambda: (torch.randn(2, 3, 6, 6),)),
    "recurrent": (recurrent, lambda: (torch.randn(2, 5, 4),)),
    "tied": (tied, _sentences),
    "packed": (packed, lambda: (torch.randn(2, 5, 8),)),
    "gqa": (gqa, lambda: (torch.randn(2, 5, 8),)),
    "experts": (Experts, lambda: (torch.randn(2, 5, 6),)),
}
KINDS = {  # structures that a model has units of
    "mlp": ("channel", "unit"),
    "packed": ("channel", "head", "unit"),
    "gqa": ("channel", "head", "unit"),
    "experts": ("expert",),
}


@cache
def traced(name: str) -> lap_ext.Topology:
    """The topology of a model, traced once."""
    build, inputs = NETS[name]
    return lap_ext.trace(build().eval(), inputs())


@torch.no_grad()
def made(name: str, zeros: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random values in all parameters; zeros: the share of weights that are zero."""
    model = NETS[name][0]().eval()
    for x in model.parameters():
        x.copy_((0.2 + torch.rand_like(x)) * (1 - 2 * torch.randint_like(x, 2)))
        if x.dim() > 1:
            x.mul_(torch.rand_like(x) >= zeros)
    return model.to(dtype)


def bound(name: str, **how: Any) -> lap_ext.Topology:
    """The topology of a new model."""
    return traced(name).bind(made(name, **how))
