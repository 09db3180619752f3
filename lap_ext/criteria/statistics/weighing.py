# SPDX-License-Identifier: MIT
"""Finds where a router's weights multiply what an expert puts out, token by token.

    f -> biases, norms, moves ... -> f * g     g has no dimension of channels, and a choice made it

The path starts at the last product of an expert (a layer of its own, an expert of a packed weight,
or all of them at once) and may go on through anything that has one value for each of its values,
and through moves, also into a stack of all experts. It ends at the product with g, and fails where
values are summed, split, or read by a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lap_ext.criteria.statistics.activity import ACTIVATIONS
from lap_ext.topology.call import concrete, operation_name

_SAME = ACTIVATIONS | {
    *("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "masked_fill", "mul"),
    *("div", "dropout", "native_dropout", "clone", "contiguous", "to", "_to_copy", "alias"),
    "detach",
}
_SHIFTED = {"add", "sub"}  # by a bias
_PICKS = {"index", "index_select", "gather", "take_along_dim"}
_JOINS = {"stack", "cat", "concat"}
_MOVES = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t"),
    *("squeeze", "unsqueeze", "movedim", "swapaxes", "expand"),
}
_CHOICES = {"topk", "sort", "argsort", "argmax", "max", "kthvalue", "one_hot"}
_NONE = -1  # in a stack: values of other experts


@dataclass(frozen=True)
class Weighing:
    """The path from an expert's last product to where its output is weighed."""

    path: tuple[fx.Node, ...]  # the product, and what comes after it
    node: fx.Node  # multiplies the result of the last one
    weight: fx.Node  # by this one's

    @property
    def moves(self) -> list[tuple[fx.Node, fx.Node]]:
        """The operations on the path that move values, each with the one before it."""
        pairs = zip(self.path[1:], self.path, strict=False)
        return [(x, before) for x, before in pairs if operation_name(x) in _MOVES | _PICKS | _JOINS]

    @property
    def picked(self) -> bool:
        """Whether only the outputs of the chosen experts are computed, or are left at the end."""
        first = self.path[0].meta["val"]
        sized_by_data = any(isinstance(n, torch.SymInt) for n in first.shape)
        return sized_by_data or any(operation_name(x) in _PICKS for x in self.path[1:])

    def operands(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Returns (f, g) in a call, g with the dimensions of f: of size 1 along channels."""
        pairs = zip(_flat(self.node.args), _flat(args), strict=True)
        found = {node: value for node, value in pairs if isinstance(node, fx.Node)}
        f, g = found[self.path[-1]], found[self.weight]
        return f, _aligned(self.node, self.path[-1], f.dim(), g)


def weighing_after(start: fx.Node, channels: int, roles: set[fx.Node]) -> Weighing | None:
    """Finds where the output of a product is weighed by a router; None if it is not.

    Args:
        start: the product.
        channels: how many one expert puts out.
        roles: all products of layers.
    """
    paths: list[tuple[fx.Node, ...]] = [(start,)]
    seen = {start}
    for path in paths:
        last = path[-1]
        for user in last.users:
            others = [x for x in user.all_input_nodes if x is not last]
            weights = (x for x in others if _weighs(user, last, x, channels))
            weight = next((x for x in weights if _chosen(x, start, roles)), None)
            if weight is not None:
                return Weighing(path, user, weight)
            if user not in seen and user not in roles and _goes_on(user, last, others):
                seen.add(user)
                paths.append((*path, user))
    return None


def carried(
    node: fx.Node, before: fx.Node, args: tuple[Any, ...], kwargs: Any, x: Tensor
) -> Tensor:
    """Moves x as a node moves the result of the one before it; beside it in a stack, puts -1."""
    join = operation_name(node) in _JOINS

    def swap(of: Any, value: Any) -> Any:
        if isinstance(of, (list, tuple)):
            return [swap(*pair) for pair in zip(of, value, strict=True)]
        if of is before:
            return x
        beside = join and isinstance(value, Tensor)
        return torch.full_like(value, _NONE, dtype=x.dtype) if beside else value

    result: Tensor = node.target(*swap(node.args, args), **kwargs)  # type: ignore[operator]
    return result


def _goes_on(user: fx.Node, last: fx.Node, others: list[fx.Node]) -> bool:
    """Tells whether an operation keeps or moves the values of the one before it."""
    name = operation_name(user)
    if name in _MOVES | _PICKS | _JOINS:
        return name in _JOINS or user.args[0] is last
    if name == "getitem":
        return bool(operation_name(last) in _SAME and user.args[1] == 0)
    if name not in _SAME | _SHIFTED or _sizes(user) != _sizes(last):
        return False
    return name in _SAME or all(_is_bias(x) for x in others)


def _is_bias(node: fx.Node) -> bool:
    """Tells whether a result is a parameter, or is picked from one, for example by token."""
    while node.op == "call_function" and operation_name(node) in _MOVES | _PICKS | {"to"}:
        node = node.all_input_nodes[0]
    return node.op != "call_function"


def _weighs(node: fx.Node, f: fx.Node, g: fx.Node, channels: int) -> bool:
    """Tells whether a node multiplies f by g, which has one value for all channels of f."""
    name = operation_name(node)
    if name not in ("mul", "einsum") or len(node.all_input_nodes) != 2:
        return False
    sizes, given = _sizes(f), _sizes(g)
    if math.prod(sizes) != math.prod(given) * channels or not sizes:
        return False
    if name == "mul":
        return _sizes(node) == sizes
    letters = _letters(node, f, g)
    return letters is not None and set(letters[1]) < set(letters[0])


def _aligned(node: fx.Node, f: fx.Node, dims: int, g: Tensor) -> Tensor:
    """Returns g with the dimensions of f."""
    if operation_name(node) == "mul":
        return g.reshape([1] * (dims - g.dim()) + list(g.shape))
    (other,) = (x for x in node.all_input_nodes if x is not f)
    letters = _letters(node, f, other)
    assert letters is not None
    of_f, of_g = letters
    g = g.permute([of_g.index(x) for x in of_f if x in of_g])
    for dim in (dim for dim, x in enumerate(of_f) if x not in of_g):
        g = g.unsqueeze(dim)
    return g


def _letters(node: fx.Node, f: fx.Node, g: fx.Node) -> tuple[str, str] | None:
    """Returns the letters of f and of g in an einsum of two operands, each a dimension; or None."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(_flat(node.args[1:]))
    terms = equation.partition("->")[0].split(",")
    if "." in equation or len(terms) != 2 or operands[:2] not in ([f, g], [g, f]):
        return None
    of_f, of_g = terms if operands[0] is f else reversed(terms)
    return (of_f, of_g) if len(set(of_f)) == len(of_f) and len(set(of_g)) == len(of_g) else None


def _chosen(weight: fx.Node, start: fx.Node, roles: set[fx.Node]) -> bool:
    """Tells whether a result comes from a choice after the last layer, and not from start."""
    pending, seen, found = [weight], {weight}, False
    while pending:
        node = pending.pop()
        if node is start:
            return False
        if node in roles:
            continue
        found |= node.op == "call_function" and operation_name(node) in _CHOICES
        new = [x for x in node.all_input_nodes if x not in seen]
        seen.update(new)
        pending += new
    return found


def _sizes(node: fx.Node) -> list[int]:
    """Returns the sizes of a result, or of the first of several."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return [concrete(n) for n in value.shape] if isinstance(value, Tensor) else []


def _flat(x: Any) -> Iterator[Any]:
    """Yields the leaves of nested arguments."""
    if isinstance(x, (list, tuple)):
        for item in x:
            yield from _flat(item)
    else:
        yield x
