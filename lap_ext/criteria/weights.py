# SPDX-License-Identifier: MIT
"""Defines the criteria that read only weights, and the wrapper of a user's own function.

Source: Park et al., ICLR 2020 (lookahead, lookforward, lookback; magnitude in section 2).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lap_ext.criteria.base import Criterion, Norms
from lap_ext.criteria.context import Network
from lap_ext.errors import LapTypeError, LapValueError, callback
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role


class MagnitudeBN(Criterion):
    """Scores by |a[o] w|, where a is the scale of the next batch norm (the baseline on BN nets)."""

    name: ClassVar[str] = "magnitude_bn"

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (ones, |a|)."""
        return None, network.norm_scale(role)


class Lookahead(Criterion):
    """Scores by |w| * ||W_prev[i]|| * ||W_next[:, o]|| (Park et al., ICLR 2020)."""

    name: ClassVar[str] = "lookahead"
    reads_norms = True

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, out_norm)."""
        return network.norms(role)


class Lookforward(Criterion):
    """Scores by |w| * ||W_next[:, o]||."""

    name: ClassVar[str] = "lookforward"
    reads_norms = True

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (ones, out_norm)."""
        return None, network.norms(role)[1]


class Lookback(Criterion):
    """Scores by |w| * ||W_prev[i]||."""

    name: ClassVar[str] = "lookback"
    reads_norms = True

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, ones)."""
        return network.norms(role)[0], None


@dataclass(frozen=True)
class Random(Criterion):
    """Scores uniformly at random; the same seed and layer name give the same scores."""

    seed: int = 0
    name: ClassVar[str] = "random"

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """Draws numbers in (0, 1]."""
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(layer.name.encode()))
        return (1.0 - torch.rand(layer.shape, generator=generator)).to(layer.weight.device)


@dataclass(frozen=True)
class Custom(Criterion):
    """Scores by a user's function, which returns scores >= 0 of the layer's weight shape.

    The weights with larger scores are kept first.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3., -4.]]))
        >>> lap_ext.scores(net, torch.ones(1, 2), criterion=lambda layer: layer.weight ** 2)
        {'0': tensor([[ 9., 16.]])}
    """

    function: Callable[[Layer], Tensor]
    name: ClassVar[str] = "custom"

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """Calls the function and checks its scores."""
        with callback():
            scores = self.function(layer)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != layer.shape:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise LapValueError(
                f"the criterion to return a tensor of the weight's shape {list(layer.shape)}",
                got,
                layer=layer.name,
            )
        if not scores.is_floating_point():
            raise LapTypeError(
                "the criterion to return floating-point scores", scores.dtype, layer=layer.name
            )
        bad = scores[~((scores >= 0) & scores.isfinite())]
        if bad.numel():
            raise LapValueError(
                "the criterion to return finite scores >= 0 (the larger, the longer kept)",
                f"{bad[0].item():g}",
                "Return an increasing function of them, such as scores.exp().",
                layer=layer.name,
            )
        return scores.detach()
