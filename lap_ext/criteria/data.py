# SPDX-License-Identifier: MIT
"""Defines the criteria that run the model on data for activations, gradients or curvature.

    wanda             |w| * sqrt(mean of x_i^2)
    lookahead_act     lookahead with every unit's row times sqrt(p); p is its active fraction
    weight_gradient   |w * dL/dw|
    obd               sqrt(h / 2) |w|, which ranks like h w^2 / 2; h is the Hessian's diagonal
    obd_lookahead     lookahead with the weights sqrt(h) |w|

The statistics are measured only once, on the unpruned model before the first round. Criteria of
whole units across layers are in units.py.
Sources: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023
(Wanda); Park et al., ICLR 2020 (lookahead_act, obd, obd_lookahead); Lee et al., "SNIP", 2019;
LeCun et al., "Optimal Brain Damage", 1989.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lap_ext.criteria.base import Criterion, Norms
from lap_ext.criteria.context import Network
from lap_ext.criteria.statistics.activations import active_fractions, mean_squares
from lap_ext.criteria.statistics.curvature import CURVATURES, hessian_diagonals
from lap_ext.criteria.statistics.gradients import Loss, weight_gradients
from lap_ext.criteria.statistics.measured import (
    Statistics,
    StatisticsFile,
    check_not_negative,
    check_shape,
    missing,
    name_of,
)
from lap_ext.errors import LapValueError, calling
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.options import one_of
from lap_ext.places import Chunk
from lap_ext.topology import Topology
from lap_ext.topology.roles import Role


class DataCriterion(Criterion, ABC):
    """The base class of criteria that run the model on data, or read what an earlier run measured.

    A derived class defines `measure`, and reads the results from `network.statistics`.
    """

    @abstractmethod
    def measure(self, topology: Topology, data: Any) -> dict[str, Tensor]:
        """Runs the model on data and returns the statistics by name (statistics/measured.py)."""

    def prepare(self, network: Network, data: Any) -> None:
        """Measures the statistics, or opens a file of them."""
        if isinstance(data, (str, os.PathLike)):
            network.statistics = StatisticsFile(data)
        elif data is None or not network.place.held:
            held = network.place.held
            kind = "batches to run the model on, or a file" if held else "a file"
            raise LapValueError(
                f"{{argument}} for criterion {self.name!r} ({kind} of statistics)",
                "None" if data is None else type(data).__name__,
                f"Pass {'data=loader, a list of batches, or ' if held else ''}the path of a "
                "safetensors file with what lap_ext.criteria.measure returns.",
                argument="data",
            )
        else:
            network.statistics = Statistics(self.measure(network.topology, data))


def of_role(network: Network, role: Role, what: str, side: int) -> Tensor:
    """Returns a statistic >= 0 of a role's input (side 0) or output channels (1), float64.

    One number stands for all channels; it is returned as it is.
    """
    name = name_of(network.topology, role, what)
    values = network.statistics.get(name)
    if values is None:
        raise missing(name)
    if values.dim():
        check_shape(name, values.shape, [role.part.channels[side]])
    check_not_negative(name, values)
    return values.double()


def _curvature(network: Network, chunk: Chunk) -> Tensor:
    """Returns h of a chunk's weights, in their shape."""
    name, h = f"{chunk.layer.name}.hessian", network.statistics.of_chunk(chunk, "hessian")
    if h is None:
        raise missing(name)
    check_not_negative(name, h)
    return h


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
    reads_norms: ClassVar[bool] = False

    @property
    def rows(self) -> bool:
        """Whether weights are ranked within each output channel, the value of `per_row`."""
        return self.per_row

    def measure(self, topology: Topology, data: Any) -> dict[str, Tensor]:
        """Measures "mean_square", of the inputs of each role."""
        squares = zip(topology.roles, mean_squares(topology, data), strict=True)
        return {name_of(topology, role, "mean_square"): x for role, x in squares}

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns the root mean square of the inputs, and ones."""
        squares = of_role(network, role, "mean_square", 0)
        return exact_sqrt(squares.expand(role.part.channels[0])), None


class LookaheadAct(DataCriterion):
    """Scores by lookahead with the rows sqrt(p[o]) W[o], where p[o] is how often unit o is > 0.

        score^2 = w^2 * p[o] * p_prev[i] ||W_prev[i]||^2 * sum over n of p_next[n] W_next[n, o]^2

    p is a mean over batch and positions, taken after the unit's activation function. It is 1 if no
    activation function follows before the next weighted layer or join.
    """

    name: ClassVar[str] = "lookahead_act"

    def measure(self, topology: Topology, data: Any) -> dict[str, Tensor]:
        """Measures "active_fraction", of each role's outputs; the number 1 where all always are."""
        always = torch.ones((), dtype=torch.float64)
        fractions = zip(topology.roles, active_fractions(topology, data), strict=True)
        return {
            name_of(topology, role, "active_fraction"): always.clone() if x is None else x
            for role, x in fractions
        }

    def prepare(self, network: Network, data: Any) -> None:
        """Measures or reads how often each unit is active."""
        super().prepare(network, data)
        for index, role in enumerate(network.topology.roles):
            active = of_role(network, role, "active_fraction", 1)
            always = not active.dim() and float(active) == 1
            network.activity[index] = None if always else active.expand(role.part.channels[1])

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, out_norm * sqrt(p)), with norms that count active neighbor units."""
        into, out = network.norms(role)
        active = network.activity[network.index(role)]
        return into, out if active is None else out * exact_sqrt(active)


@dataclass(frozen=True)
class WeightGradient(DataCriterion):
    """Scores by |w * dL/dw|, the first-order change of the loss L if w is zeroed (SNIP, Taylor).

    loss is a function of model and batch that returns a scalar. None means cross entropy on batches
    (inputs, target). The signed gradients are summed over the batches.
    """

    loss: Loss | None = None
    name: ClassVar[str] = "weight_gradient"

    def measure(self, topology: Topology, data: Any) -> dict[str, Tensor]:
        """Measures "gradient", summed over the batches, of each weight that requires grad."""
        gradients = weight_gradients(topology, data, self.loss)
        return {f"{name}.gradient": x for name, x in gradients.items()}

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        """Returns the weight times its gradient."""
        gradient = network.statistics.of_chunk(chunk, "gradient")
        if gradient is not None:
            return chunk.parameter * gradient
        if isinstance(network.statistics, StatisticsFile):
            raise missing(f"{chunk.layer.name}.gradient")
        raise LapValueError(
            f"weights that require grad for criterion {self.name!r}",
            "a frozen one",
            f"Set model.requires_grad_(True), or pass exclude=[{chunk.layer.name!r}].",
        )


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

    def measure(self, topology: Topology, data: Any) -> dict[str, Tensor]:
        """Measures "hessian", h for every weight, with negative entries counted as 0."""
        diagonals = hessian_diagonals(topology, data, self.loss, self.curvature)
        return {f"{name}.hessian": h.clamp(min=0) for name, h in diagonals.items()}

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        """Returns the weight times sqrt(h / 2), where h is its entry of the Hessian's diagonal."""
        return chunk.weight * exact_sqrt(_curvature(network, chunk) / 2)


@dataclass(frozen=True)
class OBDLookahead(OBD):
    """Scores by lookahead with the weights sqrt(h) |w|, where h is that of `OBD`."""

    name: ClassVar[str] = "obd_lookahead"

    def prepare(self, network: Network, data: Any) -> None:
        """Measures or reads h; the norms are those of the weights times sqrt(h)."""
        super().prepare(network, data)
        network.surrogate = partial(self.weight, network)

    def weight(self, network: Network, chunk: Chunk) -> Tensor:
        """Returns the weight times sqrt(h)."""
        return chunk.parameter * exact_sqrt(_curvature(network, chunk))

    def norms(self, network: Network, role: Role) -> Norms:
        """Returns (in_norm, out_norm), computed from the weights times sqrt(h)."""
        return network.norms(role)
