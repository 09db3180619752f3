# SPDX-License-Identifier: MIT
"""What a criterion is: its score, and nothing of selection, allocation or schedule.

    score = |w| * in[i] * out[o], summed in squares over the roles of the weight

A criterion without factors is element-wise: its score is that of the weight, however often used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from lap_ext.criteria.context import Network
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role

Factors: TypeAlias = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Criterion:
    """Magnitude, |w|; the base of all others."""

    name: ClassVar[str] = "magnitude"  # as prune(criterion=...) takes it
    reads_norms: ClassVar[bool] = False  # whether factors asks for the norms of all layers

    @property
    def by_role(self) -> bool:
        """Whether it has factors: they differ between the uses of a weight."""
        return type(self).factors is not Criterion.factors

    @property
    def rows(self) -> bool:
        """Whether weights are compared within each output channel, not within the layer."""
        return False

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
        return None, None
