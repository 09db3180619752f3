# SPDX-License-Identifier: MIT
"""Small models for tests of places: every way in which a layer lies in memory or is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net

ZEROS = 0.15  # of the weights

MIXED = {  # dtypes of the layers, in turn
    "mixed": [torch.float32, torch.bfloat16, torch.float16],
    "mixed64": [torch.bfloat16, torch.float64],
}


class Case(NamedTuple):
    """A model, an input, and how the brute force looks at it.

    build makes the model, or with True a small one, whose layers may all fit into any budget.
    """

    build: Callable[[bool], nn.Module]
    inputs: Tensor
    how: dict[str, Any] = {}  # noqa: RUF012 (read only)


def mlp(small: bool = False) -> nn.Module:
    a, b = (12, 10) if small else (24, 20)
    norm, relu = nn.LayerNorm(a), nn.ReLU()
    return nn.Sequential(nn.Linear(5, a), norm, relu, nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 4))


def convolutions(small: bool = False) -> nn.Module:
    n = 6 if small else 18
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, n, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(n, 4, 2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    )


def tied(small: bool = False) -> nn.Module:
    """The first weight is the third one too."""
    del small
    layers = nn.Linear(6, 14), nn.Linear(14, 6), nn.Linear(6, 14), nn.Linear(14, 3)
    layers[2].weight = layers[0].weight
    a, b, c, d = layers
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c, nn.ReLU(), d)


def attention(small: bool = False) -> nn.Module:
    """The in-projection of q, k and v is one parameter."""
    n = 5 if small else 12

    def rule(m: Any, x: Tensor) -> Tensor:
        x = m.head(x)
        x = m.n1(x + m.attn(x, x, x, need_weights=False)[0])
        return m.tail(m.n2(x + m.down(F.relu(m.up(x)))))

    layers = {"head": nn.Linear(2, 4), "up": nn.Linear(4, n), "down": nn.Linear(n, 4)}
    norms = {"n1": nn.LayerNorm(4), "n2": nn.LayerNorm(4), "tail": nn.Linear(4, 2)}
    return Net(rule, attn=nn.MultiheadAttention(4, 2, batch_first=True), **layers, **norms)


def packed(small: bool = False) -> nn.Module:
    """A parameter is used in parts: rows for q and k, and a block of rows and columns."""
    del small

    def rule(m: Any, x: Tensor) -> Tensor:
        x = m.head(x)
        y = F.relu(F.linear(x, m.both[:7])) + F.relu(F.linear(x, m.both[7:14]))
        return m.tail(F.relu(F.linear(y, m.both[14:, :7])))

    both = nn.Parameter(torch.empty(19, 8))
    return Net(rule, head=nn.Linear(4, 8), both=both, tail=nn.Linear(5, 3))


def experts(small: bool = False) -> nn.Module:
    """Weights of three experts, [E, I, O]: their rows are inputs."""
    del small

    def rule(m: Any, x: Tensor) -> Tensor:
        y = m.head(x).expand(3, -1, -1)
        return m.tail(torch.bmm(F.relu(torch.bmm(y, m.up)), m.down).sum(0))

    parameters = nn.Parameter(torch.empty(3, 6, 8)), nn.Parameter(torch.empty(3, 8, 5))
    layers = {"head": nn.Linear(4, 6), "tail": nn.Linear(5, 2)}
    return Net(rule, up=parameters[0], down=parameters[1], **layers)


def empty(small: bool = False) -> nn.Module:
    """A layer without weights beside others."""
    del small

    def rule(m: Any, x: Tensor) -> Tensor:
        return m.tail(torch.cat([F.relu(m.head(x)), m.none(x)], dim=1))

    layers = {"head": nn.Linear(4, 6), "none": nn.Linear(4, 0), "tail": nn.Linear(6, 3)}
    return Net(rule, **layers)


CASES = {
    "mlp": Case(mlp, torch.ones(1, 5)),
    "convolutions": Case(convolutions, torch.ones(1, 2, 6, 6), {"read": lambda y: y[..., 1, 1]}),
    "tied": Case(tied, torch.ones(1, 6)),
    "attention": Case(attention, torch.ones(1, 2, 2), {"read": lambda y: y[:, -1]}),
    "packed": Case(packed, torch.ones(1, 4)),
    "experts": Case(experts, torch.ones(1, 4)),
    "empty": Case(empty, torch.ones(1, 4)),
}


@lru_cache
def traced(name: str, small: bool = False) -> lap_ext.Topology:
    """The topology of a case, traced once."""
    case = CASES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return lap_ext.trace(case.build(small).eval(), case.inputs)


def model_of(
    name: str, kind: str = "float32", *, seed: int = 0, levels: int = 0, small: bool = False
) -> nn.Module:
    """Builds a model of a case with random values; some of the weights are zero.

    Args:
        name: of the case.
        kind: a dtype, or a name in MIXED.
        seed: of the values.
        levels: how many values weights have, so that many scores are equal; 0: all differ.
        small: whether it is the small one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = CASES[name].build(small)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            if x.is_floating_point():
                values = 0.2 + torch.rand(x.shape, generator=generator)
                if levels:
                    values = (values * levels).ceil() / 4
                x.copy_(values)
        for x in dict.fromkeys(model.parameters()):
            if x.dim() > 1:
                x.mul_(1 - 2 * torch.randint(0, 2, x.shape, generator=generator))
                x.mul_(torch.rand(x.shape, generator=generator) > ZEROS)
    model.eval()
    if kind not in MIXED:
        return model.to(getattr(torch, kind))
    kinds = MIXED[kind]
    for index, x in enumerate(x for x in model.parameters() if x.dim() > 1):
        x.data = x.data.to(kinds[index % len(kinds)])
    return model


def topology_of(name: str, model: nn.Module, small: bool = False) -> lap_ext.Topology:
    """Binds the topology of a case to a model of it."""
    return traced(name, small).bind(model)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies the tensors of a model: tied ones are stored under each name."""
    return {name: x.detach().clone() for name, x in model.state_dict().items()}
