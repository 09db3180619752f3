# SPDX-License-Identifier: MIT
"""Defines the criteria that run the model on data for activations, gradients or curvature.

    wanda             |w| * sqrt(mean of x_i^2)
    lookahead_act     lookahead with every unit's row times sqrt(p); p is its active fraction
    weight_gradient   |w * dL/dw|
    obd               sqrt(h / 2) |w|, which ranks like h w^2 / 2; h is the Hessian's diagonal
    obd_lookahead     lookahead with the weights sqrt(h) |w|

The statistics are measured only once, on the unpruned model before the first round.
Sources: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023
(Wanda); Park et al., ICLR 2020 (lookahead_act, obd, obd_lookahead); Lee et al., "SNIP", 2019;
LeCun et al., "Optimal Brain Damage", 1989.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lap_ext.criteria.base import Criterion, Norms
from lap_ext.criteria.context import Network
from lap_ext.criteria.statistics.activations import active_fractions, mean_squares
from lap_ext.criteria.statistics.curvature import CURVATURES, hessian_diagonals
from lap_ext.criteria.statistics.gradients import Loss, weight_gradients
from lap_ext.errors import LapValueError, calling
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.options import one_of
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role


class Measured(Network):
    """A copy of a network that also holds statistics from data."""

    def __init__(
        self,
        network: Network,
        of_roles: list[Tensor] | None = None,  # one vector per role
        of_layers: Mapping[str, Tensor] | None = None,  # per layer, of the weight's shape
        weights: Mapping[str, Tensor] | None = None,
        activity: list[Tensor | None] | None = None,
    ) -> None:
        vars(self).update(vars(network))  # nothing is scored yet: no norm is cached
        self.of_roles = of_roles or []
        self.of_layers = of_layers or {}
        self._weights = {**self._weights, **(weights or {})}
        self.activity = activity or self.activity


def _measured(network: Network) -> Measured:
    assert isinstance(network, Measured)  # prepare returned it
    return network


class DataCriterion(Criterion):
    """The base class of criteria that run the model on data."""

    def _required(self, data: Any) -> Any:
        """Returns the data, or raises if there is none."""
        if data is None:
            raise LapValueError(
                f"{{argument}} for criterion {self.name!r} (batches to run the model on)",
                "None",
                "Pass data=loader or a list of batches.",
                argument="data",
            )
        return data


@dataclass(frozen=True)
class Wanda(DataCriterion):
    """Scores by |w| * sqrt(mean of x_i^2), where x_i is input i of the layer, over all data.

    If per_row is True, every output channel keeps the same number of weights, as published; if the
    count does not divide evenly, the first channels keep one more each. If it is False, all weights
    of the layer are ranked together. With scope="global", the weights of all layers are always
    ranked together.
    """

    per_row: bool = True
    name: ClassVar[str] = "wanda"

    @property
    def rows(self) -> bool:
        """Whether weights are ranked within each output channel, the value of `per_row`."""
        return self.per_row

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures the mean squares of the inputs."""
        squares = mean_squares(network.topology, self._required(data))
        return Measured(network, of_roles=[exact_sqrt(x) for x in squares])

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns the root mean square of the inputs, and ones."""
        return _measured(network).of_roles[network.topology.roles.index(role)], None


class LookaheadAct(DataCriterion):
    """Scores by lookahead with the rows sqrt(p[o]) W[o], where p[o] is how often unit o is > 0.

        score^2 = w^2 * p[o] * p_prev[i] ||W_prev[i]||^2 * sum over n of p_next[n] W_next[n, o]^2

    p is a mean over batch and positions, taken after the unit's activation function. It is 1 if no
    activation function follows before the next weighted layer or join.
    """

    name: ClassVar[str] = "lookahead_act"
    reads_norms = True

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures how often each unit is active."""
        return Measured(network, activity=active_fractions(network.topology, self._required(data)))

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, out_norm * sqrt(p)), with norms that count active neighbor units."""
        into, out = network.norms(role)
        active = network.activity[network.topology.roles.index(role)]
        return into, out if active is None else out * exact_sqrt(active)


@dataclass(frozen=True)
class WeightGradient(DataCriterion):
    """Scores by |w * dL/dw|, the first-order change of the loss L if w is zeroed (SNIP, Taylor).

    loss is a function of model and batch that returns a scalar. None means cross entropy on batches
    (inputs, target). The signed gradients are summed over the batches.
    """

    loss: Loss | None = None
    name: ClassVar[str] = "weight_gradient"

    def prepare(self, network: Network, data: Any) -> Network:
        """Sums the gradients over the batches."""
        return Measured(
            network, of_layers=weight_gradients(network.topology, self._required(data), self.loss)
        )

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """Returns the weight times its gradient."""
        gradient = _measured(network).of_layers.get(layer.name)
        if gradient is None:
            raise LapValueError(
                f"weights that require grad for criterion {self.name!r}",
                "a frozen one",
                f"Set model.requires_grad_(True), or pass exclude=[{layer.name!r}].",
            )
        return layer.weight.detach() * gradient  # w dL/dw = p dL/dp where w is p times a factor


@dataclass(frozen=True)
class OBD(DataCriterion):
    """Scores by sqrt(h / 2) |w|, which ranks like h w^2 / 2, the second-order change of the loss.

    With curvature "hessian", h is the diagonal of the Hessian of the mean loss, with negative
    entries counted as 0; with "ggn", it is the diagonal of the generalized Gauss-Newton matrix.
    loss is a loss module that BackPACK supports, or None for cross entropy. Batches are (inputs,
    target). The model must be a single chain of layers.
    """

    curvature: str = "hessian"
    loss: nn.Module | None = None
    name: ClassVar[str] = "obd"

    @calling("OBD")
    def __post_init__(self) -> None:
        one_of("curvature", self.curvature, CURVATURES)
        if getattr(self.loss, "reduction", "mean") != "mean":
            raise LapValueError(
                "a loss with reduction='mean' (h is that of the mean loss)",
                f"reduction={self.loss.reduction!r}",  # type: ignore[union-attr]
            )

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures h for every weight."""
        return Measured(network, of_layers=self._diagonals(network, data))

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """Returns the weight times sqrt(h / 2), where h is its entry of the Hessian's diagonal."""
        return network.weight(layer) * exact_sqrt(_measured(network).of_layers[layer.name] / 2)

    def _diagonals(self, network: Network, data: Any) -> dict[str, Tensor]:
        data = self._required(data)
        diagonals = hessian_diagonals(network.topology, data, self.loss, self.curvature)
        return {name: h.clamp(min=0) for name, h in diagonals.items()}


@dataclass(frozen=True)
class OBDLookahead(OBD):
    """Scores by lookahead with the weights sqrt(h) |w|, where h is that of `OBD`."""

    name: ClassVar[str] = "obd_lookahead"
    reads_norms = True

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures h and replaces every weight w with sqrt(h) w."""
        layers = network.topology.layers
        diagonals = self._diagonals(network, data)
        weights = {
            name: layers[name].weight.detach() * exact_sqrt(h) for name, h in diagonals.items()
        }
        return Measured(network, weights=weights)

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """Returns the weight times sqrt(h)."""
        return network.weight(layer)

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, out_norm), computed from the weights times sqrt(h)."""
        return network.norms(role)
