# SPDX-License-Identifier: MIT
"""One operation of the traced graph: its name, its arguments by name, the shapes of its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, fx

from lap_ext.topology.value import Value

_KEY = "lap_ext_key"  # in a node's meta


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
        return [tuple(map(int, x.shape)) if isinstance(x, Tensor) else () for x in results]

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
