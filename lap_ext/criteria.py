# SPDX-License-Identifier: MIT
"""Criteria: an algorithm is only its score.

    score = |w| * in[i] * out[o], summed in squares over the roles of the weight

Each class says what w, in and out are. What they are computed from (lookahead factors, statistics
of activations, gradients) is elsewhere. A criterion of your own is a function of a layer that
returns scores of its weight's shape, larger: kept first.
Sources: Park et al., ICLR 2020 (lookahead, lookforward, lookback); magnitude as in its section 2.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from lap_ext.network import Network
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role

Factors: TypeAlias = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Criterion:
    """Magnitude, |w|; the base of all others."""

    name: ClassVar[str] = "magnitude"  # as prune(criterion=...) takes it

    def prepare(self, network: Network, data: Any) -> Network:
        """Called once before anything is scored; returns the network to score with."""
        if data is not None:
            raise ValueError(
                f"{network.function}: expected no data for criterion {self.name!r}, which reads "
                f"weights only, got {type(data).__name__}."
            )
        return network

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """What |w| is taken of, the shape of the layer's weight."""
        return network.weight(layer)

    def factors(self, network: Network, role: Role) -> Factors:
        """(in [I], out [O]) of a role; None: ones."""
        del network, role
        return None, None


class MagnitudeBN(Criterion):
    """|a[o] w| with a the scale of the batch norm that follows: the fair baseline on BN nets."""

    name: ClassVar[str] = "magnitude_bn"

    def factors(self, network: Network, role: Role) -> Factors:
        """(ones, |a|)."""
        return None, network.norm_scale(role)


class Lookahead(Criterion):
    """|w| * ||W_prev[i]|| * ||W_next[:, o]|| (Park et al., ICLR 2020)."""

    name: ClassVar[str] = "lookahead"

    def factors(self, network: Network, role: Role) -> Factors:
        """(in_norm, out_norm)."""
        return network.factors(role)


class Lookforward(Criterion):
    """|w| * ||W_next[:, o]||."""

    name: ClassVar[str] = "lookforward"

    def factors(self, network: Network, role: Role) -> Factors:
        """(ones, out_norm)."""
        return None, network.factors(role)[1]


class Lookback(Criterion):
    """|w| * ||W_prev[i]||."""

    name: ClassVar[str] = "lookback"

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
        del network
        source = torch.Generator().manual_seed(self.seed ^ zlib.crc32(layer.name.encode()))
        return (1.0 - torch.rand(layer.shape, generator=source)).to(layer.weight.device)


@dataclass(frozen=True)
class Custom(Criterion):
    """A user's function of a layer."""

    function: Callable[[Layer], Tensor]
    name: ClassVar[str] = "custom"

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """The function's scores, checked."""
        found = self.function(layer)
        if not isinstance(found, Tensor) or tuple(found.shape) != layer.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{network.function}: expected the criterion to return a tensor of the weight's "
                f"shape {list(layer.shape)} for layer {layer.name!r}, got {got}."
            )
        return found.detach()


REGISTRY: dict[str, Callable[[], Criterion]] = {
    kind.name: kind
    for kind in (Criterion, MagnitudeBN, Random, Lookahead, Lookforward, Lookback)
}


def of(criterion: Any, function: str) -> Criterion:
    """The criterion of a name, an instance or a user's function."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        if criterion not in REGISTRY:
            close = difflib.get_close_matches(criterion, REGISTRY, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{function}: expected criterion to be one of {', '.join(sorted(REGISTRY))}, a "
                f"Criterion or a function, got {criterion!r}.{hint}"
            )
        return REGISTRY[criterion]()
    if callable(criterion):
        return Custom(criterion)
    raise TypeError(
        f"{function}: expected criterion to be a name, a Criterion or a function of a layer, got "
        f"{type(criterion).__name__}."
    )
