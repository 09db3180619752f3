# SPDX-License-Identifier: MIT
"""Defines Topology and Layer, which show a traced model to users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lap_ext.topology import edges, render
from lap_ext.topology.edges import Edge
from lap_ext.topology.export import named_tensors
from lap_ext.topology.graph import Graph
from lap_ext.topology.roles import Role
from lap_ext.topology.walks import Walker


@dataclass(frozen=True, repr=False)
class Layer:
    """One weight of the model and its roles in the network.

    Attributes:
        name: the parameter's name without ".weight".
        parameter: the parameter's full name.
        kind: the kind of its first role: linear, conv2d, conv_transpose2d, embedding, lstm, ...
        shape: the parameter's shape.
        roles: its uses in the network, in order.
        topology: the topology of the model.
    """

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    roles: tuple[Role, ...]
    topology: Topology = field(compare=False)

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, {self.kind} {'x'.join(map(str, self.shape))})"

    @property
    def weight(self) -> Tensor:
        """The model's current parameter."""
        return self.topology.model.get_parameter(self.parameter)

    @property
    def groups(self) -> int:
        """The number of groups in a convolution, or of experts in a batched weight."""
        return self.roles[0].part.groups

    @property
    def prev(self) -> list[Edge]:
        """The edges to what feeds this layer, one per producer and role."""
        return edges.producers(self.topology.walker(), self.roles)

    @property
    def next(self) -> list[Edge]:
        """The edges to what reads this layer, one per consumer and role."""
        return edges.consumers(self.topology.walker(), self.roles)


class Topology:
    """The layer graph of a model, channel by channel, as `trace` returns it; print it for a table.

    Attributes:
        layers: name -> Layer, in the order in which the network uses them.
        model: the model that was traced.
        roles: the uses of all weights, in the order of the network.
        graph: the channels between the layers (see graph.py).
        neighbors: the neighbors that the user gave for some layers.
        others: parameters of two dimensions or more that are not layers (a position embedding that
            is added, a class token, a table of biases); they are never pruned.
        stops: one sentence for each operation at which the trace stopped; empty unless
            on_unsupported="cut".

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(lap_ext.trace(net, torch.ones(1, 4)))
        layer  kind    shape  fed by  read by
        -----  ------  -----  ------  -------
        0      linear  8x4    input   2
        2      linear  2x8    0       output
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        neighbors: Mapping[str, Any],
        stops: Sequence[str],
    ) -> None:
        self.model = model
        self.graph = graph
        self.roles = graph.roles
        self.neighbors = dict(neighbors)
        self.stops = list(stops)
        self.layers: dict[str, Layer] = {}
        tensors = named_tensors(model)
        by_name: dict[str, list[Role]] = {}
        for role in self.roles:
            by_name.setdefault(role.layer, []).append(role)
        for name, roles in by_name.items():
            first = roles[0]
            shape = tuple(tensors[first.parameter].shape)
            self.layers[name] = Layer(name, first.parameter, first.kind, shape, tuple(roles), self)
        known = {layer.parameter for layer in self.layers.values()}
        self.others = [
            name for name, p in model.named_parameters() if p.dim() > 1 and name not in known
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the model's current parameters and buffers by name."""
        return named_tensors(self.model)

    def walker(self) -> Walker:
        """Returns a walker through the graph, with the model's weights as they are now."""
        return Walker(self.graph, self.tensors())

    def __str__(self) -> str:
        return render.table(self._rows(), self.others, self.stops)

    def __repr__(self) -> str:
        return f"Topology({len(self.layers)} layers, {self.graph.channels.size - 1} channels)"

    def _repr_html_(self) -> str:
        return render.html_of(self._rows(), self.others, self.stops)

    def to_dot(self) -> str:
        """Returns the graph in Graphviz's language, with arrows from producers to consumers."""
        return render.dot(self._rows())

    def _rows(self) -> Iterator[render.Row]:
        """Yields what is shown of each layer; its edges are freed before the next one's."""
        walker = self.walker()
        for x in self.layers.values():
            prev, following = (f(walker, x.roles) for f in (edges.producers, edges.consumers))
            yield render.Row(x.name, x.kind, x.shape, prev, following)
