# SPDX-License-Identifier: MIT
"""einsum and tensordot: pair by pair, a weighted layer if one is a weight, else a product.

Several operands are contracted from the first that has channels on, each time with the next that
shares a letter. What is only multiplied by entries (a vector "c" of "nc") is a scale.
"""

from __future__ import annotations

from string import ascii_letters

import torch

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.roles import Part
from lap_ext.topology.rules.attention import product
from lap_ext.topology.rules.joins import scaled
from lap_ext.topology.rules.mixing import mixed
from lap_ext.topology.rules.routing import role_of
from lap_ext.topology.static import Scale, Static
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value
from lap_ext.topology.work import contracted, spelled


@rule("einsum")
def _einsum(t: Tracer, call: Call) -> Result:
    values = call.values
    inputs, out = spelled(call["equation"], [len(x.shape) for x in values])
    if any(len(set(letters)) != len(letters) for letters in (*inputs, out)):
        return t.unknown(call)
    if len(inputs) == 1:
        return _summed(t, call, values[0], inputs[0], out)
    operands = list(zip(values, inputs, strict=True))
    first = next((n for n, (x, _) in enumerate(operands) if x.has_channels), 0)
    x, a = operands.pop(first)
    while operands:
        joint = [n for n, (_, letters) in enumerate(operands) if set(letters) & set(a)]
        y, b = operands.pop(joint[0] if joint else 0)
        later = {c for _, letters in operands for c in letters} | set(out)
        kept = "".join(dict.fromkeys(c for c in a + b if c in later)) if operands else out
        pair = ((y, b), (x, a)) if first else ((x, a), (y, b))
        result = _contracted(t, call, *pair, kept)
        if result is None:
            return t.unknown(call)
        x, a, first = result, kept, 0
    return x


@rule("tensordot")
def _tensordot(t: Tracer, call: Call) -> Result:
    x, y = call["self"], call["other"]
    a, b = ascii_letters[: len(x.shape)], list(ascii_letters[-len(y.shape) :])
    for mine, other in zip(call["dims_self"], call["dims_other"], strict=True):
        b[other] = a[mine]
    both = set(a) & set(b)
    out = "".join(c for c in (*a, *b) if c not in both)
    result = _contracted(t, call, (x, a), (y, "".join(b)), out)
    return t.unknown(call) if result is None else result


def _contracted(
    t: Tracer, call: Call, first: tuple[Value, str], second: tuple[Value, str], out: str
) -> Value | None:
    """Contracts two operands with their letters; None where channels cannot be followed."""
    for (x, a), (w, b) in ((first, second), (second, first)):
        if x.static is None and w.static is not None and set(b) <= set(a) and b:
            if w.static.trainable or set(a) == set(out):
                return _entrywise(t, call, x, a, w, b, out)
    values = (first[0], second[0])
    if values[1].view is not None and values[0].view is None:
        return _weighted(t, call, *first, *second, out)
    if values[0].view is not None and values[1].view is None:
        return _weighted(t, call, *second, *first, out)
    if any(x.static is not None and x.static.trainable for x in values):
        return None
    return _product(t, call, *first, *second, out)


def _entrywise(t: Tracer, call: Call, x: Value, a: str, w: Value, b: str, out: str) -> Value | None:
    """Multiplies x by the entries of a static w that has none but its letters, and sums."""
    assert w.static is not None
    t.facts.products += contracted((x, a), (w, b), out)
    order = sorted(b, key=a.index)
    turned = [b.index(c) for c in order]
    static = Static(w.static.trainable, None, None, torch.permute, (w.static, turned))
    sizes = dict(zip(b, w.shape, strict=True))
    shape = tuple(sizes.get(c, 1) for c in a)
    factor = Value(shape, channel_ids.none(len(a)), static)
    if x.has_channels:
        x = scaled(t, call, x, factor, Scale("parameter", (static,)), x.shape)
    return _summed(t, call, x, a, out)


def _summed(t: Tracer, call: Call, x: Value, a: str, out: str) -> Value:
    """Reorders dimensions and sums those that are left out."""
    summed = [dim for dim, c in enumerate(a) if c not in out]
    ids = mixed(t.channels, call.name, x.ids, summed)
    kept = [a.index(c) for c in out]
    ids = ids.permute(kept + summed).reshape([ids.shape[dim] for dim in kept])
    return x.passed(call.name, tuple(x.shape[dim] for dim in kept), ids)


def _weighted(t: Tracer, call: Call, x: Value, a: str, w: Value, b: str, out: str) -> Value | None:
    """Handles a weight [group], outputs, inputs or [group], inputs, outputs."""
    assert w.view is not None
    full = t.full_shape(w.view.parameter)
    if w.view.routed or w.shape != full or not w.view.meta.is_contiguous():
        return None
    group = "".join(c for c in b if c in a and c in out)
    into = "".join(c for c in b if c in a and c not in out)
    free = "".join(c for c in b if c not in a)
    if not into or not free or len(group) > 1 or any(c not in out for c in free):
        return None
    if b not in (group + free + into, group + into + free):
        return None
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
    positions = total(out) // max(part.channels[1], 1)
    outputs = role_of(
        t, call, w.view.parameter, part, pairs, "linear", positions, x, in_dims, out_dims
    ).out
    ids = outputs.ids.reshape([size[c] for c in axes])
    ids = ids.permute([axes.index(c) for c in out if c in axes])
    result = tuple(size[c] for c in out)
    return Value(result, ids.reshape([size[c] if c in axes else 1 for c in out]))


def _product(t: Tracer, call: Call, x: Value, a: str, y: Value, b: str, out: str) -> Value | None:
    """Handles two activations as a batched matrix product: batch, left, summed and right letters.

    Where one operand has only letters of the other, the result is their product, summed.
    """
    batch = "".join(c for c in out if c in a and c in b)
    summed = "".join(c for c in a if c in b and c not in out)
    left, right = "".join(c for c in a if c not in b), "".join(c for c in b if c not in a)
    alone = {c for c in left + right if c not in out}
    if alone:
        a_kept, b_kept = ("".join(c for c in letters if c not in alone) for letters in (a, b))
        x, y = _summed(t, call, x, a, a_kept), _summed(t, call, y, b, b_kept)
        return _product(t, call, x, a_kept, y, b_kept, out)
    t.facts.products += contracted((x, a), (y, b), out)
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
    if result is None:
        return None
    order = batch + left + right
    ids = channel_ids.reshaped(result.ids, shape, [size[c] for c in order])
    ids = ids.permute([order.index(c) for c in out])
    return Value(tuple(size[c] for c in out), ids, trail=result.trail)
