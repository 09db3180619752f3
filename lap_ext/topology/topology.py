# SPDX-License-Identifier: MIT
"""Defines Topology and Layer, which show a traced model to users."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from lap_ext._text import did_you_mean
from lap_ext.computed import is_computed, sources, value_of
from lap_ext.errors import LapValueError, calling
from lap_ext.options import one_of
from lap_ext.structures import KINDS, Coupled, Kind
from lap_ext.topology import edges, render
from lap_ext.topology.accepted import unwrapped
from lap_ext.topology.coupling import CoupledGroups, explained, groups_of
from lap_ext.topology.coupling.subject import Subject
from lap_ext.topology.edges import Edge
from lap_ext.topology.effective import same
from lap_ext.topology.export import first_names, named_tensors
from lap_ext.topology.graph import Graph
from lap_ext.topology.model_structure import structure_of
from lap_ext.topology.roles import Role
from lap_ext.topology.static import Static, names_of
from lap_ext.topology.value import Computation
from lap_ext.topology.walks import Walker

# How pruned weights become zero: "zeros", the parameter is zero there; "mask", a mask multiplies
# what the module computes; "nothing", a forward computes the weight where no mask can reach it.
PrunedBy: TypeAlias = Literal["zeros", "mask", "nothing"]


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
        values: what `weight` is where the model does not hold it; None for the model's.
    """

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    roles: tuple[Role, ...]
    topology: Topology = field(compare=False)
    values: Tensor | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, {self.kind} {'x'.join(map(str, self.shape))})"

    @property
    def weight(self) -> Tensor:
        """The model's current parameter, or what a parametrization makes of it."""
        if self.values is not None:
            return self.values
        return value_of(self.topology.model, self.parameter)

    @property
    def effective(self) -> Tensor:
        """The weight that the operations use, detached: what is computed from the parameter."""
        computation = self._computation
        if computation is None or self.values is not None:
            return self.weight.detach()
        return self._value(computation.value)

    @property
    def alive(self) -> Tensor | None:
        """The weights, True in a bool tensor, that a mask in the model leaves; None without one."""
        computation = self._computation
        if computation is None or not computation.alive:
            return None
        first, *more = map(self._value, computation.alive)
        for mask in more:
            first = first & mask
        return first

    @property
    def computed(self) -> bool:
        """Whether operations use something that the model computes, not a parameter as it is."""
        made = any(role.computation is not None for role in self.roles)
        return made or self.pruned_by == "mask"

    @property
    def pruned_by(self) -> PrunedBy:
        """How a mask makes weights zero: see `PrunedBy`."""
        computation = self._computation
        if computation is not None and not computation.factor:
            return "nothing"
        path, _, attribute = self.parameter.rpartition(".")
        module = self.topology.model.get_submodule(path)
        return "mask" if is_computed(module, attribute) else "zeros"

    @property
    def computed_by(self) -> str:
        """The operation in a forward that makes it impossible to prune this weight; or empty."""
        return "" if self._computation is None else self._computation.operation

    @property
    def _computation(self) -> Computation | None:
        """How its uses compute their weight; where they differ, only whether they can be pruned."""
        first, *more = (role.computation for role in self.roles)
        values = [Static(True, self.parameter) if x is None else x.value for x in (first, *more)]
        if all(same(values[0], x) for x in values):
            return first
        given = [x for x in (first, *more) if x is not None]
        operation = next((x.operation for x in given if not x.factor), "")
        return Computation(Static(True, self.parameter), not operation, (), operation)

    def _value(self, expression: Static) -> Tensor:
        """Computes a value from the model's current tensors."""
        model = self.topology.model
        tensors = {name: value_of(model, name) for name in names_of(expression)}
        result: Tensor = expression.value(tensors, {})
        return result

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

    A copy or a pickle has a copy of the model with it: copy.deepcopy((model, topology)) gives the
    topology of the copied model.

    Attributes:
        layers: name -> Layer, in the order in which the network uses them.
        model: the model that was traced.
        roles: the uses of all weights, in the order of the network.
        graph: the channels between the layers (see graph.py).
        neighbors: the neighbors that the user gave for some layers.
        others: parameters of two dimensions or more that are not layers (a position embedding that
            is added, a class token, a table of biases); they are never pruned.
        unreached: those of them that the example inputs do not reach, because the model took a path
            on which nothing reads them; trace with inputs for all branches to prune them too.
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

        A model with two branches, traced with an input for one of them:

        >>> class Towers(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.text, self.image = torch.nn.Linear(4, 2), torch.nn.Linear(6, 2)
        ...     def forward(self, text, image=None):
        ...         return self.text(text) if image is None else self.text(text) + self.image(image)
        >>> lap_ext.trace(Towers(), torch.ones(1, 4)).unreached
        ('image.weight',)
        >>> lap_ext.trace(Towers(), (torch.ones(1, 4), torch.ones(1, 6))).unreached
        ()
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        neighbors: Mapping[str, Any],
        stops: Sequence[str],
        constants: Mapping[str, Tensor],
        unreached: Sequence[str],
    ) -> None:
        self.model = model
        self._structure = replace(structure_of(model, constants), constants=constants)
        self.graph = graph
        self.roles = graph.roles
        self.neighbors = dict(neighbors)
        self.stops = list(stops)
        self.unreached = tuple(unreached)
        self._tensors: Mapping[str, Tensor] | None = None
        self.layers: dict[str, Layer] = {}
        tensors, computed_from = named_tensors(model), sources(model)
        by_name: dict[str, list[Role]] = {}
        for role in self.roles:
            by_name.setdefault(role.layer, []).append(role)
        for name, roles in by_name.items():
            first = roles[0]
            shape = tuple(tensors[first.parameter].shape)
            self.layers[name] = Layer(name, first.parameter, first.kind, shape, tuple(roles), self)
        known = {layer.parameter for layer in self.layers.values()}
        tied = first_names(model)
        self.others = [
            name
            for name, p in model.named_parameters()
            if p.dim() > 1
            and tied[name] not in known
            and tied[name] == name
            and name not in computed_from
        ]

    @calling("Topology.bind")
    def bind(self, model: nn.Module) -> Topology:
        """Returns this topology for another model of the same structure, without a new trace.

        Copies (copy.deepcopy), models built by the same code, and models on another device or in
        another dtype have the same structure: the same classes of modules with the same attributes
        (stride, groups, heads; not private ones), the same names and shapes of parameters and
        buffers, the same ties, and the same values in buffers that say which channel is which.
        Values of weights may differ. Neighbors that were given as tensors stay these tensors.

        `prune`, `scores` and `Pruner` bind the topology that they are given; so they also notice a
        model that has changed since it was traced. In the traced model itself, attributes of your
        own classes may change, since they may be counts of steps.

        Args:
            model: a module, or one wrapped by torch.compile, DataParallel or
                DistributedDataParallel.

        Returns:
            A topology with `.model` and all weights those of model; this one if it is its model.

        Raises:
            TypeError: model is not a module.
            ValueError: the structure differs; the message names the first difference.

        Example:
            >>> import copy, torch, lap_ext
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> topology = lap_ext.trace(net, torch.ones(1, 4))
            >>> for sparsity in (0.5, 0.75):
            ...     pruned = copy.deepcopy(net).double()
            ...     print(lap_ext.prune(pruned, None, sparsity, topology=topology).kept)
            24
            12
            >>> topology.bind(pruned).layers["0"].weight is pruned[0].weight
            True
        """
        model = unwrapped(model)
        difference = self._structure.difference(model, same_model=model is self.model)
        if difference:
            raise LapValueError(
                "a topology traced from this model, as it is now, or from one of the same structure"
                " ({argument})",
                f"another structure: {difference}",
                "Trace this model: pass example_inputs, or the result of lap_ext.trace.",
                argument="topology",
            )
        if model is self.model:
            return self
        return self._copied(model, None)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Topology:
        """Returns this topology with given tensors in place of the model's, which has no values."""
        return self._copied(self.model, dict(tensors))

    def _copied(self, model: nn.Module, tensors: Mapping[str, Tensor] | None) -> Topology:
        other = copy.copy(self)
        other.model, other._tensors = model, tensors
        other.layers = {name: replace(x, topology=other) for name, x in self.layers.items()}
        return other

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensors by name that scales of channels are computed from.

        They are the model's current parameters, buffers and computed tensors, or given ones.
        """
        return named_tensors(self.model) if self._tensors is None else self._tensors

    def walker(self) -> Walker:
        """Returns a walker through the graph, with the model's weights as they are now."""
        return Walker(self.graph, self.tensors())

    @calling("Topology.groups")
    def groups(self, structure: Kind | Coupled = "channel") -> CoupledGroups:
        """Finds what can only be removed together; see `lap_ext.structures.groups`."""
        kind = structure.kind if isinstance(structure, Coupled) else structure
        one_of("structure", kind, KINDS)
        layers = {x.name: (x.parameter, x.kind) for x in self.layers.values()}
        shapes = {name: tuple(x.shape) for name, x in named_tensors(self.model).items()}
        return groups_of(Subject(self.graph, layers, shapes, self.model), kind)

    @calling("Topology.explain")
    def explain(self, layer: str, structure: Kind | Coupled = "channel") -> str:
        """Says what goes with the output channels of a layer, and which cannot go and why.

        Args:
            layer: its name.
            structure: as in `lap_ext.structures.groups`.

        Raises:
            ValueError: there is no such layer or structure.

        Example:
            >>> import torch, lap_ext
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 3))
            >>> topology = lap_ext.trace(net, torch.ones(1, 4))
            >>> print(topology.explain("0"))
            0: 2 output channels
              2 can be removed, each with
                1 row of 0.weight
                1 column of 1.weight
                1 entry of 0.bias
            >>> print(topology.explain("1"))
            1: 3 output channels
              3 cannot be removed: an output of the model
        """
        if layer not in self.layers:
            hint = did_you_mean(layer, self.layers)
            raise LapValueError("the name of a layer of the model", repr(layer), hint)
        return explained(self.groups(structure), layer)

    def __str__(self) -> str:
        return render.table(self._rows(), self._notes())

    def __repr__(self) -> str:
        return f"Topology({len(self.layers)} layers, {self.graph.channels.size - 1} channels)"

    def _repr_html_(self) -> str:
        return render.html_of(self._rows(), self._notes())

    def to_dot(self) -> str:
        """Returns the graph in Graphviz's language, with arrows from producers to consumers."""
        return render.dot(self._rows())

    def _notes(self) -> list[str]:
        """Lists what the table does not show, a line each."""
        never = [name for name in self.others if name not in self.unreached]
        notes = [f"no layers, never pruned: {', '.join(never)}"] if never else []
        if self.unreached:
            names = ", ".join(self.unreached)
            notes.append(f"not reached by the example inputs, never pruned: {names}")
        return [*notes, *(f"stopped at: {text}" for text in self.stops)]

    def _rows(self) -> Iterator[render.Row]:
        """Yields what is shown of each layer; its edges are freed before the next one's."""
        walker = self.walker()
        for x in self.layers.values():
            prev, following = (f(walker, x.roles) for f in (edges.producers, edges.consumers))
            yield render.Row(x.name, x.kind, x.shape, prev, following)
