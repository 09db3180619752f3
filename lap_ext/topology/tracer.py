# SPDX-License-Identifier: MIT
"""Follows the channels through every operation of a traced graph, once and in order.

What an operation does to channels is a rule: a function of the tracer and the call, registered by
the names of ATen operations (rules/). This module handles the rest: values that depend on
parameters alone, calls of subgraphs, in-place writes, and operations without a rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from lap_ext._text import some
from lap_ext.errors import TopologyError
from lap_ext.topology import channel_ids
from lap_ext.topology.call import (
    Call,
    bind,
    concrete,
    described,
    mapped,
    operation_name,
    source_line,
)
from lap_ext.topology.channels import ChannelGroup, Channels
from lap_ext.topology.effective import computes_weight, view_of, without_models
from lap_ext.topology.export import INLINED
from lap_ext.topology.facts import Facts
from lap_ext.topology.roles import Role
from lap_ext.topology.static import Static, names_of
from lap_ext.topology.value import Value, WeightView, plain
from lap_ext.topology.work import products_of

# Operations after which a weight is still the same view of its parameter.
_SAME = {"to", "_to_copy", "contiguous", "clone", "detach", "alias"}
_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t",
          "numpy_T", "mT", "unsqueeze", "squeeze", "select", "slice", "narrow", "split", "chunk",
          "split_with_sizes", "unbind", "swapaxes", "movedim", "expand"}  # fmt: skip
# Operations that may have a weight among their arguments.
WEIGHTED = {"linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "embedding", "embedding_bag",
             "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d",
             "conv_transpose2d", "conv_transpose3d", "einsum", "lstm", "gru", "rnn_tanh",
             "rnn_relu", "_grouped_mm", "grouped_mm", "grouped_mm_fallback", "bilinear",
             "mv", "tensordot", "lstm_cell", "gru_cell", "rnn_tanh_cell",
             "rnn_relu_cell"}  # fmt: skip


# Operations that may have pairs of channels, real and imaginary parts, among their arguments.
_PAIRED = {*_SAME, *_VIEWS, "view_as_real", "real", "imag", "mul", "_conj", "resolve_conj", "cat",
           "stack", "index", "index_select", "gather", "expand_as", "flip", "roll", "repeat",
           "repeat_interleave"}  # fmt: skip


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
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}  # complex group -> its parts' channels
        # line of the source -> what it has read out of states, and the keys of its sources
        self.states: dict[str, list[tuple[ChannelGroup, set[bytes]]]] = {}
        self.skipped: list[int] = []  # groups after operations that only the user's layers feed
        self.constants: dict[str, Tensor] = {}  # buffers whose values the channels depend on
        self.facts = Facts()
        self.logits: dict[fx.Node, tuple[Tensor, Tensor]] = {}  # products of queries and keys

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
            given = values[x] if isinstance(x, fx.Node) else x
            return concrete(given) if isinstance(given, torch.SymInt) else given

        args, kwargs = mapped(node.args, known), mapped(dict(node.kwargs), known)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if operation_name(node) in INLINED:
            body = next(x for x in args if isinstance(x, fx.GraphModule))
            rest = args[args.index(body) + 1 :]
            return self.run(body, [x for x in rest if isinstance(x, Value)])
        call = bind(node, args, kwargs)
        before = len(self.roles), len(self.facts.products)
        result = self._sized(call) if call.sized_by_data else self._result(call)
        if before == (len(self.roles), len(self.facts.products)):
            self.facts.products += products_of(call)
        counted = any(role.positions for role in self.roles[before[0] :])
        if call.sized_by_data and (counted or self.facts.products[before[1] :]):
            self.facts.uncounted.append(described(call))
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
        weighted = call.name in WEIGHTED and any(x.view is not None for x in tensors)
        weighted = weighted and not computes_weight(call)
        if not weighted and all(x.static is not None for x in tensors):
            return self._static(call)
        routed = next((x for x in tensors if x.view is not None and x.view.routed), None)
        if routed is not None and not weighted:
            return routed if call.name in _SAME else self.unknown(call)
        if call.name not in _PAIRED and self._has_pairs(call):
            return self.unknown(call)
        function = _RULES.get(call.name)
        return self.unknown(call) if function is None else function(self, call)

    def _has_pairs(self, call: Call) -> bool:
        """Whether channels of an argument are pairs: real and imaginary parts."""
        ids = (x.ids for x in call.values if self.pairs)
        return any(bool(self.channels.of_kind(x, "complex").any()) for x in ids)

    def _sized(self, call: Call) -> Any:
        """Follows an operation some of whose sizes the data decides.

        Its result must have these sizes where the channel does not change; else it is unknown.
        """
        try:
            result = self._result(call)
        except TopologyError:
            raise
        except (IndexError, RuntimeError, ValueError):  # the sizes do not go together
            return self.unknown(call, _unknown_sizes)
        results = result if isinstance(result, (list, tuple)) else [result]
        return result if all(map(_fits, results)) else self.unknown(call, _unknown_sizes)

    def _static(self, call: Call) -> Any:
        """Keeps an operation on parameters, buffers and constants alone as an expression."""
        call = without_models(call)
        args, kwargs = mapped((call.args, call.kwargs), _to_static)
        trainable = any(x.static is not None and x.static.trainable for x in call.values)
        expression = Static(trainable, None, None, call.target, args, tuple(kwargs.items()))
        views = self._views(call)
        if isinstance(call.node.meta["val"], Tensor):
            view = views[0] if views else view_of(call, expression, self.tensors)
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
        return [replace(source, meta=part) for part in parts]

    def full_shape(self, parameter: str) -> tuple[int, ...]:
        """Returns the shape of a parameter."""
        return tuple(self.tensors[parameter].shape)

    def constant(self, value: Value) -> Tensor | None:
        """Returns a constant; None: it depends on inputs or parameters, or is a meta tensor."""
        if value.static is None or value.static.trainable:
            return None
        constant: Tensor = value.static.value(self.tensors, {})
        if constant.is_meta:
            return None
        for name in names_of(value.static):
            self.constants.setdefault(name, self.tensors[name].detach().clone())
        return constant.to("cpu")

    def couple(self, a: Tensor, b: Tensor, once: bool = False) -> None:
        """Notes that channels of two broadcast tensors are multiplied with each other.

        once: not again where a loop repeats it.
        """
        a, b, _ = channel_ids.unique_pairs(a, b)
        live = (a != 0) & (b != 0)
        pair = self.channels.root(a[live]), self.channels.root(b[live])
        known = once and any(all(map(torch.equal, pair, other)) for other in self.couplings)
        if not known:
            self.couplings.append(pair)

    def end(self, value: Value, name: str) -> None:
        """Notes that the channels of a value leave the network here: factor 1."""
        ids = torch.unique(value.ids)
        if bool((ids != 0).any()):
            self.ends.append((ids[ids != 0], name))

    def unknown(self, call: Call, why: Refusal | None = None) -> Any:
        """Handles an operation that is not understood: raises, or makes it a boundary.

        It is a boundary with on_unsupported="cut", and where the user gives the neighbors of all
        layers that feed it. why: the error for a call and the layers that feed it.
        """
        sources = [x for x in call.values if x.has_channels]
        if not sources and not any(_is_weight(x) for x in call.values):
            return _each(call, [plain(shape) for shape in call.shapes])
        ids = [x.ids.flatten() for x in sources] or [torch.zeros(1, dtype=torch.int64)]
        feeding = self.layers_of(torch.cat(ids))
        neighbors_given = bool(feeding) and set(feeding) <= self.known
        if not neighbors_given:
            error = (why or _reason(call))(call, feeding)
            if self.on_unsupported != "cut":
                raise error
            stop = (
                f"expected {error.expected}, got {error.got}: it counts as a boundary (factor 1)."
            )
            if stop not in self.stops:  # one line of a loop
                self.stops.append(stop)
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
Refusal: TypeAlias = Callable[[Call, list[str]], TopologyError]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of ATen operations, for all of their overloads."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in _RULES, name
            _RULES[name] = function
        return function

    return register


def _reason(call: Call) -> Refusal:
    """Chooses the error for an operation by its operands."""
    if call.name not in WEIGHTED:
        return _unsupported
    if any(_is_picked(x) for x in call.values):
        return _picked_weight
    if any(_is_computed(x) for x in call.values):
        return _computed_weight
    return _unsupported


def _unsupported(call: Call, feeding: list[str]) -> TopologyError:
    """The error for an operation that is not understood."""
    return TopologyError(
        "operations that lap_ext can follow",
        f"{described(call)}, fed by {_listed(feeding)}{source_line(call.node)}",
        f"{_ways_out(feeding)}.",
    )


def _ways_out(feeding: list[str]) -> str:
    """Says how to go on after an operation that these layers feed."""
    neighbors = ""
    if feeding:
        around = f"{{{feeding[0]!r}: (previous, next), ...}}"
        neighbors = f"{{neighbors={around}}} for the layers around it, or "
    return f'Pass {neighbors}{{on_unsupported="cut"}} to count it as a boundary (factor 1)'


def _unknown_sizes(call: Call, feeding: list[str]) -> TopologyError:
    """The error for a result whose number of channels depends on the data."""
    return TopologyError(
        "numbers of channels that do not depend on the values of the inputs",
        f"{described(call)}, fed by {_listed(feeding)}, whose result has as many as the data "
        f"selects{source_line(call.node)}",
        f"Use a mask instead of a selection. {_ways_out(feeding)}.",
    )


def _picked_weight(call: Call, feeding: list[str]) -> TopologyError:
    """The error for a layer that uses rows or columns of a weight that are not adjacent."""
    return TopologyError(
        f"a weight that is used whole or in one block (weight[a:b, c:d]) in {described(call)}",
        f"rows or columns picked from one{source_line(call.node)}",
        f"Use the full weight and pick from its input or result, or a block. {_ways_out(feeding)}.",
    )


def _computed_weight(call: Call, feeding: list[str]) -> TopologyError:
    """The error for a layer whose weight is computed, but from no parameter of its shape."""
    computed = next(x for x in call.values if _is_computed(x))
    names = dict.fromkeys(names_of(computed.static))
    return TopologyError(
        "weights that are parameters, or computed entry by entry from a parameter of their shape",
        f"{described(call)}, with a weight of shape {list(computed.shape)} that is computed from "
        f"{some(map(repr, names), 3)}{source_line(call.node)}",
        "Compute it in a parametrization of a layer (torch.nn.utils.parametrize."
        f"register_parametrization). Otherwise: {_ways_out(feeding)}.",
    )


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


def _fits(x: Any) -> bool:
    """Whether a result has ids of its shape, and elements."""
    if not isinstance(x, Value):
        return True
    sizes = zip(x.ids.shape, x.shape, strict=False)
    return x.ids.dim() == len(x.shape) and all(m == 1 or m == n > 0 for m, n in sizes)


def _is_computed(x: Value) -> bool:
    """Whether x is computed from parameters, and is not a view of one."""
    return x.view is None and x.static is not None and x.static.trainable and len(x.shape) > 1


def _is_picked(x: Value) -> bool:
    """Whether x is a weight's rows or columns that are not adjacent, or repeats them."""
    if x.view is not None:
        shape, strides = x.view.meta.shape, x.view.meta.stride()
        reach = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        return len(shape) > 1 and reach != x.view.meta.numel() and not x.view.routed
    name = getattr(getattr(x.static, "target", None), "_schema", None)
    picks = name is not None and name.name.rpartition("::")[2] in {"index", "index_select"}
    return picks and _is_computed(x)


def _is_weight(x: Value) -> bool:
    """Whether x is, or is computed from, a parameter of two dimensions or more."""
    return x.view.meta.dim() > 1 if x.view is not None else _is_computed(x)


def _each(call: Call, results: list[Value]) -> Any:
    outcome = call.node.meta.get("val")
    return results if isinstance(outcome, (list, tuple)) else results[0]


def _to_static(x: Any) -> Any:
    return x.static if isinstance(x, Value) else x
