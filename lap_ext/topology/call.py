# SPDX-License-Identifier: MIT
"""One operation of the traced graph: its name, its arguments by name, the shapes of its results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lap_ext.topology.value import Value

_KEY = "lap_ext_key"  # in a node's meta
_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Call:
    """A call of an ATen operation, with nodes replaced by what is known of their results."""

    node: fx.Node
    name: str  # "conv2d" of aten.conv2d.default; an in-place one without its underscore
    target: Callable[..., Any]
    arguments: dict[str, Any]  # by name, with the schema's defaults
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Returns an argument that not every overload has."""
        return self.arguments.get(name, default)

    @property
    def values(self) -> list[Value]:
        """All tensors among the arguments, in order."""
        return list(_values(list(self.arguments.values())))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, or of the first result where there are several."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all results."""
        outcome = self.node.meta.get("val")
        results = outcome if isinstance(outcome, (list, tuple)) else [outcome]
        return [tuple(map(concrete, x.shape)) if isinstance(x, Tensor) else () for x in results]

    @property
    def sized_by_data(self) -> bool:
        """Whether a size of an argument or a result depends on the values of the inputs."""
        nodes = [self.node, *self.node.all_input_nodes]
        return any(_sized_by_data(x.meta.get("val")) for x in nodes)

    @property
    def operation(self) -> str:
        """Its name in errors."""
        plain = isinstance(self.target, FunctionType)
        return self.name if plain else str(self.target)


class NodeKey(NamedTuple):
    """Identifies a node in all programs of a model, as plain data; one object for each node."""

    name: str
    operation: str
    module: str  # the path of the innermost one


def node_key(node: fx.Node) -> NodeKey:
    """Returns the key of a node, always the same object: several roles may have one node."""
    if _KEY not in node.meta:
        node.meta[_KEY] = NodeKey(node.name, str(node.target), module_path(node))
    key: NodeKey = node.meta[_KEY]
    return key


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """Applies a function to every leaf of a nested argument; all sequences become plain ones."""
    if isinstance(x, (list, tuple)):
        items = [mapped(item, function) for item in x]
        return tuple(items) if isinstance(x, tuple) else items
    if isinstance(x, dict):
        return {key: mapped(item, function) for key, item in x.items()}
    return function(x)


def _values(x: Any) -> Iterator[Value]:
    if isinstance(x, Value):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from _values(item)


def operation_name(node: fx.Node) -> str:
    """Returns a node's operation: "conv2d" of aten.conv2d.default, "relu" of aten.relu_.default."""
    schema = getattr(node.target, "_schema", None)
    plain = getattr(node.target, "__name__", str(node.target))
    name = plain if schema is None else str(schema.name).rpartition("::")[2]
    return name if name.endswith("__") else name.removesuffix("_")


def module_path(node: fx.Node) -> str:
    """Returns the path of a node's innermost module; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values())) if path), "")


def described(call: Call) -> str:
    """Names a call and its module in errors."""
    path = module_path(call.node)
    return f"{call.operation} in module {path!r}" if path else call.operation


def source_line(node: fx.Node) -> str:
    """Returns the innermost line of the source outside torch, " (model.py:12)"; or nothing."""
    lines = re.findall(r'File "([^"<]+)", line (\d+)', node.meta.get("stack_trace") or "")
    ours = [(file, n) for file, n in lines if not Path(file).is_relative_to(_TORCH)]
    return f" ({Path(ours[-1][0]).name}:{ours[-1][1]})" if ours else ""


def concrete(n: Any) -> int:
    """Returns a size as a number; a large one of its own stands for each that the data decides.

    Sizes that must be equal, or sums of others, then are: as in a run on data of these sizes. Only
    numbers of positions may be such sizes, which the tracer checks.
    """
    if not isinstance(n, torch.SymInt):
        return int(n)
    expression = n.node.expr
    number = {x: int(re.sub(r"\D", "", x.name)) for x in expression.free_symbols}  # u0, u1, ...
    return int(expression.subs({x: 211 + 2 * i for x, i in number.items()}))


def _sized_by_data(x: Any) -> bool:
    """Whether one of the sizes of a result, or a result itself, is known from data alone."""
    if isinstance(x, (list, tuple)):
        return any(map(_sized_by_data, x))
    return any(isinstance(n, torch.SymInt) for n in (x.shape if isinstance(x, Tensor) else [x]))


def bind(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Returns the call of a node; args and kwargs as they are known."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    arguments: dict[str, Any] = {}
    if schema is not None:
        for index, argument in enumerate(schema.arguments):
            if argument.is_out:  # written over, not read
                continue
            if index < len(args):
                arguments[argument.name] = args[index]
            elif argument.name in kwargs:
                arguments[argument.name] = kwargs[argument.name]
            else:
                arguments[argument.name] = argument.default_value
    else:  # torch.cond and the like: no rule knows them, but their inputs count
        arguments = {**dict(zip(map(str, range(len(args))), args, strict=True)), **kwargs}
    return Call(node, operation_name(node), target, arguments, args, kwargs)
