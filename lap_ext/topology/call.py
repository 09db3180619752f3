# SPDX-License-Identifier: MIT
"""One operation of the traced graph: its name, its arguments by those of its schema, its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, fx

from lap_ext.topology.value import Value


@dataclass(frozen=True)
class Call:
    """A call of an ATen operation, nodes replaced by what is known of their results."""

    node: fx.Node
    name: str  # "conv2d" of aten.conv2d.default; an in-place one without its underscore
    target: Callable[..., Any]
    arguments: dict[str, Any]  # by name, with the schema's defaults
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that not every overload has."""
        return self.arguments.get(name, default)

    @property
    def values(self) -> list[Value]:
        """All tensors among the arguments, in order."""
        return list(_values(list(self.arguments.values())))

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape, of the first result where there are several."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all results."""
        found = self.node.meta.get("val")
        several = found if isinstance(found, (list, tuple)) else [found]
        return [tuple(map(int, x.shape)) if isinstance(x, Tensor) else () for x in several]

    @property
    def operation(self) -> str:
        """What errors call it."""
        plain = isinstance(self.target, FunctionType)
        return self.name if plain else str(self.target)


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """An argument of a node, however nested, with the function on every leaf; plain lists."""
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
    """The operation of a node: "conv2d" of aten.conv2d.default, "relu" of aten.relu_.default."""
    schema = getattr(node.target, "_schema", None)
    plain = getattr(node.target, "__name__", str(node.target))
    name = plain if schema is None else str(schema.name).rpartition("::")[2]
    return name if name.endswith("__") else name.removesuffix("_")


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that a node belongs to; empty: the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values())) if path), "")


def bind(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call of a node; args and kwargs as they are known."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    arguments: dict[str, Any] = {}
    if schema is not None:
        for place, argument in enumerate(schema.arguments):
            if argument.is_out:  # written over, not read
                continue
            if place < len(args):
                arguments[argument.name] = args[place]
            elif argument.name in kwargs:
                arguments[argument.name] = kwargs[argument.name]
            else:
                arguments[argument.name] = argument.default_value
    else:  # torch.cond and its like: no rule knows them, but what feeds them counts
        arguments = {**dict(zip(map(str, range(len(args))), args, strict=True)), **kwargs}
    return Call(node, operation_name(node), target, arguments, args, kwargs)
