# SPDX-License-Identifier: MIT
"""Criteria that run the model on data: activations, gradients, curvature.

    wanda             |w| * sqrt(mean of x_i^2)
    lookahead_act     lookahead with every unit's row times sqrt(p), p: fraction of active outputs
    weight_gradient   |w * dL/dw|
    obd               sqrt(h / 2) |w|, the same ranking as h w^2 / 2; h: the Hessian's diagonal
    obd_lookahead     lookahead of the weights sqrt(h) |w|

The statistics are measured once, on the unpruned model before the first round, and not again
between rounds.
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
    """A network with statistics from data; otherwise a copy of the given network."""

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
    """Scores by |w| * sqrt(mean of x_i^2), where x_i is input i of the layer over the data.

    per_row: keep the same number of weights in every output channel, as published (if the count
    does not divide evenly, the first channels keep one more each). False ranks all weights of the
    layer together. With scope="global", all weights of all layers are always ranked together.
    """

    per_row: bool = True
    name: ClassVar[str] = "wanda"

    @property
    def rows(self) -> bool:
        """Whether weights are compared within each output channel: `per_row`."""
        return self.per_row

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures the mean squares of the inputs."""
        squares = mean_squares(network.topology, self._required(data))
        return Measured(network, of_roles=[exact_sqrt(x) for x in squares])

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (root mean square of the inputs, ones)."""
        return _measured(network).of_roles[network.topology.roles.index(role)], None


class LookaheadAct(DataCriterion):
    """Scores by the lookahead of sqrt(p_o) W[o]; p_o is how often unit o is active (> 0).

        score^2 = w^2 * p[o] * p_prev[i] ||W_prev[i]||^2 * sum over n of p_next[n] W_next[n, o]^2

    p is a mean over batch and positions, after the unit's activation function; 1 where none follows
    before the next weighted layer or join.
    """

    name: ClassVar[str] = "lookahead_act"
    reads_norms = True

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures how often each unit is active."""
        return Measured(network, activity=active_fractions(network.topology, self._required(data)))

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, out_norm * sqrt(p)); the norms count the neighbors' active units."""
        into, out = network.norms(role)
        active = network.activity[network.topology.roles.index(role)]
        return into, out if active is None else out * exact_sqrt(active)


@dataclass(frozen=True)
class WeightGradient(DataCriterion):
    """Scores by |w * dL/dw|: the first-order change of the loss if w is zeroed (SNIP, Taylor).

    loss: (model, batch) -> a scalar. None: cross entropy, batches (inputs, target). Gradients are
    summed over the batches, signed.
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
        return network.weight(layer) * gradient


@dataclass(frozen=True)
class OBD(DataCriterion):
    """Scores by sqrt(h / 2) |w|, which ranks like h w^2 / 2, the second-order change of the loss.

    curvature: "hessian" for h the diagonal of the Hessian of the mean loss, negative entries
    counted as 0; "ggn" for that of the generalized Gauss-Newton matrix. loss: a loss module that
    BackPACK supports; None: cross entropy. Batches are (inputs, target). Only for models that are
    one chain of layers.
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
        """Returns the weight times sqrt(h / 2)."""
        return network.weight(layer) * exact_sqrt(_measured(network).of_layers[layer.name] / 2)

    def _diagonals(self, network: Network, data: Any) -> dict[str, Tensor]:
        data = self._required(data)
        diagonals = hessian_diagonals(network.topology, data, self.loss, self.curvature)
        return {name: h.clamp(min=0) for name, h in diagonals.items()}


@dataclass(frozen=True)
class OBDLookahead(OBD):
    """Scores by the lookahead of sqrt(h) |w|."""

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
        """Returns (in_norm, out_norm) of the weights times sqrt(h)."""
        return network.norms(role)
