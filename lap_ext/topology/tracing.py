# SPDX-License-Identifier: MIT
"""trace: a model and example inputs to its Topology."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import lap_ext.topology.rules  # noqa: F401 (registers the rules)
from lap_ext._text import did_you_mean, layer_name
from lap_ext.errors import TopologyError
from lap_ext.topology.export import export, first_names, named_tensors, placeholders
from lap_ext.topology.graph import Graph
from lap_ext.topology.static import Static
from lap_ext.topology.topology import Topology
from lap_ext.topology.tracer import Tracer
from lap_ext.topology.value import Value, WeightView, meta_like, plain


def trace(
    model: nn.Module,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    neighbors: Mapping[str, Any] | None = None,
    unknown: str = "error",
) -> Topology:
    """Finds, for every weight of a model, which channels of which layers feed it and read it.

    Channels are followed through the graph of torch.export (no computation, nothing is changed),
    not through the order of the modules: sums, concatenations, splits, flatten, gates, norms,
    attention. One hop: the neighbors of a layer are the next weighted layers on the way. Several
    producers or consumers of a channel add as sums of squares.

    Nonlinear operations are linearized: activations have gain 1, a product is d(ab) = da + db.
    Where data selects (a maximum, top-k, sort, gather or index over channels, the experts of a
    token), every candidate counts as selected; a constant mask, index or matrix counts as it is.
    The weights that a softmax over positions gives end there, and queries and keys are each other's
    neighbors. A layer over positions (a token mixer) meets every channel at both ends, and all of
    them count: one factor for the whole layer, larger than those of layers over channels in a
    global ranking.

    Args:
        model: any module that torch.export can follow; it is traced in evaluation mode.
        example_inputs: a tensor, or a tuple of the positional arguments. Small ones will do.
        kwargs: named arguments of the model's forward.
        neighbors: layer name -> (previous, next) as `lap_ext.score` takes them, with layer names
            also allowed for weights: they replace what the trace finds, and an operation that only
            such layers feed is no error.
        unknown: what to do at an operation that is not understood. "error" raises; "stop" counts it
            as a boundary (factor 1 on both sides) and lists it in a warning.

    Returns:
        The topology: `.layers[name]` with `.prev` and `.next`; print it for a table.

    Raises:
        TopologyError: an operation is not understood, or torch.export cannot follow the model.
        TypeError: model is not a module.
        ValueError: unknown or neighbors are not as above.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> topology = lap_ext.trace(net, torch.randn(1, 4))
        >>> [edge.name for edge in topology.layers["0"].next]
        ['2']
    """
    if unknown not in ("error", "stop"):
        raise ValueError(f'trace: expected unknown="error" or "stop", got {unknown!r}.')
    program = export(model, example_inputs, kwargs)
    tracer = Tracer(named_tensors(model), first_names(model), unknown, set(neighbors or {}))
    inputs = [
        _bound(tracer, kind, name, constant, node.meta.get("val"))
        for (kind, name, constant), node in zip(
            placeholders(program),
            (n for n in program.graph.nodes if n.op == "placeholder"),
            strict=True,
        )
    ]
    outputs = tracer.run(program.graph_module, inputs)
    for value in _tensors(outputs):
        tracer.end(value, "output")
    graph = Graph(tracer.channels, tracer.roles, tracer.couplings, tracer.ends)
    topology = Topology(model, graph, neighbors or {}, tracer.stops)
    _check_neighbors(topology, tracer.skipped)
    if topology.stops:
        warnings.warn("\n".join(topology.stops), stacklevel=2)
    return topology


def _check_neighbors(topology: Topology, skipped: list[int]) -> None:
    """Raises unless the user's neighbors name layers and cover all that read what was skipped.

    skipped: places of the spaces behind operations that only the user's layers feed.
    """
    for name, given in topology.neighbors.items():
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise ValueError(
                f"trace: expected neighbors[{name!r}] to be (previous, next), got "
                f"{type(given).__name__}."
            )
        names = [name, *(x for side in given for x in _names(side))]
        for wrong in (x for x in names if x not in topology.layers):
            hint = did_you_mean(layer_name(wrong), topology.layers)
            text = f"trace: expected neighbors to name layers of the model, got {wrong!r}. {hint}"
            raise ValueError(text.rstrip())
    for place in skipped:
        for role in topology.graph.read_by(place):
            if role.layer not in topology.neighbors:
                space = topology.graph.channels.spaces[place]
                raise TopologyError(
                    f"trace: layer {role.layer!r} reads what {space.name} has made, which lap_ext "
                    f"cannot follow. Pass neighbors={{{role.layer!r}: (previous, next), ...}} for "
                    "it too."
                )


def _names(side: Any) -> list[str]:
    """Layer names among the neighbors on one side."""
    if isinstance(side, str):
        return [side]
    return [x for item in side for x in _names(item)] if isinstance(side, (list, tuple)) else []


def _bound(tracer: Tracer, kind: str, name: str, constant: Any, fake: Any) -> Any:
    """What is known of an input of the graph."""
    if not isinstance(fake, Tensor):
        return constant if constant is not None else fake
    shape = tuple(map(int, fake.shape))
    if kind == "parameter":
        name = tracer.first[name]
        view = WeightView(name, meta_like(fake))
        return Value(shape, plain(shape).labels, Static(True, name), view)
    if kind == "buffer":
        return plain(shape, Static(False, name))
    if kind == "constant":
        return plain(shape, Static(tensor=constant))
    if not fake.is_floating_point():
        return plain(shape)
    width = shape[1] if len(shape) == 2 else 1  # of [batch, features] it is known what a channel is
    space = tracer.channels.add(width, "input", name)
    return Value(shape, space.labels.reshape([1, width] if len(shape) == 2 else [1] * len(shape)))


def _tensors(x: Any) -> list[Value]:
    if isinstance(x, Value):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [value for item in x for value in _tensors(item)] if isinstance(x, (list, tuple)) else []
