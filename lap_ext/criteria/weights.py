# SPDX-License-Identifier: MIT
"""Defines the criteria that read only weights, and the wrapper of a user's own function.

Source: Park et al., ICLR 2020 (lookahead, lookforward, lookback; magnitude in section 2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lap_ext.criteria.base import Criterion, Norms
from lap_ext.criteria.context import Network, random_scores
from lap_ext.errors import LapTypeError, LapValueError, callback, calling
from lap_ext.places import Chunk
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role


class MagnitudeBN(Criterion):
    """Scores by |a[o] w|, where a is the scale of the next batch norm (the baseline on BN nets)."""

    name: ClassVar[str] = "magnitude_bn"
    reads_norms: ClassVar[bool] = False

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (ones, |a|)."""
        return None, network.norm_scale(role)


class Lookahead(Criterion):
    """Scores by |w| * ||W_prev[i]|| * ||W_next[:, o]|| (Park et al., ICLR 2020)."""

    name: ClassVar[str] = "lookahead"

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, out_norm)."""
        return network.norms(role)


class Lookforward(Criterion):
    """Scores by |w| * ||W_next[:, o]||."""

    name: ClassVar[str] = "lookforward"

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (ones, out_norm)."""
        return None, network.norms(role)[1]


class Lookback(Criterion):
    """Scores by |w| * ||W_prev[i]||."""

    name: ClassVar[str] = "lookback"

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, ones)."""
        return network.norms(role)[0], None


@dataclass(frozen=True)
class Random(Criterion):
    """Scores uniformly at random in (0, 1]; the same seed and layer name give the same scores.

        a = start + index * 0x9E3779B97F4A7C15          index: of the weight, flat
        b = (a ^ (a >> 30)) * 0xBF58476D1CE4E5B9
        c = (b ^ (b >> 27)) * 0x94D049BB133111EB
        score = ((c >> 40) + 1) / 2^24

    in unsigned integers of 64 bits: the upper 24 bits of SplitMix64. start is the first 8 bytes,
    little-endian, of the SHA-256 of "SEED:LAYER". A score depends on nothing else, so that it is
    the same on every device, and in a checkpoint that is read in chunks.

    Args:
        seed: an integer, 0 <= seed < 2^64.

    Raises:
        TypeError: seed is not an integer.
        ValueError: seed is negative or too large.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 1))
        >>> lap_ext.scores(net, torch.ones(1, 3), criterion=lap_ext.criteria.Random(seed=1))
        {'0': tensor([[0.4287, 0.4817, 0.2594]])}
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    @calling("Random")
    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise LapTypeError(
                "{argument} to be an integer", type(self.seed).__name__, argument="seed"
            )
        if not 0 <= self.seed < 1 << 64:
            sign, bits = "a negative" if self.seed < 0 else "an", self.seed.bit_length()
            # not its digits: there may be more than Python prints
            raise LapValueError(
                "0 <= {argument} < 2**64", f"{sign} integer of {bits} bits", argument="seed"
            )

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        """Computes the numbers of these weights, in the dtype of scores."""
        digest = hashlib.sha256(f"{self.seed}:{chunk.layer.name}".encode()).digest()
        start = int.from_bytes(digest[:8], "little", signed=True)
        return random_scores(chunk.weight, start, chunk.first)


@dataclass(frozen=True)
class Custom(Criterion):
    """Scores by a user's function, which returns scores >= 0 of the layer's weight shape.

    The weights with larger scores are kept first. The function must give the same scores each time
    it is called: rankings of a checkpoint directory ask for them more than once.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3., -4.]]))
        >>> lap_ext.scores(net, torch.ones(1, 2), criterion=lambda layer: layer.weight ** 2)
        {'0': tensor([[ 9., 16.]])}
    """

    function: Callable[[Layer], Tensor]
    name: ClassVar[str] = "custom"
    needs_full = True

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        """Calls the function and checks its scores."""
        layer = chunk.layer
        if not network.place.held:  # the model has no values
            layer = replace(layer, values=chunk.weight)
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
