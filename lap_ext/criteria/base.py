# SPDX-License-Identifier: MIT
"""Defines the base class of criteria.

A criterion defines a score, not a selection, an allocation or a schedule:

    score = |w| * in[i] * out[o], summed in squares over the roles of the weight

A criterion without norms is element-wise: each weight is scored once, however often it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from lap_ext.criteria.context import Network
from lap_ext.errors import LapValueError
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role

Norms: TypeAlias = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Criterion:
    """Scores by magnitude, |w|; the base class of all other criteria."""

    name: ClassVar[str] = "magnitude"  # the value of prune(criterion=...)
    reads_norms: ClassVar[bool] = False  # whether it needs the norms of all layers

    @property
    def by_role(self) -> bool:
        """Whether the criterion has norms, which differ between the uses of a weight."""
        return type(self).norms is not Criterion.norms

    @property
    def rows(self) -> bool:
        """Whether weights are ranked within each output channel instead of within the layer."""
        return False

    @property
    def replaces(self) -> bool:
        """Whether something else than the weight itself stands for w, which is then checked."""
        kind = type(self)
        return (kind.weight, kind.values) != (Criterion.weight, Criterion.values)

    def prepare(self, network: Network, data: Any) -> Network:
        """Prepares the scoring once, before any layer, and returns the network to score with."""
        if data is not None:
            raise LapValueError(
                f"no data for criterion {self.name!r}, which reads weights only",
                type(data).__name__,
            )
        return network

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """Returns the values that stand for w in |w|, in the shape of the layer's weight."""
        return self.values(layer, network.weight(layer))

    def values(self, layer: Layer, weight: Tensor, first: int = 0, step: int = 1) -> Tensor:
        """Returns what stands for the weights at flat indices first, first + step, ... of a layer.

        Only a criterion that needs nothing else can score a checkpoint in chunks.
        """
        return weight

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in [I], out [O]) of a role, with None for ones."""
        return None, None
