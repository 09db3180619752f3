# SPDX-License-Identifier: MIT
"""einsum and tensordot of two operands: a weighted layer if one is a weight, else a product."""

from __future__ import annotations

from string import ascii_letters

import torch

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.roles import Part
from lap_ext.topology.rules.attention import product
from lap_ext.topology.rules.mixing import mixed
from lap_ext.topology.rules.routing import role_of
from lap_ext.topology.static import Static
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value


@rule("einsum")
def _einsum(t: Tracer, call: Call) -> Result:
    values = call.values
    inputs, out = _spelled(call["equation"], [len(x.shape) for x in values])
    if len(inputs) > 2 or any(len(set(letters)) != len(letters) for letters in (*inputs, out)):
        return t.unknown(call)
    if len(inputs) == 1:
        return _alone(t, call, values[0], inputs[0], out)
    first, second = zip(values, inputs, strict=True)
    return _contracted(t, call, first, second, out)


@rule("tensordot")
def _tensordot(t: Tracer, call: Call) -> Result:
    x, y = call["self"], call["other"]
    a, b = ascii_letters[: len(x.shape)], list(ascii_letters[-len(y.shape) :])
    for mine, other in zip(call["dims_self"], call["dims_other"], strict=True):
        b[other] = a[mine]
    both = set(a) & set(b)
    out = "".join(c for c in (*a, *b) if c not in both)
    return _contracted(t, call, (x, a), (y, "".join(b)), out)


def _spelled(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Returns the letters of each operand and of the result, without "..." and with "->".

    Example:
        >>> _spelled("...i, oi", [3, 2])
        (['abi', 'oi'], 'abo')
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow:
        once = sorted(c for c in inputs if c.isalpha() and inputs.count(c) == 1)
        out = ("..." if "..." in inputs else "") + "".join(once)
    more = [rank - len(x.replace("...", "")) for x, rank in zip(operands, ranks, strict=True)]
    most = max(more)
    dots = "".join(c for c in ascii_letters if c not in equation)[:most]  # met from the right
    spelled = [x.replace("...", dots[most - n :]) for x, n in zip(operands, more, strict=True)]
    return spelled, out.replace("...", dots)


def _alone(t: Tracer, call: Call, x: Value, a: str, out: str) -> Result:
    """Handles one operand: reorders its dimensions and sums those that are left out."""
    summed = [dim for dim, c in enumerate(a) if c not in out]
    ids = mixed(t.channels, call.name, x.ids, summed)
    kept = [a.index(c) for c in out]
    ids = ids.permute(kept + summed).reshape([ids.shape[dim] for dim in kept])
    return x.passed(call.name, call.shape, ids)


def _contracted(
    t: Tracer, call: Call, first: tuple[Value, str], second: tuple[Value, str], out: str
) -> Result:
    """Handles two operands with their letters."""
    values = (first[0], second[0])
    if values[1].view is not None and values[0].view is None:
        return _weighted(t, call, *first, *second, out)
    if values[0].view is not None and values[1].view is None:
        return _weighted(t, call, *second, *first, out)
    if any(x.static is not None and x.static.trainable for x in values):
        return t.unknown(call)
    return _product(t, call, *first, *second, out)


def _weighted(t: Tracer, call: Call, x: Value, a: str, w: Value, b: str, out: str) -> Result:
    """Handles a weight [group], outputs, inputs or [group], inputs, outputs."""
    assert w.view is not None
    full = t.full_shape(w.view.parameter)
    if w.view.routed or w.shape != full or not w.view.meta.is_contiguous():
        return t.unknown(call)
    group = "".join(c for c in b if c in a and c in out)
    into = "".join(c for c in b if c in a and c not in out)
    free = "".join(c for c in b if c not in a)
    if not into or not free or len(group) > 1 or any(c not in out for c in free):
        return t.unknown(call)
    if b not in (group + free + into, group + into + free):
        return t.unknown(call)
    transposed = b == group + into + free
    size = {c: n for letters, v in ((a, x), (b, w)) for c, n in zip(letters, v.shape, strict=True)}

    def total(letters: str) -> int:
        return torch.Size([size[c] for c in letters]).numel()

    rows, cols = (into, free) if transposed else (free, into)
    part = Part((total(group + rows), total(cols)), total(group), transposed)
    order = group + into + "".join(c for c in a if c not in group + into)
    moved = x.ids.permute([a.index(c) for c in order])
    shape = [size[c] for c in order]
    flat = (total(group + into), total(order) // total(group + into))
    pairs = channel_ids.pairs_along(channel_ids.reshaped(moved, shape, flat), 0, flat[0])
    axes = group + free
    in_dims = tuple(a.index(c) for c in group + into)
    out_dims = tuple(out.index(c) for c in axes)
    outputs = role_of(t, call, w.view.parameter, part, pairs, "linear", x, in_dims, out_dims).out
    ids = outputs.ids.reshape([size[c] for c in axes])
    ids = ids.permute([axes.index(c) for c in out if c in axes])
    return Value(call.shape, ids.reshape([size[c] if c in axes else 1 for c in out]))


def _product(t: Tracer, call: Call, x: Value, a: str, y: Value, b: str, out: str) -> Result:
    """Handles two activations as a batched matrix product: batch, left, summed and right letters.

    Where one operand has only letters of the other, the result is their product, summed.
    """
    batch = "".join(c for c in out if c in a and c in b)
    summed = "".join(c for c in a if c in b and c not in out)
    left, right = "".join(c for c in a if c not in b), "".join(c for c in b if c not in a)
    if any(c not in out for c in left + right):
        return t.unknown(call)
    size = {c: n for letters, v in ((a, x), (b, y)) for c, n in zip(letters, v.shape, strict=True)}

    def matrix(v: Value, letters: str, first: str, second: str) -> Value:
        order = batch + first + second
        moved = v.ids.permute([letters.index(c) for c in order])
        head = [size[c] for c in batch]
        ends = [torch.Size([size[c] for c in axis]).numel() for axis in (first, second)]
        shape = [size[c] for c in order]
        static = v.static
        if static is not None:
            turned = Static(
                False, None, None, torch.permute, (static, [letters.index(c) for c in order])
            )
            static = Static(False, None, None, torch.reshape, (turned, [*head, *ends]))
        ids = channel_ids.reshaped(moved, shape, [*head, *ends])
        return Value((*head, *ends), ids, static, trail=v.trail)

    one, two = matrix(x, a, left, summed), matrix(y, b, summed, right)
    shape = (*one.shape[:-1], two.shape[-1])
    result = product(t, call, one, two, shape, gate=bool(left) != bool(right))
    order = batch + left + right
    ids = channel_ids.reshaped(result.ids, shape, [size[c] for c in order])
    ids = ids.permute([order.index(c) for c in out])
    return Value(call.shape, ids, trail=result.trail)
