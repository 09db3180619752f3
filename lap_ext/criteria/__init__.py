# SPDX-License-Identifier: MIT
"""Lists and registers the criteria; a criterion defines a pruning algorithm by its score alone.

    score = |w| * in[i] * out[o], summed in squares over the roles of the weight

Each class defines w, in and out. Separate modules compute them: lookahead norms, statistics of
activations, gradients. A criterion of your own is a function that takes a layer and returns scores
with the shape of its weight; the weights with larger scores are kept first. Those in units.py score
no weights, but whole units across layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor, nn

from lap_ext._text import did_you_mean
from lap_ext.criteria.base import Criterion as Criterion
from lap_ext.criteria.base import Norms as Norms
from lap_ext.criteria.context import check_finite
from lap_ext.criteria.data import OBD as OBD
from lap_ext.criteria.data import DataCriterion as DataCriterion
from lap_ext.criteria.data import LookaheadAct as LookaheadAct
from lap_ext.criteria.data import OBDLookahead as OBDLookahead
from lap_ext.criteria.data import Wanda as Wanda
from lap_ext.criteria.data import WeightGradient as WeightGradient
from lap_ext.criteria.units import REAP as REAP
from lap_ext.criteria.units import Minitron as Minitron
from lap_ext.criteria.units import UnitCriterion as UnitCriterion
from lap_ext.criteria.weights import Custom as Custom
from lap_ext.criteria.weights import Lookahead as Lookahead
from lap_ext.criteria.weights import Lookback as Lookback
from lap_ext.criteria.weights import Lookforward as Lookforward
from lap_ext.criteria.weights import MagnitudeBN as MagnitudeBN
from lap_ext.criteria.weights import Random as Random
from lap_ext.errors import LapTypeError, LapValueError, callback, calling
from lap_ext.options import Inputs
from lap_ext.topology import Layer, Topology, trace

Name: TypeAlias = Literal[
    "lookahead",
    "lookforward",
    "lookback",
    "magnitude",
    "magnitude_bn",
    "random",
    "lookahead_act",
    "wanda",
    "weight_gradient",
    "obd",
    "obd_lookahead",
    "minitron",
    "reap",
]
# A name (one of the above or a registered one), an instance, or a function of a layer.
CriterionLike: TypeAlias = Name | str | Criterion | Callable[[Layer], Tensor]

REGISTRY: dict[str, Callable[[], Criterion]] = {
    kind.name: kind
    for kind in (
        Criterion,
        MagnitudeBN,
        Random,
        Lookahead,
        Lookforward,
        Lookback,
        LookaheadAct,
        Wanda,
        WeightGradient,
        OBD,
        OBDLookahead,
        Minitron,
        REAP,
    )
}


Registered = TypeVar("Registered", bound=type[Criterion] | Callable[[Layer], Tensor])


def register(name: str) -> Callable[[Registered], Registered]:
    """Registers a criterion under a name for every function that has a criterion= option.

    Decorate either a function or a class. A function takes a layer and returns scores with the
    shape of its weight; the weights with larger scores are kept first. A class is derived from
    `Criterion` and can be created without arguments.

    Args:
        name: any name that is not taken yet. The criterion stays registered until the process ends.

    Raises:
        ValueError: the name is taken or empty.
        TypeError: the decorated object is neither a function nor such a class.

    Example:
        >>> import torch, lap_ext
        >>> @lap_ext.criteria.register("squared_weight")
        ... def squares(layer):
        ...     return layer.weight ** 2
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3., -4.]]))
        >>> lap_ext.scores(net, torch.ones(1, 2), criterion="squared_weight")
        {'0': tensor([[ 9., 16.]])}
    """
    with calling("criteria.register"):
        _check_new(name)

    @calling("criteria.register")
    def add(target: Registered) -> Registered:
        _check_new(name)
        if isinstance(target, type) and issubclass(target, Criterion):
            if "name" not in vars(target):
                target.name = name
            REGISTRY[name] = target
        elif callable(target) and not isinstance(target, type):
            kind = type("Custom", (Custom,), {"name": name, "__doc__": Custom.__doc__})
            REGISTRY[name] = partial(kind, target)
        else:
            got = target.__name__ if isinstance(target, type) else type(target).__name__
            raise LapTypeError("a function of a layer, or a class derived from Criterion", got)
        return target

    return add


@calling("criteria.measure")
def measure(
    model: nn.Module,
    example_inputs: Inputs | None,
    criterion: CriterionLike,
    data: Iterable[Any],
    *,
    topology: Topology | None = None,
) -> dict[str, Tensor]:
    """Runs a model on data and returns what a criterion measures, to be saved and used again.

    `prune` and `scores` take a safetensors file of these tensors in place of data, for a model in
    memory and for a checkpoint directory that is larger than memory.

    Args:
        model: as in `lap_ext.prune`.
        example_inputs: as in `lap_ext.prune`.
        criterion: one that reads data: "wanda", "lookahead_act", "weight_gradient", "obd",
            "obd_lookahead", "minitron", "reap", or an instance of one of their classes.
        data: as in `lap_ext.prune`.
        topology: as in `lap_ext.prune`.

    Returns:
        Name -> statistic: "LAYER.mean_square" (wanda), "LAYER.active_fraction" (lookahead_act),
        "LAYER.gradient" (weight_gradient), "LAYER.hessian" (obd, obd_lookahead),
        "LAYER.absolute_mean" (minitron) or "LAYER.reap" (reap). A weight that is used more than
        once has "LAYER.mean_square.1" and so on, too.

    Raises:
        ValueError: the criterion reads no data, or as in `lap_ext.prune`.

    Example:
        >>> import tempfile, pathlib, torch, lap_ext
        >>> from safetensors.torch import save_file
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> data = [torch.tensor([[1., 2.]]), torch.tensor([[3., 2.]])]
        >>> statistics = lap_ext.criteria.measure(net, torch.ones(1, 2), "wanda", data)
        >>> statistics
        {'0.mean_square': tensor([5., 4.], dtype=torch.float64)}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = pathlib.Path(directory) / "statistics.safetensors"
        ...     save_file(statistics, path)
        ...     mask = lap_ext.prune(
        ...         net, torch.ones(1, 2), 0.5, criterion="wanda", data=path, apply=False
        ...     ).masks["0"]
        >>> mask.shape
        torch.Size([1, 2])
    """
    checked = of(criterion)
    if not isinstance(checked, DataCriterion):
        raise LapValueError(
            "{argument} to be one that reads data", repr(checked.name), argument="criterion"
        )
    if topology is None:
        topology = trace(model, example_inputs)
    elif not isinstance(topology, Topology):
        raise LapTypeError(
            "{argument} to be what trace returned", type(topology).__name__, argument="topology"
        )
    elif example_inputs is not None:
        raise LapTypeError("topology alone (the trace has been made)", "example_inputs too")
    topology = topology.bind(model)
    for layer in topology.layers.values():  # else the error would blame the data
        check_finite(layer)
    with callback():
        statistics = checked.measure(topology, data)
    return {name: x.contiguous() for name, x in statistics.items()}


def _check_new(name: object) -> None:
    if not isinstance(name, str) or not name or name in REGISTRY:
        got = f"{name!r}, which is taken" if isinstance(name, str) and name else repr(name)
        raise LapValueError("a {argument} that is not registered yet", got, argument="name")


def of(criterion: CriterionLike) -> Criterion:
    """Looks up a criterion by name, returns an instance unchanged, or wraps a user's function."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        if criterion not in REGISTRY:
            names = ", ".join(sorted(REGISTRY))
            raise LapValueError(
                f"{{argument}} to be one of {names}, a Criterion or a function",
                repr(criterion),
                did_you_mean(criterion, REGISTRY),
                argument="criterion",
            )
        return REGISTRY[criterion]()
    if callable(criterion):
        return Custom(criterion)
    raise LapTypeError(
        "{argument} to be a name, a Criterion or a function of a layer",
        type(criterion).__name__,
        argument="criterion",
    )
