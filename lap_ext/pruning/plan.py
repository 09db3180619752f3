# SPDX-License-Identifier: MIT
"""How a model is to be pruned: every option checked, the layers chosen, nothing scored yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lap_ext import criteria
from lap_ext._text import matches, some
from lap_ext.criteria import Criterion
from lap_ext.criteria.context import BN, Network
from lap_ext.ops import check
from lap_ext.pruning import selection
from lap_ext.topology import Layer, Topology, trace

SCOPES, ORDERS = ("layer", "global"), ("parallel", "forward", "backward")
SKIPS = ("sum", "ignore")
_LISTED = 5  # of many layers, the first ones show how they are named


@dataclass(frozen=True)
class Options:
    """The options of `prune` that say how layers are scored and ranked, checked."""

    criterion: Criterion
    scope: str
    normalize: str
    order: str
    rounds: int
    exclude: Sequence[str]
    bn: str
    skip: str


@dataclass(frozen=True)
class Plan:
    """The layers of a model that are to be pruned, and how.

    Attributes:
        function: the public function that errors name.
        topology: of the model.
        layers: those that are not excluded, in the network's order.
        options: of `prune`.
    """

    function: str
    topology: Topology
    layers: list[Layer]
    options: Options

    @property
    def criterion(self) -> Criterion:
        """What a weight is worth."""
        return self.options.criterion

    def network(self, masks: Mapping[str, Tensor]) -> Network:
        """What scores are computed with; masks: the weights that are left."""
        options = self.options
        chain = [layer.name for layer in self.layers] if options.skip == "ignore" else None
        return Network(self.topology, options.bn, masks=masks, chain=chain, function=self.function)


def options_of(
    function: str,
    *,
    criterion: Any = "lookahead",
    scope: str = "layer",
    normalize: str = "none",
    order: str = "parallel",
    rounds: int = 1,
    exclude: Sequence[str] = (),
    bn: str = "paper",
    skip: str = "sum",
) -> Options:
    """Checks the options of `prune`, whose documentation says what they mean."""
    check.one_of(function, "scope", scope, SCOPES)
    check.one_of(function, "normalize", normalize, selection.NORMALIZATIONS)
    check.one_of(function, "order", order, ORDERS)
    check.one_of(function, "bn", bn, BN)
    check.one_of(function, "skip", skip, SKIPS)
    check.positive(function, "rounds", rounds)
    if scope == "global" and order != "parallel":
        raise ValueError(
            f'{function}: expected order="parallel" with scope="global" (one ranking needs all '
            f"scores at once), got order={order!r}. Use rounds to score anew in between."
        )
    how = criteria.of(criterion, function)
    return Options(how, scope, normalize, order, rounds, exclude, bn, skip)


def plan_of(function: str, topology: Topology, options: Options) -> Plan:
    """Chooses the layers that the options leave to prune."""
    return Plan(function, topology, chosen(function, topology, options.exclude), options)


def topology_of(
    function: str,
    model: nn.Module,
    given: Any,
    kwargs: Mapping[str, Any] | None = None,
    neighbors: Mapping[str, Any] | None = None,
    unknown: str = "error",
) -> Topology:
    """Traces a model, or takes the topology that is given in place of example inputs."""
    if not isinstance(given, Topology):
        return trace(model, given, kwargs, neighbors=neighbors, unknown=unknown)
    if given.model is not model:
        raise ValueError(f"{function}: expected the topology of this model, got another's.")
    return given


def chosen(function: str, topology: Topology, exclude: Sequence[str]) -> list[Layer]:
    """Chooses the layers that no pattern of exclude names; each pattern must name one."""
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in topology.layers):
            raise ValueError(
                f"{function}: expected exclude patterns that name a layer, got {pattern!r}. The "
                f"layers are {some(topology.layers, _LISTED)}."
            )
    return [
        layer
        for name, layer in topology.layers.items()
        if not any(matches(name, pattern) for pattern in patterns)
    ]


def checked_masks(
    function: str, topology: Topology, masks: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Checks that masks of an earlier pruning are of the model's layers."""
    given = dict(masks or {})
    for name, mask in given.items():
        if name not in topology.layers:
            raise ValueError(
                f"{function}: expected masks of the model's layers, got one for {name!r}. The "
                f"layers are {some(topology.layers, _LISTED)}."
            )
        shapes = tuple(mask.shape), "weight", topology.layers[name].shape
        check.mask_like(function, f"masks[{name!r}]", str(mask.dtype), *shapes)
    return given
