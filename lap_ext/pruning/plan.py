# SPDX-License-Identifier: MIT
"""Plans a pruning: checks every option and chooses the layers, but computes no score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lap_ext import criteria
from lap_ext._text import matches, meant_layers, some
from lap_ext.criteria import Criterion, CriterionLike
from lap_ext.criteria.context import Network
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.ops import check
from lap_ext.options import (
    BATCH_NORMS,
    NORMALIZATIONS,
    ON_UNSUPPORTED,
    ORDERS,
    RESIDUALS,
    SCOPES,
    BatchNorm,
    Inputs,
    Normalize,
    OnUnsupported,
    Order,
    Patterns,
    Residual,
    Scope,
    one_of,
    positive,
)
from lap_ext.topology import Layer, Topology, trace

_LISTED = 5  # of many layers, errors list the first ones


@dataclass(frozen=True)
class Options:
    """The checked options of `prune` that say which layers are ranked and how.

    Attributes:
        criterion: scores the weights; it receives its data later.
        scope, normalize, order, rounds, batch_norm, residual, layers, exclude: as in `prune`.
    """

    criterion: Criterion
    scope: Scope = "layer"
    normalize: Normalize = "none"
    order: Order = "parallel"
    rounds: int = 1
    batch_norm: BatchNorm = "edge"
    residual: Residual = "sum"
    layers: Patterns | None = None
    exclude: Patterns = ()

    def __post_init__(self) -> None:
        one_of("scope", self.scope, SCOPES)
        one_of("normalize", self.normalize, NORMALIZATIONS)
        one_of("order", self.order, ORDERS)
        one_of("batch_norm", self.batch_norm, BATCH_NORMS)
        one_of("residual", self.residual, RESIDUALS)
        positive("rounds", self.rounds)
        if self.scope == "global" and self.order != "parallel":
            raise LapValueError(
                '{order="parallel"} with {scope="global"} (one ranking needs all scores at once)',
                f"order={self.order!r}",
                "Use rounds to score anew in between.",
            )


@dataclass(frozen=True)
class Plan:
    """The layers of a model to prune, and the options.

    Attributes:
        topology: the topology of the model.
        layers: the chosen layers, in the network's order.
        options: the options of `prune`.
    """

    topology: Topology
    layers: list[Layer]
    options: Options

    @property
    def criterion(self) -> Criterion:
        """The criterion that scores the weights."""
        return self.options.criterion

    def network(self, masks: Mapping[str, Tensor]) -> Network:
        """Builds the network that computes scores; masks gives the weights that are kept."""
        options = self.options
        chain = [layer.name for layer in self.layers] if options.residual == "chain" else None
        return Network(self.topology, options.batch_norm, masks=masks, chain=chain)


def options_of(
    criterion: CriterionLike,
    *,
    scope: Scope = "layer",
    normalize: Normalize = "none",
    order: Order = "parallel",
    rounds: int = 1,
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    layers: Patterns | None = None,
    exclude: Patterns = (),
) -> Options:
    """Checks the options that `prune` documents."""
    return Options(
        criteria.of(criterion),
        scope=scope,
        normalize=normalize,
        order=order,
        rounds=rounds,
        batch_norm=batch_norm,
        residual=residual,
        layers=None if layers is None else _patterns(layers, "layers"),
        exclude=_patterns(exclude, "exclude"),
    )


def plan_of(topology: Topology, options: Options) -> Plan:
    """Chooses the layers to prune according to the options."""
    return Plan(topology, chosen(topology, options.layers, options.exclude), options)


def topology_of(
    model: nn.Module,
    example_inputs: Inputs | None,
    topology: Topology | None,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
) -> Topology:
    """Traces a model, or checks the topology that is given instead of example inputs."""
    one_of("on_unsupported", on_unsupported, ON_UNSUPPORTED)
    if topology is None:
        return trace(model, example_inputs, neighbors=neighbors, on_unsupported=on_unsupported)
    if example_inputs is not None or neighbors is not None:
        other = "example_inputs" if example_inputs is not None else "neighbors"
        raise LapTypeError(
            f"topology alone (the trace has been made, and {other} are for it)",
            f"{other} too",
            f"Leave out topology, or {other}.",
        )
    if not isinstance(topology, Topology):
        raise LapTypeError(
            "{argument} to be what trace returned", type(topology).__name__, argument="topology"
        )
    if topology.model is not model:
        raise LapValueError(
            "a topology traced from this model",
            "one traced from another model",
            "Call trace on this model.",
        )
    return topology


def chosen(topology: Topology, layers: Patterns | None, exclude: Patterns) -> list[Layer]:
    """Chooses the layers that match a pattern in layers and no pattern in exclude.

    Args:
        topology: the topology of the model.
        layers: patterns of the layers to take; None means all.
        exclude: patterns of the layers to leave out.

    Raises:
        LapValueError: a pattern matches no layer.
    """
    names = set(topology.layers) if layers is None else _matching(topology, layers, "layers")
    names -= _matching(topology, exclude, "exclude")
    return [layer for name, layer in topology.layers.items() if name in names]


def _patterns(patterns: Patterns, argument: str) -> tuple[str, ...]:
    """Lists the patterns once: they may come from a generator."""
    if isinstance(patterns, str):
        return (patterns,)
    items = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    for item in items:
        if not isinstance(item, str):
            raise LapTypeError(
                "{argument} to be patterns of layer names", type(item).__name__, argument=argument
            )
    return items


def _matching(topology: Topology, patterns: Patterns, argument: str) -> set[str]:
    """Finds the names of layers that match patterns; each pattern must match one."""
    names: set[str] = set()
    for pattern in _patterns(patterns, argument):
        matching = [name for name in topology.layers if matches(name, pattern)]
        if not matching:
            raise LapValueError(
                "{argument} patterns that name a layer",
                repr(pattern),
                meant_layers(pattern, list(topology.layers)),
                argument=argument,
            )
        names.update(matching)
    return names


def checked_masks(topology: Topology, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Checks that the masks of an earlier pruning fit the model's layers."""
    if masks is not None and not isinstance(masks, Mapping):
        raise LapTypeError(
            "{argument} to be a mapping of layer name -> bool tensor",
            type(masks).__name__,
            argument="masks",
        )
    given = dict(masks or {})
    for name, mask in given.items():
        if name not in topology.layers:
            raise LapValueError(
                "masks of the model's layers",
                f"one for {name!r}",
                f"The layers are {some(topology.layers, _LISTED)}.",
            )
        shapes = tuple(mask.shape), "weight", topology.layers[name].shape
        check.mask_like(f"masks[{name!r}]", str(mask.dtype), *shapes)
    return given
