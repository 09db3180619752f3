# SPDX-License-Identifier: MIT
"""Plans a pruning: checks every option and chooses the layers, but computes no score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from lap_ext import criteria, structures
from lap_ext._text import layer_name, matches, some
from lap_ext.allocation import Allocation, Sparsity, Target, floors
from lap_ext.criteria import Criterion, CriterionLike, UnitCriterion, exact
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.ops import check
from lap_ext.ops.check import keep_count
from lap_ext.options import (
    BATCH_NORMS,
    COSTS,
    ON_UNSUPPORTED,
    ORDERS,
    RESIDUALS,
    SCOPES,
    BatchNorm,
    Cost,
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
from lap_ext.pruning.matrices import fitting
from lap_ext.pruning.patterns import all_matching, checked
from lap_ext.structures import NM, Aggregate, Coupled, Structure, StructureLike
from lap_ext.topology import Layer, Topology, trace
from lap_ext.topology.coupling import CoupledGroups

_CLOSE = 1e-9  # of a number of weights
_LISTED = 5  # of many layers, errors list the first ones


@dataclass(frozen=True)
class Options:
    """The checked options of `prune` that say which layers are ranked and how.

    Attributes:
        criterion: scores the weights; it receives its data later.
        scope, normalize, order, rounds, batch_norm, residual, layers, exclude: as in `prune`;
            normalize is resolved, never "auto".
        min_keep, structure, aggregate, multiple_of, strict, cost, uniform: as in `prune`.
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
    structure: Structure | None = None
    aggregate: Aggregate = "energy"
    multiple_of: int = 1
    strict: bool = False
    cost: Cost | None = None
    uniform: bool = False

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
        _check_structure(self)
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
        groups: for structures across layers, the groups that take part.
    """

    topology: Topology
    layers: list[Layer]
    options: Options
    left_dense: dict[str, str]
    groups: CoupledGroups | None = None

    @property
    def criterion(self) -> Criterion:
        """The criterion that scores the weights."""
        return self.options.criterion


def _check_structure(options: Options) -> None:
    """Checks the options that belong to structures."""
    structure = options.structure
    if isinstance(options.criterion, UnitCriterion):
        options.criterion.check_structure(structure)
    structures.check_aggregate(options.aggregate)
    positive("multiple_of", options.multiple_of)
    if not isinstance(options.strict, bool):
        raise LapTypeError(
            "{argument} to be a bool", type(options.strict).__name__, argument="strict"
        )
    _check_coupled(options)
    others = {
        "aggregate": options.aggregate != "energy",
        "multiple_of": options.multiple_of > 1,
        "strict": options.strict,
    }
    if structure is None:
        for name in (name for name, given in others.items() if given):
            raise LapValueError(
                f"{{structure=}} with {{{name}=}}, which is about what is removed together",
                "none",
            )
        return
    if options.aggregate == "exact" and not isinstance(options.criterion, UnitCriterion):
        exact.counted(options.criterion)
    if not isinstance(structure, NM):
        return
    others = {
        "scope": options.scope == "global",
        "min_keep": options.min_keep is not None,
        "multiple_of": options.multiple_of > 1,
        "aggregate": options.aggregate == "exact",
    }
    for name in (name for name, given in others.items() if given):
        raise LapValueError(
            f"no {{{name}=}} with {{structure={structure.spelled!r}}}, which keeps "
            f"{structure.keep} of every {structure.of} weights in every layer",
            repr(getattr(options, name)),
        )


def _check_coupled(options: Options) -> None:
    """Checks the options that belong to structures across layers."""
    structure = options.structure
    if options.cost is not None:
        one_of("cost", options.cost, COSTS)
    if not isinstance(options.uniform, bool):
        raise LapTypeError(
            "{argument} to be a bool", type(options.uniform).__name__, argument="uniform"
        )
    if not isinstance(structure, Coupled):
        for name, given in (("cost", options.cost is not None), ("uniform", options.uniform)):
            if given:
                raise LapValueError(
                    f"a structure across layers ('channel', 'head', 'expert' or 'unit') with "
                    f"{{{name}=}}",
                    "none" if structure is None else f"structure={structure.spelled!r}",
                )
        return
    if isinstance(options.criterion, UnitCriterion) and options.aggregate != "energy":
        raise LapValueError(
            f"no {{aggregate=}} with criterion {options.criterion.name!r}, which itself says what "
            "a unit is worth",
            repr(options.aggregate),
        )
    if options.strict:
        raise LapValueError(
            f"no {{strict=}} with {{structure={structure.spelled!r}}}: what cannot be removed is "
            "in result.fixed",
            "True",
        )
    if options.order != "parallel":
        raise LapValueError(
            f"{{order='parallel'}} with {{structure={structure.spelled!r}}}, whose units are in "
            "several layers",
            f"order={options.order!r}",
            "Use {rounds=} to score anew in between.",
        )
    if structure.kind == "expert" and options.cost == "flops":
        raise LapValueError(
            "{cost='weights'} for experts: a token uses as many of them as before",
            "cost='flops'",
        )


def pattern_at(structure: Structure | None, sparsity: Sparsity | None) -> NM | None:
    """Returns a pattern as it is at a sparsity, None being its own; None for other structures.

    Of every m weights, floor(sparsity * m) are removed.

    Example:
        >>> pattern_at(NM(2, 4), None).keep, pattern_at(NM(2, 4), 0.3).keep
        (2, 3)
    """
    if not isinstance(structure, NM):
        return None
    if sparsity is None:
        return structure
    if isinstance(sparsity, (Mapping, Allocation, Target)):
        dropped = -1
    else:
        keep_count(sparsity, None, 1)  # checks it
        wanted = Fraction(repr(float(sparsity))) * structure.of
        whole = round(wanted)  # 2/3 is a little less than two thirds
        dropped = whole if abs(wanted - whole) < _CLOSE else math.floor(wanted)
        dropped = dropped if sparsity <= structure.sparsity + _CLOSE else structure.of
    if not 0 <= dropped <= structure.of - structure.keep:
        raise LapValueError(
            f"a {{argument}} of at most {structure.sparsity:g}, which {structure.spelled} itself "
            "has in every layer",
            "one for each layer" if dropped == -1 else sparsity,
            argument="sparsity",
        )
    return replace(structure, keep=structure.of - dropped)


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
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    multiple_of: int = 1,
    strict: bool = False,
    cost: Cost | None = None,
    uniform: bool = False,
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
        structure=None if structure is None else structures.of(structure),
        aggregate=aggregate,
        multiple_of=multiple_of,
        strict=strict,
        cost=cost,
        uniform=uniform,
    )


def plan_of(topology: Topology, options: Options) -> Plan:
    """Chooses the layers to prune according to the options."""
    plan = planned(topology, options)
    for layer in plan.layers:
        readable(layer)
    return plan


def planned(topology: Topology, options: Options) -> Plan:
    """Chooses the layers, or the groups of a structure across layers, without reading weights."""
    if not isinstance(options.structure, Coupled):
        layers, left_dense = chosen(topology, options)
        return Plan(topology, layers, options, left_dense)
    names = set(topology.layers)
    if options.layers is not None:
        names = all_matching(topology, options.layers, "layers")
    names -= all_matching(topology, options.exclude, "exclude")
    groups = topology.groups(options.structure).only(names)
    touched = groups.layers()
    layers = [layer for name, layer in topology.layers.items() if name in touched]
    return Plan(topology, layers, options, {}, groups)


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


def chosen(topology: Topology, options: Options) -> tuple[list[Layer], dict[str, str]]:
    """Chooses the layers that options name and that their structure fits.

    Returns:
        The layers, and those that stay dense by default -> the reason.

    Raises:
        LapValueError: a pattern of names matches no layer, or the structure does not fit.
    """
    excluded = all_matching(topology, options.exclude, "exclude")
    every = options.layers is None
    left_dense = dense_by_default(topology) if every else {}
    left_dense = {name: why for name, why in left_dense.items() if name not in excluded}
    names = set(topology.layers)
    if options.layers is not None:
        names = all_matching(topology, options.layers, "layers")
    names -= excluded | left_dense.keys()
    layers = [layer for name, layer in topology.layers.items() if name in names]
    layers, others = fitting(layers, options.structure, options.strict, list(topology.layers))
    return layers, left_dense | others


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


def vector_shapes(topology: Topology) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's parameters that are no layers, by the names of masks."""
    known = {layer.parameter for layer in topology.layers.values()}
    parameters = topology.model.named_parameters()
    return {layer_name(name): tuple(x.shape) for name, x in parameters if name not in known}


def checked_masks(topology: Topology, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Checks that the masks of an earlier pruning fit the model's layers."""
    if masks is not None and not isinstance(masks, Mapping):
        raise LapTypeError(
            "{argument} to be a mapping of layer name -> bool tensor",
            type(masks).__name__,
            argument="masks",
        )
    given = dict(masks or {})
    vectors = vector_shapes(topology)
    for name, mask in given.items():
        if name in vectors:  # of units across layers
            check.mask_like(f"masks[{name!r}]", str(mask.dtype), tuple(mask.shape), "parameter",
                            vectors[name])  # fmt: skip
            continue
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
