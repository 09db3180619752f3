# SPDX-License-Identifier: MIT
"""Follows the channels through every operation of a traced graph, once and in order.

What an operation does to channels is a rule: a function of the tracer and the call, registered by
the names of ATen operations (rules/). This module handles the rest: values that depend on
parameters alone, calls of subgraphs, in-place writes, and operations without a rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from lap_ext.errors import TopologyError
from lap_ext.topology.call import Call, bind, mapped, module_path, operation_name
from lap_ext.topology.channels import Channels
from lap_ext.topology.export import INLINED
from lap_ext.topology.roles import Role
from lap_ext.topology.static import Static
from lap_ext.topology.value import Value, WeightView, plain

# Operations after which a weight is still the same view of its parameter.
_SAME = {"to", "_to_copy", "contiguous", "clone", "detach", "alias"}
_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t",
          "numpy_T", "mT", "unsqueeze", "squeeze", "select", "slice", "narrow", "split", "chunk",
          "split_with_sizes", "unbind", "swapaxes", "movedim", "expand"}  # fmt: skip
# Operations that may have a weight among their arguments.
_WEIGHTED = {"linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "embedding", "embedding_bag",
             "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d",
             "conv_transpose2d", "conv_transpose3d", "einsum", "lstm", "gru", "rnn_tanh",
             "rnn_relu", "_grouped_mm", "grouped_mm", "grouped_mm_fallback", "bilinear",
             "mv", "tensordot"}  # fmt: skip


class Tracer:
    """The state of one trace: channels, roles, couplings and ends."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        first: Mapping[str, str],
        on_unsupported: str,
        known: set[str],
    ) -> None:
        self.tensors = tensors
        self.first = first  # any name of a parameter -> its first one
        self.on_unsupported = on_unsupported
        self.known = known  # layers whose neighbors the user gives
        self.channels = Channels()
        self.roles: list[Role] = []
        self.couplings: list[tuple[Tensor, Tensor]] = []  # channels that are each other's neighbors
        self.ends: list[tuple[Tensor, str]] = []  # channels that leave: outputs and boundaries
        self.stops: list[str] = []  # operations at which the trace stopped, a sentence each
        self.routes: dict[int, Any] = {}  # index of a routed group -> what picked its experts
        self.choices: dict[int, tuple[Tensor, int]] = {}  # group of a top-k -> its input's ids, dim
        self.skipped: list[int] = []  # groups after operations that only the user's layers feed

    def run(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        """Returns the results of a graph for what is known of its placeholders."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        result: Any = None
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self._attribute(module, str(node.target))
            elif node.op == "output":
                result = mapped(node.args[0], lambda x: values[x] if isinstance(x, fx.Node) else x)
            else:
                values[node] = self._call(node, values)
        return result

    def _attribute(self, module: fx.GraphModule, name: str) -> Any:
        attribute: Any = operator.attrgetter(name)(module)
        if isinstance(attribute, Tensor):
            return plain(tuple(attribute.shape), Static(tensor=attribute.detach()))
        return attribute

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        def known(x: Any) -> Any:
            return values[x] if isinstance(x, fx.Node) else x

        args, kwargs = mapped(node.args, known), mapped(dict(node.kwargs), known)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if operation_name(node) in INLINED:
            body = next(x for x in args if isinstance(x, fx.GraphModule))
            rest = args[args.index(body) + 1 :]
            return self.run(body, [x for x in rest if isinstance(x, Value)])
        call = bind(node, args, kwargs)
        try:
            result = self._result(call)
        except GuardOnDataDependentSymNode:
            sources = [x.ids.flatten() for x in call.values]
            raise _unknown_sizes(call, self.layers_of(torch.cat(sources))) from None
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            written = node.kwargs.get("out", node.args[0])
            if isinstance(written, fx.Node):
                values[written] = result  # later readers see what was written
        return result

    def _result(self, call: Call) -> Any:
        tensors = call.values
        outcome = call.node.meta.get("val")
        if not isinstance(outcome, (Tensor, list, tuple)):
            return outcome  # an assertion, a size
        weighted = call.name in _WEIGHTED and any(x.view is not None for x in tensors)
        if not weighted and all(x.static is not None for x in tensors):
            return self._static(call)
        routed = next((x for x in tensors if x.view is not None and x.view.routed), None)
        if routed is not None and not weighted:
            return routed if call.name in _SAME else self.unknown(call)
        function = _RULES.get(call.name)
        return self.unknown(call) if function is None else function(self, call)

    def _static(self, call: Call) -> Any:
        """Keeps an operation on parameters, buffers and constants alone as an expression."""
        args, kwargs = mapped((call.args, call.kwargs), _to_static)
        trainable = any(x.static is not None and x.static.trainable for x in call.values)
        expression = Static(trainable, None, None, call.target, args, tuple(kwargs.items()))
        views = self._views(call)
        if isinstance(call.node.meta["val"], Tensor):
            view = views[0] if views else None
            return Value(call.shape, plain(call.shape).ids, expression, view)
        items = []
        for index, size in enumerate(call.shapes):
            item = Static(trainable, None, None, operator.getitem, (expression, index))
            view = views[index] if views else None
            items.append(Value(size, plain(size).ids, item, view))
        return items

    def _views(self, call: Call) -> list[WeightView] | None:
        source = next((x.view for x in call.values), None)
        if source is None or len(call.values) != 1:
            return None
        if call.name in _SAME:
            return [source]
        if call.name not in _VIEWS:
            return None

        args = mapped(call.args, lambda x: source.meta if isinstance(x, Value) else x)
        try:
            moved = call.target(*args, **call.kwargs)
        except RuntimeError:  # the view would need a copy
            return None
        parts = moved if isinstance(moved, (list, tuple)) else [moved]
        return [WeightView(source.parameter, part) for part in parts]

    def full_shape(self, parameter: str) -> tuple[int, ...]:
        """Returns the shape of a parameter."""
        return tuple(self.tensors[parameter].shape)

    def constant(self, value: Value) -> Tensor | None:
        """Returns a constant; None: it depends on inputs or parameters, or is a meta tensor."""
        if value.static is None or value.static.trainable:
            return None
        constant: Tensor = value.static.value(self.tensors, {})
        return None if constant.is_meta else constant.to("cpu")

    def end(self, value: Value, name: str) -> None:
        """Notes that the channels of a value leave the network here: factor 1."""
        ids = torch.unique(value.ids)
        if bool((ids != 0).any()):
            self.ends.append((ids[ids != 0], name))

    def unknown(self, call: Call) -> Any:
        """Handles an operation that is not understood: raises, or makes it a boundary.

        It is a boundary with on_unsupported="cut", and where the user gives the neighbors of all
        layers that feed it.
        """
        sources = [x for x in call.values if x.has_channels]
        if not sources and not any(_is_weight(x) for x in call.values):
            return _each(call, [plain(shape) for shape in call.shapes])
        ids = [x.ids.flatten() for x in sources] or [torch.zeros(1, dtype=torch.int64)]
        feeding = self.layers_of(torch.cat(ids))
        neighbors_given = bool(feeding) and set(feeding) <= self.known
        if not neighbors_given:
            computed = call.name in _WEIGHTED and any(_is_computed(x) for x in call.values)
            error = _computed_weight(call) if computed else _unsupported(call, feeding)
            if self.on_unsupported != "cut":
                raise error
            self.stops.append(
                f"expected {error.expected}, got {error.got}: it counts as a boundary (factor 1)."
            )
        for x in sources:
            self.end(x, call.name)
        group = self.channels.add(1, "boundary", call.name)
        if neighbors_given:
            self.skipped.append(len(self.channels.groups) - 1)
        results = [
            Value(shape, group.ids.reshape([1] * len(shape)), trail=(call.name,))
            for shape in call.shapes
        ]
        return _each(call, results)

    def layers_of(self, ids: Tensor) -> list[str]:
        """Lists the layers that these channels come from, in order."""
        seen: set[int] = set()
        names: set[str] = set()
        queue = self._group_indices(ids)
        while queue:
            index = queue.pop()
            if index in seen:
                continue
            seen.add(index)
            group = self.channels.groups[index]
            if group.kind == "role":
                names.add(group.name)
            for edges in group.edges:
                queue += self._group_indices(edges.parent)
        order = list(dict.fromkeys(role.layer for role in self.roles))
        return [name for name in order if name in names]

    def _group_indices(self, ids: Tensor) -> list[int]:
        """Lists the indices of the groups that these channels belong to."""
        return [i for i in torch.unique(self.channels.group_index(ids)).tolist() if i >= 0]


Result: TypeAlias = Value | list[Any] | None
Rule: TypeAlias = Callable[[Tracer, Call], Result]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of ATen operations, for all of their overloads."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in _RULES, name
            _RULES[name] = function
        return function

    return register


def _unsupported(call: Call, feeding: list[str]) -> TopologyError:
    """The error for an operation that is not understood."""
    neighbors = ""
    if feeding:
        around = f"{{{feeding[0]!r}: (previous, next), ...}}"
        neighbors = f"{{neighbors={around}}} for the layers around it, or "
    return TopologyError(
        "operations that lap_ext can follow",
        f"{_described(call)}, fed by {_listed(feeding)}",
        f'Pass {neighbors}{{on_unsupported="cut"}} to count it as a boundary (factor 1).',
    )


def _unknown_sizes(call: Call, feeding: list[str]) -> TopologyError:
    """The error for a result whose number of elements depends on the data."""
    return TopologyError(
        "sizes that do not depend on the values of the inputs",
        f"{_described(call)}, fed by {_listed(feeding)}, whose result has as many elements as the "
        "data selects",
        "Use a mask instead of a selection.",
    )


def _computed_weight(call: Call) -> TopologyError:
    """The error for a layer whose weight is not a parameter but computed from some."""
    return TopologyError(
        f"a weight that is a parameter in {_described(call)}",
        "one that is computed (weight norm, spectral norm, torch.nn.utils.prune)",
        "Make it permanent first: torch.nn.utils.parametrize.remove_parametrizations, "
        "torch.nn.utils.prune.remove.",
    )


def _described(call: Call) -> str:
    path = module_path(call.node)
    return f"{call.operation} in module {path!r}" if path else call.operation


def _listed(feeding: list[str]) -> str:
    """Enumerates the layers that feed an operation."""
    if not feeding:
        return "the model's input"
    if len(feeding) == 1:
        return f"layer {feeding[0]!r}"
    first, last = [repr(name) for name in feeding[:3]], f"{len(feeding) - 3} more"
    if len(feeding) <= 3:
        last = first.pop()
    return f"layers {', '.join(first)} and {last}"


def _is_computed(x: Value) -> bool:
    """Whether x is computed from parameters, and is not a view of one."""
    return x.view is None and x.static is not None and x.static.trainable and len(x.shape) > 1


def _is_weight(x: Value) -> bool:
    """Whether x is, or is computed from, a parameter of two dimensions or more."""
    return x.view.meta.dim() > 1 if x.view is not None else _is_computed(x)


def _each(call: Call, results: list[Value]) -> Any:
    outcome = call.node.meta.get("val")
    return results if isinstance(outcome, (list, tuple)) else results[0]


def _to_static(x: Any) -> Any:
    return x.static if isinstance(x, Value) else x
