# SPDX-License-Identifier: MIT
"""Plans a pruning: checks every option and chooses the layers, but computes no score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lap_ext import criteria
from lap_ext._text import matches, some
from lap_ext.allocation import Allocation, floors
from lap_ext.criteria import Criterion, CriterionLike
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.ops import check
from lap_ext.options import (
    BATCH_NORMS,
    ON_UNSUPPORTED,
    ORDERS,
    RESIDUALS,
    SCOPES,
    BatchNorm,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Order,
    Patterns,
    Residual,
    Scope,
    normalize_for,
    one_of,
    positive,
)
from lap_ext.places import readable
from lap_ext.pruning.dense import dense_by_default
from lap_ext.pruning.patterns import all_matching, checked
from lap_ext.topology import Layer, Topology, trace

_LISTED = 5  # of many layers, errors list the first ones


@dataclass(frozen=True)
class Options:
    """The checked options of `prune` that say which layers are ranked and how.

    Attributes:
        criterion: scores the weights; it receives its data later.
        scope, normalize, order, rounds, batch_norm, residual, layers, exclude: as in `prune`;
            normalize is resolved, never "auto".
        min_keep: as in `prune`.
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
    min_keep: MinKeep = None

    @property
    def raw(self) -> bool:
        """Whether scores of different layers are compared as they are."""
        return self.scope == "global" and self.normalize == "none"

    def __post_init__(self) -> None:
        one_of("scope", self.scope, SCOPES)
        one_of("order", self.order, ORDERS)
        one_of("batch_norm", self.batch_norm, BATCH_NORMS)
        one_of("residual", self.residual, RESIDUALS)
        positive("rounds", self.rounds)
        floors(self.min_keep, {})  # checks it
        if self.scope == "global" and self.order != "parallel":
            raise LapValueError(
                '{order="parallel"} with {scope="global"} (one ranking needs all scores at once)',
                f"order={self.order!r}",
                "Use {rounds=} to score anew in between.",
            )


@dataclass(frozen=True)
class Plan:
    """The layers of a model to prune, and the options.

    Attributes:
        topology: the topology of the model.
        layers: the chosen layers, in the network's order.
        options: the options of `prune`.
        left_dense: layers that stay dense by default -> the reason.
    """

    topology: Topology
    layers: list[Layer]
    options: Options
    left_dense: dict[str, str]

    @property
    def criterion(self) -> Criterion:
        """The criterion that scores the weights."""
        return self.options.criterion


def options_of(
    criterion: CriterionLike,
    *,
    scope: Scope = "layer",
    normalize: Normalize = "auto",
    order: Order = "parallel",
    rounds: int = 1,
    batch_norm: BatchNorm = "edge",
    residual: Residual = "sum",
    layers: Patterns | None = None,
    exclude: Patterns = (),
    min_keep: MinKeep = None,
) -> Options:
    """Checks the options that `prune` documents."""
    return Options(
        criteria.of(criterion),
        scope=scope,
        normalize=normalize_for(normalize, scope),
        order=order,
        rounds=rounds,
        batch_norm=batch_norm,
        residual=residual,
        layers=None if layers is None else checked(layers, "layers"),
        exclude=checked(exclude, "exclude"),
        min_keep=min_keep,
    )


def plan_of(topology: Topology, options: Options) -> Plan:
    """Chooses the layers to prune according to the options."""
    layers, left_dense = chosen(topology, options.layers, options.exclude)
    for layer in layers:
        readable(layer)
    return Plan(topology, layers, options, left_dense)


def topology_of(
    model: nn.Module,
    example_inputs: Inputs | None,
    topology: Topology | None,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
) -> Topology:
    """Traces a model, or binds the topology that is given instead of example inputs to it."""
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
    return topology.bind(model)


def chosen(
    topology: Topology, layers: Patterns | None, exclude: Patterns
) -> tuple[list[Layer], dict[str, str]]:
    """Chooses the layers that match a pattern in layers and no pattern in exclude.

    Args:
        topology: the topology of the model.
        layers: patterns of the layers to take; None means all but embeddings and output heads.
        exclude: patterns of the layers to leave out.

    Returns:
        The layers, and those that stay dense by default -> the reason.

    Raises:
        LapValueError: a pattern matches no layer.
    """
    excluded = all_matching(topology, exclude, "exclude")
    left_dense = dense_by_default(topology) if layers is None else {}
    left_dense = {name: why for name, why in left_dense.items() if name not in excluded}
    names = set(topology.layers) if layers is None else all_matching(topology, layers, "layers")
    names -= excluded | left_dense.keys()
    return [layer for name, layer in topology.layers.items() if name in names], left_dense


def check_prunable(layers: Iterable[Layer]) -> None:
    """Raises for the first layer whose weights a mask cannot make zero."""
    for layer in layers:
        if layer.pruned_by == "nothing":
            path, _, attribute = layer.parameter.rpartition(".")
            raise LapValueError(
                "weights that are zero where their parameter is, or that a mask can multiply",
                f"one that a forward computes by {layer.computed_by} from {layer.parameter!r}, "
                "where no mask can reach it",
                f"Leave the layer out with {{exclude={layer.name!r}}}. Or compute the weight in a "
                "parametrization instead of a forward, torch.nn.utils.parametrize."
                f"register_parametrization(model.get_submodule({path!r}), {attribute!r}, ...), "
                "where a mask can multiply it.",
                layer=layer.name,
            )


def check_sparsity(
    allocated: Allocation, names: Iterable[str], left_dense: Mapping[str, str], min_keep: MinKeep
) -> None:
    """Checks that a sparsity does not remove everything, and names no layer that stays dense.

    Raises:
        LapValueError: a sparsity is 1, which only min_keep allows; or a pattern of it matches only
            layers that stay dense by default.
    """
    given = getattr(allocated, "sparsity", None)
    fractions = given.values() if isinstance(given, Mapping) else [given]
    if min_keep is None and 1 in fractions:
        raise LapValueError(
            "{argument} < 1, the fraction to remove",
            "1, which sets every weight to zero",
            "If that is what you want, add {min_keep=0}.",
            argument="sparsity",
        )
    names = list(names)
    for pattern in given if isinstance(given, Mapping) else ():
        dense = [name for name in left_dense if matches(name, pattern)]
        if dense and not any(matches(name, pattern) for name in names):
            raise LapValueError(
                "patterns of layers that are pruned",
                f"{pattern!r}, which names {some(dense, _LISTED)}",
                "Embeddings and output heads stay dense unless {layers=} names them.",
                argument="sparsity",
            )


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
    for name, layer in topology.layers.items():
        alive = layer.alive  # what a mask in the model has pruned stays pruned
        if alive is not None:
            given[name] = given[name].to(alive.device) & alive if name in given else alive
    return given
