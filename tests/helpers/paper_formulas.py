# SPDX-License-Identifier: MIT
"""Nets, batches, and the paper's formulas for chains, weight by weight; nothing here uses lap_ext.

    score[o, i, k]^2 = w^2 * c[i]^2 * r[o]^2
    c[i]^2 = p_prev[i] * a_prev[i]^2 * sum of W_prev[i]^2                       first layer: 1
    r[o]^2 = p[o] * a[o]^2 * sum over n of p_next[n] * W_next[n, o]^2           last layer: 1

a is the scale of the batch norm behind a layer, p how often its units are active (1 in plain
lookahead). After a flatten, channel o is read at inputs o * S to o * S + S - 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Link(NamedTuple):
    """A layer of a chain and what lies between it and the next one."""

    weight: Tensor  # [O, I, *K]
    scale: Tensor | None = None  # of a batch norm, [O]
    active: Tensor | None = None  # p, [O]
    positions: int = 1  # inputs of the next layer that one channel becomes


def lookahead(chain: Sequence[Link], number: int) -> Tensor:
    """Scores of one layer of a chain, float64, one weight at a time."""
    link = chain[number]
    weight = link.weight.detach().double()
    result = torch.zeros_like(weight)
    for index in product(*map(range, weight.shape)):
        o, i = index[:2]
        square = float(weight[index]) ** 2
        if number > 0:
            square *= arriving(chain[number - 1], i // chain[number - 1].positions)
        if number + 1 < len(chain):
            square *= reading(link, chain[number + 1], o)
        result[index] = square**0.5
    return result


def arriving(link: Link, channel: int) -> float:
    """c^2 of one output channel of a layer."""
    return (
        entry(link.active, channel)
        * entry(link.scale, channel) ** 2
        * sum(float(x) ** 2 for x in link.weight[channel].detach().double().flatten())
    )


def reading(link: Link, following: Link, channel: int) -> float:
    """r^2 of one output channel of a layer."""
    total = 0.0
    first = channel * link.positions
    for n, column in product(range(len(following.weight)), range(first, first + link.positions)):
        column_weights = following.weight[n, column].detach().double().flatten()
        total += entry(following.active, n) * sum(float(x) ** 2 for x in column_weights)
    return entry(link.active, channel) * entry(link.scale, channel) ** 2 * total


def entry(x: Tensor | None, index: int) -> float:
    return 1.0 if x is None else float(x[index])


def bn_scale(norm: Any) -> Tensor:
    """Gamma / sqrt(running_var + eps)."""
    return norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()


def mlp() -> nn.Sequential:
    """5 -> 6 -> 4 -> 3."""
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def conv_net() -> nn.Sequential:
    """Two convolutions with batch norms, a flatten with 3 channels of 4 positions, two linears."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)),
    )
    unsettle(net)
    return net


def conv_chain(net: nn.Sequential) -> list[Link]:
    """The chain of conv_net."""
    first, second = bn_scale(net[1]), bn_scale(net[4])
    weights = [net[index].weight for index in (0, 3, 8, 10)]
    return [
        Link(weights[0], first),
        Link(weights[1], second, positions=4),
        Link(weights[2]),
        Link(weights[3]),
    ]


CONV_LAYERS = ("0", "3", "8", "10")


def unsettle(net: nn.Module) -> None:
    """Batch norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                module.weight.data.normal_()
                module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)


def pictures(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches (inputs, target) for conv_net."""
    return [(torch.randn(n, 2, 4, 4), torch.randint(0, 3, (n,))) for n in sizes]


def rows(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches (inputs, target) for mlp."""
    return [(torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in sizes]


def inputs_of(net: nn.Module, data: Sequence[Any], *layers: str) -> dict[str, Tensor]:
    """All that layers read while the model runs on data, by hooks; [examples, ...]."""
    return _caught(net, data, layers, lambda given, result: given[0])


def outputs_of(net: nn.Module, data: Sequence[Any], *layers: str) -> dict[str, Tensor]:
    """All that layers give, likewise."""
    return _caught(net, data, layers, lambda given, result: result)


def _caught(
    net: nn.Module, data: Sequence[Any], layers: Sequence[str], pick: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    caught: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda _, given, result, name=name: caught[name].append(pick(given, result).clone())
        )
        for name in layers
    ]
    modes = {module: module.training for module in net.modules()}
    net.eval()
    with torch.no_grad():
        for batch in data:
            net(batch[0] if isinstance(batch, (tuple, list)) else batch)
    for handle in handles:
        handle.remove()
    for module, training in modes.items():
        module.training = training
    return {name: torch.cat(batches).double() for name, batches in caught.items()}


def fingerprint(model: nn.Module) -> list[Any]:
    """What scoring could change of a model, bit by bit, and the random states."""
    state: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    for name, x in model.state_dict().items():
        state.append((name, id(model.state_dict(keep_vars=True)[name]), _bits(x)))
    for name, p in model.named_parameters():
        gradient = None if p.grad is None else (id(p.grad), _bits(p.grad))
        state.append((name, p.requires_grad, p.grad_fn, gradient))
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._backward_hooks)]
        state.append((name, module.training, sorted(vars(module)), hooks))
    return state


def _bits(x: Tensor) -> bytes:
    return (
        x.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if x.dim()
        else bytes(str(x.item()), "ascii")
    )
