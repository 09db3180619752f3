# SPDX-License-Identifier: MIT
"""Defines the base class of criteria.

A criterion defines a score, not a selection, an allocation or a schedule, nor where weights live:

    score = |w| * in[i] * out[o], summed in squares over the roles of the weight

A criterion without norms is element-wise: each weight is scored once, however often it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from lap_ext.criteria.context import Network
from lap_ext.errors import LapValueError
from lap_ext.places import Chunk
from lap_ext.topology.roles import Role

Norms: TypeAlias = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Criterion:
    """Scores by magnitude, |w|; the base class of all other criteria.

    A criterion of your own overrides `weight`, `norms` or both. It then prunes models in memory and
    checkpoint directories that are larger than memory.

    Example:
        >>> import torch, lap_ext
        >>> class Relative(lap_ext.criteria.Criterion):
        ...     name = "relative"
        ...     def norms(self, network, role):             # |w| * ||W_prev[i]|| only
        ...         return network.norms(role)[0], None
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        >>> for layer, value in ((net[0], 3.), (net[1], -2.)):
        ...     _ = layer.weight.data.fill_(value)
        >>> lap_ext.scores(net, torch.ones(1, 1), Relative())
        {'0': tensor([[3.]]), '1': tensor([[6.]])}
    """

    name: ClassVar[str] = "magnitude"  # the value of prune(criterion=...)
    needs_full: ClassVar[bool] = False  # whether `weight` must see a full layer, not rows of it

    @property
    def reads_norms(self) -> bool:
        """Whether `norms` needs those of the network, which are then measured before the first."""
        return self.by_role

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
        return type(self).weight is not Criterion.weight

    @property
    def reads_data(self) -> bool:
        """Whether the criterion takes data."""
        return type(self).prepare is not Criterion.prepare

    def prepare(self, network: Network, data: Any) -> None:
        """Prepares the network that the scores are computed from, once, before any layer."""
        if data is not None:
            raise LapValueError(
                f"no data for criterion {self.name!r}, which reads weights only",
                type(data).__name__,
            )

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        """Returns the values that stand for w in |w|, in the shape of the chunk's weight.

        A chunk has whole rows of a layer's weight: `chunk.weight`, in the layer's shape if it is
        all of it, otherwise flat, and `chunk.first`, the flat index in the layer of the first
        weight. A value may depend on its own weight or row; if it depends on more, set needs_full.
        """
        return chunk.weight

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in [I], out [O]) of a role, with None for ones."""
        return None, None
