# SPDX-License-Identifier: MIT
"""Criteria that look at data: activations (activations.py), gradients, curvature.

    wanda             |w| * sqrt(mean of x_i^2)
    lookahead_act     lookahead with every unit's row times sqrt(p), p: how often it is active
    weight_gradient   |w * dL/dw|
    obd               sqrt(h / 2) |w|, which ranks as h w^2 / 2 does; h: Hessian's diagonal
    obd_lookahead     lookahead of the weights sqrt(h) |w|

All of it is measured once, on the model as it is: before the first round, not between rounds.
Sources: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023
(Wanda); Park et al., ICLR 2020 (lookahead_act, obd, obd_lookahead); Lee et al., "SNIP", 2019;
LeCun et al., "Optimal Brain Damage", 1989.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lap_ext.criteria.base import Criterion, Factors
from lap_ext.criteria.context import Network
from lap_ext.criteria.statistics.activations import active_fractions, mean_squares
from lap_ext.criteria.statistics.curvature import CURVATURES, hessian_diagonals
from lap_ext.criteria.statistics.gradients import Loss, weight_gradients
from lap_ext.ops import check
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role


class Measured(Network):
    """A network and what data has shown of it; in all else the network that it was made of."""

    def __init__(
        self,
        network: Network,
        of_roles: list[Tensor] | None = None,  # one vector a role
        of_layers: Mapping[str, Tensor] | None = None,  # one tensor of the weight's shape a layer
        weights: Mapping[str, Tensor] | None = None,
        activity: list[Tensor | None] | None = None,
    ) -> None:
        vars(self).update(vars(network))  # nothing was scored: no norm is kept there yet
        self.of_roles = of_roles or []
        self.of_layers = of_layers or {}
        self._weights = {**self._weights, **(weights or {})}
        self.activity = activity or self.activity


def _measured(network: Network) -> Measured:
    assert isinstance(network, Measured)  # what prepare has returned
    return network


@dataclass(frozen=True)
class Wanda(Criterion):
    """|w| * sqrt(mean of x_i^2), x_i what the layer reads over data.

    per_row: keep as many weights of every output channel (as published; of those left over, the
    first channels keep one more). False compares all weights of the layer. One ranking over all
    layers (scope="global") compares all weights in any case.
    """

    per_row: bool = True
    name: ClassVar[str] = "wanda"

    @property
    def rows(self) -> bool:
        """As per_row says."""
        return self.per_row

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures the inputs."""
        names = {"function": network.function, "criterion": self.name}
        squares = mean_squares(network.topology, data, **names)
        return Measured(network, of_roles=[exact_sqrt(x) for x in squares])

    def factors(self, network: Network, role: Role) -> Factors:
        """(root mean square of the inputs, ones)."""
        return _measured(network).of_roles[network.topology.roles.index(role)], None


class LookaheadAct(Criterion):
    """Lookahead of the weights sqrt(p_o) W[o]: p_o is how often unit o is active (> 0) over data.

        score^2 = w^2 * p[o] * p_prev[i] ||W_prev[i]||^2 * sum over n of p_next[n] W_next[n, o]^2

    p counts over batch and positions, behind the unit's activation function; 1 where none follows
    before the next weighted layer or join.
    """

    name: ClassVar[str] = "lookahead_act"
    reads_norms = True

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures how often units are active."""
        names = {"function": network.function, "criterion": self.name}
        return Measured(network, activity=active_fractions(network.topology, data, **names))

    def factors(self, network: Network, role: Role) -> Factors:
        """(in_norm, out_norm * sqrt(p)), the norms those of the neighbors' active units."""
        into, out = network.factors(role)
        active = network.activity[network.topology.roles.index(role)]
        return into, out if active is None else out * exact_sqrt(active)


@dataclass(frozen=True)
class WeightGradient(Criterion):
    """|w * dL/dw|: what zeroing w changes in the loss, to first order (SNIP, Taylor).

    loss: (model, batch) -> a scalar. None: cross entropy, batches (inputs, target). Gradients are
    added up over the batches, signed.
    """

    loss: Loss | None = None
    name: ClassVar[str] = "weight_gradient"

    def prepare(self, network: Network, data: Any) -> Network:
        """Sums the gradients."""
        names = {"function": network.function, "criterion": self.name}
        return Measured(
            network, of_layers=weight_gradients(network.topology, data, self.loss, **names)
        )

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """Weight times gradient."""
        found = _measured(network).of_layers.get(layer.name)
        if found is None:
            raise ValueError(
                f"{network.function}: expected weights that require grad for criterion "
                f"{self.name!r}, got a frozen one in layer {layer.name!r}. Set "
                f"model.requires_grad_(True), or pass exclude=[{layer.name!r}]."
            )
        return network.weight(layer) * found


@dataclass(frozen=True)
class OBD(Criterion):
    """sqrt(h / 2) |w|, which ranks as h w^2 / 2 does: what zeroing w changes, to second order.

    curvature: "hessian" for h the diagonal of the Hessian of the mean loss, negative entries
    counted as 0; "ggn" for that of the generalized Gauss-Newton matrix. loss: a loss module that
    BackPACK knows; None: cross entropy. Batches are (inputs, target). For chains of layers only.
    """

    curvature: str = "hessian"
    loss: nn.Module | None = None
    name: ClassVar[str] = "obd"

    def __post_init__(self) -> None:
        check.one_of("OBD", "curvature", self.curvature, CURVATURES)
        if getattr(self.loss, "reduction", "mean") != "mean":
            raise ValueError(
                f"{type(self).__name__}: expected a loss with reduction='mean' (h is that of the "
                f"mean loss), got reduction={self.loss.reduction!r}."  # type: ignore[union-attr]
            )

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures h."""
        return Measured(network, of_layers=self._diagonals(network, data))

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """The weight times sqrt(h / 2)."""
        return network.weight(layer) * exact_sqrt(_measured(network).of_layers[layer.name] / 2)

    def _diagonals(self, network: Network, data: Any) -> dict[str, Tensor]:
        names = {"function": network.function, "criterion": self.name}
        found = hessian_diagonals(network.topology, data, self.loss, self.curvature, **names)
        return {name: h.clamp(min=0) for name, h in found.items()}


@dataclass(frozen=True)
class OBDLookahead(OBD):
    """Lookahead of the weights sqrt(h) |w|."""

    name: ClassVar[str] = "obd_lookahead"
    reads_norms = True

    def prepare(self, network: Network, data: Any) -> Network:
        """Measures h, and puts sqrt(h) |w| in place of every weight."""
        layers = network.topology.layers
        found = self._diagonals(network, data)
        weights = {name: layers[name].weight.detach() * exact_sqrt(h) for name, h in found.items()}
        return Measured(network, weights=weights)

    def weight(self, network: Network, layer: Layer) -> Tensor:
        """The weight that is counted."""
        return network.weight(layer)

    def factors(self, network: Network, role: Role) -> Factors:
        """(in_norm, out_norm) of the weights that are counted."""
        return network.factors(role)
