# SPDX-License-Identifier: MIT
"""Provides `trace`, which turns a model and example inputs into a topology."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

import lap_ext.topology.rules  # noqa: F401 (registers the rules)
from lap_ext._text import did_you_mean, layer_name
from lap_ext.computed import sources
from lap_ext.errors import LapTypeError, LapValueError, TopologyError, calling, warn
from lap_ext.options import ON_UNSUPPORTED, Inputs, OnUnsupported, one_of
from lap_ext.topology.accepted import check_traceable, unwrapped
from lap_ext.topology.export import (
    arguments,
    export,
    first_names,
    named_tensors,
    on_device_of,
    placeholders,
)
from lap_ext.topology.graph import Graph
from lap_ext.topology.static import Static
from lap_ext.topology.topology import Topology
from lap_ext.topology.tracer import Tracer
from lap_ext.topology.value import Value, WeightView, meta_like, plain


@calling("trace")
def trace(
    model: nn.Module,
    example_inputs: Inputs | None,
    *,
    neighbors: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "raise",
) -> Topology:
    """Traces which channels of which layers feed each weight of a model, and which read it.

    Channels are followed through the graph of torch.export, not through the order of the modules:
    through sums, concatenations, splits, flatten, gates, norms and attention. Nothing is changed,
    and nothing is computed but weights that modules compute themselves. Neighbors are one hop
    away: the next weighted layers along the path. If a channel has several producers or consumers,
    their squared norms are added.

    Nonlinear operations are linearized: activations have gain 1, and a product counts as the sum of
    its factors, d(ab) = da + db with both factors at 1.
    Where data selects (max, top-k, sort, gather, an index over channels, the experts of a token),
    every candidate counts as selected; a constant mask, index or matrix is applied as it is. A
    softmax over positions gives attention weights: channels end there, and queries and keys are
    each other's neighbors. A layer over positions (a token mixer) is fed by every channel and read
    by every channel, and all of them count. Therefore all weights of such a layer have the same
    neighbor norms, which are larger than those of layers over channels and favor the layer in a
    global ranking.

    The weight of an operation may be computed from parameters and buffers: weight * mask, a gain, a
    standardized weight, torch.nn.utils.prune, parametrizations, weight and spectral norms. Its
    value is what counts; see `Layer.effective` and `Layer.pruned_by`.

    Several threads may trace at once: they take turns. Each needs its own model, whose modules are
    in evaluation mode meanwhile.

    Args:
        model: any module that torch.export can follow; it is traced in evaluation mode.
        example_inputs: inputs of the model's forward: a tensor, a tuple of positional arguments, or
            a dict of named arguments. Small inputs suffice. Pass None if forward takes no
            arguments. They may be on another device than the model.
        neighbors: layer name -> (previous, next) as in `lap_ext.score`, where a layer name may
            stand for its weight. They replace the result of the trace for these layers. An
            operation that is not understood raises no error if all layers that feed it are named
            here.
        on_unsupported: what to do at an operation that is not understood. "raise" raises; "cut"
            counts it as a boundary (norm 1 on both sides) and lists it in a warning.

    Returns:
        The topology: `.layers[name]` with `.prev` and `.next`. Print the topology for a table.

    Raises:
        TopologyError: an operation is not understood, or torch.export cannot follow the model.
        TypeError: model is not a module.
        ValueError: on_unsupported or neighbors are not as described.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> topology = lap_ext.trace(net, torch.randn(1, 4))
        >>> [edge.name for edge in topology.layers["0"].next]
        ['2']
    """
    one_of("on_unsupported", on_unsupported, ON_UNSUPPORTED)
    if isinstance(example_inputs, Topology):
        raise LapTypeError(
            "{argument} to be what the model's forward takes",
            "a Topology",
            "Pass it as {topology=}, where that is a parameter.",
            argument="example_inputs",
        )
    if neighbors is not None and not isinstance(neighbors, Mapping):
        raise LapTypeError(
            "{argument} to be a dict: layer name -> (previous, next)",
            type(neighbors).__name__,
            argument="neighbors",
        )
    model = unwrapped(model)
    check_traceable(model)
    program = export(model, *on_device_of(model, arguments(example_inputs)))
    tracer = Tracer(named_tensors(model), first_names(model), on_unsupported, set(neighbors or {}))
    nodes = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    given = list(zip(placeholders(program), nodes, strict=True))
    widest = max((_rank(x) for (kind, _, _), x in given if kind == "input"), default=0)
    inputs = [_bound(tracer, *named, fake, widest) for named, fake in given]
    outputs = tracer.run(program.graph_module, inputs)
    for value in _tensors(outputs):
        tracer.end(value, "output")
    graph = Graph(tracer.channels, tracer.roles, tracer.couplings, tracer.ends, tracer.facts)
    topology = Topology(
        model, graph, neighbors or {}, tracer.stops, tracer.constants, _unreached(model, program)
    )
    _check_neighbors(topology, tracer.skipped)
    if topology.stops:
        warn("\n".join(topology.stops))
    return topology


def _unreached(model: nn.Module, program: ExportedProgram) -> list[str]:
    """Lists the parameters of two dimensions or more that no operation reads."""
    nodes = (node for node in program.graph.nodes if node.op == "placeholder")
    first, read = first_names(model), set()
    for (kind, name, _), node in zip(placeholders(program), nodes, strict=True):
        if kind == "parameter" and node.users:
            read.add(first[name])
    read |= sources(model)  # of what modules compute
    return [
        name
        for name, p in model.named_parameters()
        if p.dim() > 1 and first[name] == name and name not in read
    ]


def _check_neighbors(topology: Topology, skipped: list[int]) -> None:
    """Raises unless the user's neighbors name layers and cover all that read what was skipped.

    skipped: indices of the channel groups after operations that only the user's layers feed.
    """
    for name, given in topology.neighbors.items():
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise LapValueError(f"neighbors[{name!r}] to be (previous, next)", type(given).__name__)
        names = [name, *(x for side in given for x in _names(side))]
        for wrong in (x for x in names if x not in topology.layers):
            hint = did_you_mean(layer_name(wrong), topology.layers)
            raise LapValueError("neighbors to name layers of the model", repr(wrong), hint)
    for index in skipped:
        for role in topology.graph.read_by(index):
            if role.layer not in topology.neighbors:
                operation = topology.graph.channels.groups[index].name
                raise TopologyError(
                    f"neighbors for layer {role.layer!r} too (it reads the result of {operation}, "
                    "which lap_ext cannot follow)",
                    "none",
                    f"Pass {{neighbors={{{role.layer!r}: (previous, next), ...}}}}.",
                )


def _names(side: Any) -> list[str]:
    """Lists the layer names among the neighbors on one side."""
    if isinstance(side, str):
        return [side]
    return [x for item in side for x in _names(item)] if isinstance(side, (list, tuple)) else []


def _rank(x: Any) -> int:
    """Returns the number of dimensions of an input that has channels; 0 of any other."""
    return x.dim() if isinstance(x, Tensor) and x.is_floating_point() else 0


def _bound(tracer: Tracer, kind: str, name: str, constant: Any, fake: Any, widest: int) -> Any:
    """Returns what is known of an input of the graph; widest: the most dimensions of one.

    One number an example (a timestep, a noise level), beside inputs of more dimensions, is no
    channel: it may as well be an integer.
    """
    if not isinstance(fake, Tensor):
        return constant if constant is not None else fake
    shape = tuple(map(int, fake.shape))
    if kind == "parameter":
        name = tracer.first[name]
        view = WeightView(name, meta_like(fake))
        return Value(shape, plain(shape).ids, Static(True, name), view)
    if kind == "buffer":
        return plain(shape, Static(False, name))
    if kind == "constant":
        return plain(shape, Static(tensor=constant))
    if not fake.is_floating_point() or len(shape) < 2 <= widest:
        return plain(shape)
    width = shape[1] if len(shape) == 2 else 1  # [batch, features]: a column is a channel
    group = tracer.channels.add(width, "input", name)
    return Value(shape, group.ids.reshape([1, width] if len(shape) == 2 else [1] * len(shape)))


def _tensors(x: Any) -> list[Value]:
    if isinstance(x, Value):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [value for item in x for value in _tensors(item)] if isinstance(x, (list, tuple)) else []
