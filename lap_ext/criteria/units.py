# SPDX-License-Identifier: MIT
"""Defines the criteria that score whole units across layers by what flows through them.

    minitron   sqrt(sum of a_j^2) over the columns j of the unit: what its consumers read from it
               a_j = sqrt(sum over batch elements of (mean over positions of |x_j|)^2)
    reap       mean over the tokens that the router sent to an expert of g ||f||
               g is the router's weight of the token, f is what the expert puts out for it

Sources: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", 2024
(Minitron; formulas as in NVIDIA's ModelOpt); Lasby et al., "REAP the Experts", 2025.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from torch import Tensor

from lap_ext.criteria.context import Network
from lap_ext.criteria.data import DataCriterion, of_role
from lap_ext.criteria.statistics.activations import absolute_means
from lap_ext.criteria.statistics.expert_outputs import expert_count, weighed_outputs
from lap_ext.criteria.statistics.measured import check_not_negative, check_shape, name_of
from lap_ext.errors import LapValueError
from lap_ext.places import Chunk
from lap_ext.structures import Structure
from lap_ext.topology import Layer, Topology
from lap_ext.topology.roles import Role


class UnitCriterion(DataCriterion, ABC):
    """The base class of criteria of data that score units across layers, and no single weights.

    The score of a unit is sqrt(sum of s^2) over its columns where `column_scores` gives s, or that
    of its expert where `expert_scores` does.
    """

    units: ClassVar[tuple[str, ...]] = ()  # the values of prune(structure=...) that it is for

    def check_structure(self, structure: Structure | None) -> None:
        """Raises unless the criterion scores units of a structure; None: single weights."""
        if structure is None or structure.spelled not in self.units:
            raise self._misused(structure)

    def _misused(self, structure: Structure | None) -> LapValueError:
        allowed = " or ".join(f"{{structure={name!r}}}" for name in self.units)
        return LapValueError(
            f"{allowed} for criterion {self.name!r}, which scores such units across layers",
            "single weights" if structure is None else f"structure={structure.spelled!r}",
        )

    def column_scores(self, network: Network, role: Role) -> Tensor | None:
        """Returns s >= 0 of the input channels of a role, float64 [I]; None: it has none."""
        return None

    def expert_scores(self, network: Network, layer: Layer) -> Tensor | None:
        """Returns scores >= 0 of a layer's experts, float64 [E] or [1]; None: it has none."""
        return None

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        """Raises: the criterion scores no single weights."""
        raise self._misused(None)


class Minitron(UnitCriterion):
    """Scores heads and feed-forward units by the activations that are read from them.

    The score of a unit is sqrt(sum of a_j^2) over the columns j of the layers that read it, with
    a_j = sqrt(sum over batch elements of (mean over positions of |x_j|)^2): for a head, over its
    channels in the input of the output projection; for a feed-forward unit, its channel in the
    input of the down projection. Elements are the entries along dimension 0 of the model's inputs
    (if the tensors of a batch differ in it, the batch is one element).
    """

    name: ClassVar[str] = "minitron"
    units: ClassVar[tuple[str, ...]] = ("head", "unit")

    def measure(self, topology: Topology, data: Any) -> dict[str, Tensor]:
        """Measures "absolute_mean", a of the inputs of each role."""
        means = zip(topology.roles, absolute_means(topology, data), strict=True)
        return {name_of(topology, role, "absolute_mean"): x for role, x in means}

    def column_scores(self, network: Network, role: Role) -> Tensor:
        """Returns a of the input channels of a role, float64 [I]."""
        means = of_role(network, role, "absolute_mean", 0)
        return means.expand(role.part.channels[0])


class REAP(UnitCriterion):
    """Scores experts by their router-weighted activation.

    The score of an expert is the mean over the tokens that the router sends to it of g ||f||, where
    g is the router's weight of the token and f is the output of the expert; 0 if there is none. It
    belongs to the last layer of the expert: the one whose output the weight multiplies.
    """

    name: ClassVar[str] = "reap"
    units: ClassVar[tuple[str, ...]] = ("expert",)

    def measure(self, topology: Topology, data: Any) -> dict[str, Tensor]:
        """Measures "reap", of the experts of each layer that is the last of experts."""
        outputs = weighed_outputs(topology, data)
        return {f"{name}.reap": x for name, x in outputs.items()}

    def expert_scores(self, network: Network, layer: Layer) -> Tensor | None:
        """Returns the scores of a layer's experts, float64: [E] if packed, else [1].

        None where the layer is not the last one of experts.
        """
        name = f"{layer.name}.reap"
        values = network.statistics.get(name)
        if values is None:
            return None
        check_shape(name, values.shape, [expert_count(layer)])
        check_not_negative(name, values)
        return values.double()
