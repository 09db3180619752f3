# SPDX-License-Identifier: MIT
"""Walks a traced graph once, in order, and follows the channels through every operation.

What an operation does to channels is a rule: a function of the tracer and the call, registered
here by the names of ATen operations (rules/). Here: values that depend on parameters alone, calls
into sub-graphs, writes in place, and what happens where a rule is missing.
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

# Operations after which a weight is still the weight: its view goes on, unchanged.
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
    """The state of one trace: channels, roles, and what ends or meets where."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        first: Mapping[str, str],
        unknown: str,
        known: set[str],
    ) -> None:
        self.tensors = tensors
        self.first = first  # any name of a parameter -> its first one
        self.policy = unknown  # "error" or "stop"
        self.known = known  # layers whose neighbors the user names
        self.channels = Channels()
        self.roles: list[Role] = []
        self.couplings: list[tuple[Tensor, Tensor]] = []  # channels that are each other's neighbors
        self.ends: list[tuple[Tensor, str]] = []  # channels that leave: outputs and boundaries
        self.stops: list[str] = []  # operations where the trace stopped, in words
        self.routes: dict[int, Any] = {}  # space of routed channels -> what picked their experts
        self.choices: dict[int, tuple[Tensor, int]] = {}  # space of a top-k -> from what, which dim
        self.skipped: list[int] = []  # spaces behind operations that only the user's layers feed

    def run(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        """The results of a graph for what is known of its placeholders."""
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
        found: Any = operator.attrgetter(name)(module)
        if isinstance(found, Tensor):
            return plain(tuple(found.shape), Static(tensor=found.detach()))
        return found

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
            sources = [x.labels.flatten() for x in call.values]
            raise TopologyError(_describe_sizes(call, self.layers_of(torch.cat(sources)))) from None
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
        found = _RULES.get(call.name)
        return self.unknown(call) if found is None else found(self, call)

    def _static(self, call: Call) -> Any:
        """An operation on parameters, buffers and constants alone: kept as an expression."""
        args, kwargs = mapped((call.args, call.kwargs), _to_static)
        trainable = any(x.static is not None and x.static.trainable for x in call.values)
        made = Static(trainable, None, None, call.target, args, tuple(kwargs.items()))
        views = self._views(call)
        if isinstance(call.node.meta["val"], Tensor):
            view = views[0] if views else None
            return Value(call.shape, plain(call.shape).labels, made, view)
        items = []
        for place, size in enumerate(call.shapes):
            item = Static(trainable, None, None, operator.getitem, (made, place))
            view = views[place] if views else None
            items.append(Value(size, plain(size).labels, item, view))
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
        """The shape of a parameter."""
        return tuple(self.tensors[parameter].shape)

    def constant(self, value: Value) -> Tensor | None:
        """What a tensor always is; None: it depends on inputs or parameters, or has no values."""
        if value.static is None or value.static.trainable:
            return None
        found: Tensor = value.static.value(self.tensors, {})
        return None if found.is_meta else found.to("cpu")

    def end(self, value: Value, name: str) -> None:
        """The channels of a value leave the network here: factor 1."""
        labels = torch.unique(value.labels)
        if bool((labels != 0).any()):
            self.ends.append((labels[labels != 0], name))

    def unknown(self, call: Call) -> Any:
        """An operation that is not understood: an error, or a boundary where the user said so."""
        sources = [x for x in call.values if x.has_channels]
        if not sources and not any(_is_weight(x) for x in call.values):
            return _each(call, [plain(shape) for shape in call.shapes])
        labels = [x.labels.flatten() for x in sources] or [torch.zeros(1, dtype=torch.int64)]
        feeding = self.layers_of(torch.cat(labels))
        asked = bool(feeding) and set(feeding) <= self.known
        computed = call.name in _WEIGHTED and any(_is_computed(x) for x in call.values)
        text = _describe_weight(call) if computed else _describe(call, feeding)
        if self.policy != "stop" and not asked:
            raise TopologyError(text)
        if not asked:
            self.stops.append(text)
        for x in sources:
            self.end(x, call.name)
        space = self.channels.add(1, "boundary", call.name)
        if asked:
            self.skipped.append(len(self.channels.spaces) - 1)
        results = []
        for shape in call.shapes:
            made = space.labels.reshape([1] * len(shape))
            results.append(Value(shape, made, trail=(call.name,)))
        return _each(call, results)

    def layers_of(self, labels: Tensor) -> list[str]:
        """The layers that these channels come from, in order."""
        seen: set[int] = set()
        queue = [
            place for place in torch.unique(self.channels.place(labels)).tolist() if place >= 0
        ]
        names: set[str] = set()
        while queue:
            place = queue.pop()
            if place in seen:
                continue
            seen.add(place)
            space = self.channels.spaces[place]
            if space.kind == "role":
                names.add(space.name)
            for arcs in space.arcs:
                places = torch.unique(self.channels.place(arcs.parent)).tolist()
                queue += [p for p in places if p >= 0]
        order = list(dict.fromkeys(role.layer for role in self.roles))
        return [name for name in order if name in names]


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


def _describe(call: Call, feeding: list[str]) -> str:
    """The error for an operation that is not understood."""
    verb = "feed" if len(feeding) > 1 else "feeds"
    around = ""
    if feeding:
        around = (
            f"neighbors={{{feeding[0]!r}: (previous, next), ...}} for the layers around it, or "
        )
    return (
        f"trace: {_listed(feeding)} {verb} {call.operation}{_where(call)}, which lap_ext cannot "
        f'follow. Pass {around}unknown="stop" to count it as a boundary (factor 1).'
    )


def _describe_sizes(call: Call, feeding: list[str]) -> str:
    """The error for a result that has as many elements as the data says."""
    of = f" of what {_listed(feeding)} made" if feeding else ""
    return (
        "trace: expected sizes that do not depend on the values of the inputs, got "
        f"{call.operation}{of}{_where(call)}, whose result has as many elements as the data says. "
        "Use a mask in place of a selection."
    )


def _listed(feeding: list[str]) -> str:
    shown = ", ".join(repr(name) for name in feeding[:3]) + (", ..." if len(feeding) > 3 else "")
    return f"layer{'s' if len(feeding) > 1 else ''} {shown}" if feeding else "the model's input"


def _describe_weight(call: Call) -> str:
    """The error for a layer whose weight is not a parameter but computed from some."""
    return (
        f"trace: expected a weight that is a parameter in {call.operation}{_where(call)}, got one "
        "that is computed (weight norm, spectral norm, torch.nn.utils.prune). Make it permanent "
        "first: torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove."
    )


def _where(call: Call) -> str:
    path = module_path(call.node)
    return f" in module '{path}'" if path else ""


def _is_computed(x: Value) -> bool:
    """Whether x is made of parameters, and not as a view of one."""
    return x.view is None and x.static is not None and x.static.trainable and len(x.shape) > 1


def _is_weight(x: Value) -> bool:
    """Whether x is, or is made of, a parameter of two dimensions or more."""
    return x.view.meta.dim() > 1 if x.view is not None else _is_computed(x)


def _each(call: Call, results: list[Value]) -> Any:
    found = call.node.meta.get("val")
    return results if isinstance(found, (list, tuple)) else results[0]


def _to_static(x: Any) -> Any:
    return x.static if isinstance(x, Value) else x
