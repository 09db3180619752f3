# SPDX-License-Identifier: MIT
"""Criteria that read weights only, and a user's own function.

Sources: Park et al., ICLR 2020 (lookahead, lookforward, lookback); magnitude as in its section 2.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lap_ext.criteria.base import Criterion, Factors
from lap_ext.criteria.context import Network
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role


class MagnitudeBN(Criterion):
    """|a[o] w| with a the scale of the batch norm that follows: the fair baseline on BN nets."""

    name: ClassVar[str] = "magnitude_bn"

    def factors(self, network: Network, role: Role) -> Factors:
        """(ones, |a|)."""
        return None, network.norm_scale(role)


class Lookahead(Criterion):
    """|w| * ||W_prev[i]|| * ||W_next[:, o]|| (Park et al., ICLR 2020)."""

    name: ClassVar[str] = "lookahead"
    reads_norms = True

    def factors(self, network: Network, role: Role) -> Factors:
        """(in_norm, out_norm)."""
        return network.factors(role)


class Lookforward(Criterion):
    """|w| * ||W_next[:, o]||."""

    name: ClassVar[str] = "lookforward"
    reads_norms = True

    def factors(self, network: Network, role: Role) -> Factors:
        """(ones, out_norm)."""
        return None, network.factors(role)[1]


class Lookback(Criterion):
    """|w| * ||W_prev[i]||."""

    name: ClassVar[str] = "lookback"
    reads_norms = True

    def factors(self, network: Network, role: Role) -> Factors:
        """(in_norm, ones)."""
        return network.factors(role)[0], None


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores; the same seed and layer name give the same ones."""

    seed: int = 0
    name: ClassVar[str] = "random"

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """Numbers in (0, 1]."""
        source = torch.Generator().manual_seed(self.seed ^ zlib.crc32(layer.name.encode()))
        return (1.0 - torch.rand(layer.shape, generator=source)).to(layer.weight.device)


@dataclass(frozen=True)
class Custom(Criterion):
    """A user's function: a layer to scores >= 0 of its weight's shape, the larger kept first.

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
        """The function's scores, checked."""
        found = self.function(layer)
        said = f"{network.function}: expected the criterion to return"
        if not isinstance(found, Tensor) or tuple(found.shape) != layer.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{said} a tensor of the weight's shape {list(layer.shape)} for layer "
                f"{layer.name!r}, got {got}."
            )
        if not found.is_floating_point():
            raise TypeError(
                f"{said} floating-point scores for layer {layer.name!r}, got {found.dtype}."
            )
        bad = found[~((found >= 0) & found.isfinite())]
        if bad.numel():
            raise ValueError(
                f"{said} finite scores >= 0 (the larger, the longer kept) for layer "
                f"{layer.name!r}, got {bad[0].item():g}. Return an increasing function of them, "
                "such as scores.exp()."
            )
        return found.detach()
