# SPDX-License-Identifier: MIT
"""Small networks whose second layer computes its weight, in the ways that people do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.nn.utils import parametrizations, parametrize, prune


class Masked(nn.Linear):
    """As in the paper's public code: a mask that is a parameter without gradient."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.mask = nn.Parameter(torch.ones(out, into), requires_grad=False)
        self.mask.data[0, :2] = 0.0

    def effective(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)


class Buffered(Masked):
    """The mask is a buffer and comes first."""

    def __init__(self, into: int, out: int) -> None:
        nn.Linear.__init__(self, into, out)
        mask = torch.ones(out, into)
        mask[1, 3] = 0.0
        self.register_buffer("kept", mask)

    def effective(self) -> Tensor:
        return self.kept.expand_as(self.weight) * self.weight  # type: ignore[operator]


class Gain(Masked):
    """A learned scale per output channel, and a constant; one gain is zero at first."""

    def __init__(self, into: int, out: int) -> None:
        nn.Linear.__init__(self, into, out)
        self.gain = nn.Parameter(torch.linspace(0.0, 2.0, out))

    def effective(self) -> Tensor:
        return -self.weight * self.gain[:, None] / 3.0


class Transposed(Masked):
    """The scale meets a transposed view."""

    def __init__(self, into: int, out: int) -> None:
        nn.Linear.__init__(self, into, out)
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, out))

    def effective(self) -> Tensor:
        return (self.weight.t() * self.gain).t()


class Filled(Masked):
    """masked_fill and where instead of a product."""

    def effective(self) -> Tensor:
        filled = self.weight.masked_fill(self.mask == 0, 0.0)
        return torch.where(self.mask != 0, filled, torch.zeros_like(self.weight))


class Averaged(Masked):
    """The average of the weight's past, blended in: no zero of the weight is one of the sum."""

    def __init__(self, into: int, out: int) -> None:
        nn.Linear.__init__(self, into, out)
        self.register_buffer("average", torch.randn(out, into))

    def effective(self) -> Tensor:
        return 0.9 * self.average + 0.1 * self.weight  # type: ignore[operator, no-any-return]


class Standardized(Masked):
    """Weight standardization in a forward."""

    def __init__(self, into: int, out: int) -> None:
        nn.Linear.__init__(self, into, out)

    def effective(self) -> Tensor:
        return standardized(self.weight)


class Added(Masked):
    """A merged low-rank update: w + b @ a."""

    def __init__(self, into: int, out: int) -> None:
        nn.Linear.__init__(self, into, out)
        self.a, self.b = nn.Parameter(torch.randn(2, into)), nn.Parameter(torch.randn(out, 2))

    def effective(self) -> Tensor:
        return self.weight + 0.5 * (self.b @ self.a)


class Cosine(Masked):
    """A classifier over normalized weights: what is left grows where one is zero."""

    def __init__(self, into: int, out: int) -> None:
        nn.Linear.__init__(self, into, out)

    def effective(self) -> Tensor:
        return F.normalize(self.weight, dim=1)


def standardized(w: Tensor) -> Tensor:
    """Subtracts each row's mean and divides by its deviation."""
    mean, variance = w.mean(1, keepdim=True), w.var(1, keepdim=True, unbiased=False)
    return (w - mean) / (variance + 1e-5).sqrt()


class Standardize(nn.Module):
    """Weight standardization as a parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return standardized(w)


class LowRank(nn.Module):
    """A merged low-rank update as a parametrization."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, into)), nn.Parameter(torch.randn(out, 2))

    def forward(self, w: Tensor) -> Tensor:
        return w + 0.5 * (self.b @ self.a)


class Dora(nn.Module):
    """magnitude * v / ||v|| with v = w + b @ a."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.low_rank = LowRank(into, out)
        self.magnitude = nn.Parameter(torch.linspace(0.5, 2.0, out))

    def forward(self, w: Tensor) -> Tensor:
        v: Tensor = self.low_rank(w)
        return self.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)


def parametrized(step: nn.Module) -> nn.Linear:
    """A linear layer with a parametrization."""
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", step)
    return layer


def pruned_by_torch() -> nn.Module:
    """A layer that torch.nn.utils.prune has pruned twice."""
    layer = nn.Linear(6, 6)
    prune.random_unstructured(layer, "weight", 0.2)
    prune.l1_unstructured(layer, "weight", 0.2)
    return layer


def attribute(layer: nn.Module) -> Tensor:
    """What a layer has computed, after a forward pass."""
    layer.eval()(torch.zeros(1, 6))
    computed: Tensor = layer.weight  # type: ignore[assignment]
    return computed.detach()


@dataclass(frozen=True)
class Kind:
    """How a layer computes its weight.

    effective: the weight that its forward uses.
    name: of the layer in the topology, after that of the module.
    """

    make: Callable[[], nn.Module]
    effective: Callable[[nn.Module], Tensor] = lambda layer: layer.effective().detach()  # type: ignore[operator]
    name: str = ""


FACTORS = {
    "mask": Kind(lambda: Masked(6, 6)),
    "buffer": Kind(lambda: Buffered(6, 6)),
    "gain": Kind(lambda: Gain(6, 6)),
    "transposed": Kind(lambda: Transposed(6, 6)),
    "filled": Kind(lambda: Filled(6, 6)),
    "torch_prune": Kind(pruned_by_torch, attribute, ".weight_orig"),
}
ATTRIBUTES = {
    "identity": Kind(lambda: parametrized(nn.Identity()), attribute),
    "weight_norm": Kind(lambda: parametrizations.weight_norm(nn.Linear(6, 6)), attribute),
    "spectral_norm": Kind(lambda: parametrizations.spectral_norm(nn.Linear(6, 6)), attribute),
    "orthogonal": Kind(lambda: parametrizations.orthogonal(nn.Linear(6, 6)), attribute),
    "old_weight_norm": Kind(lambda: nn.utils.weight_norm(nn.Linear(6, 6)), attribute),
    "old_spectral_norm": Kind(lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), attribute),
    "standardize": Kind(lambda: parametrized(Standardize()), attribute),
    "low_rank": Kind(lambda: parametrized(LowRank(6, 6)), attribute),
    "dora": Kind(lambda: parametrized(Dora(6, 6)), attribute),
}
FORWARDS = {
    "averaged": Kind(lambda: Averaged(6, 6)),
    "standardized": Kind(lambda: Standardized(6, 6)),
    "added": Kind(lambda: Added(6, 6)),
    "cosine": Kind(lambda: Cosine(6, 6)),
}


def network(kind: Kind) -> nn.Sequential:
    """Three linear layers; the second one computes its weight."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), kind.make(), nn.ReLU(), nn.Linear(6, 2))


def dense(weight: Tensor, layer: nn.Module) -> nn.Linear:
    """Makes a linear layer of this weight, with the bias of another layer."""
    made = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(layer.bias)  # type: ignore[arg-type]
    return made


def plain(model: nn.Sequential, weight: Tensor) -> nn.Sequential:
    """The same function with this weight as an ordinary parameter of the second layer."""
    return nn.Sequential(model[0], nn.ReLU(), dense(weight, model[2]), nn.ReLU(), model[4])
