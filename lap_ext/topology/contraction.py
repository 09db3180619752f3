# SPDX-License-Identifier: MIT
"""einsum of two operands: a weighted layer if one is a weight, else a product of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lap_ext.topology import labels as lab
from lap_ext.topology.attention import product
from lap_ext.topology.call import Call, Result, rule
from lap_ext.topology.roles import Part
from lap_ext.topology.routing import role_of
from lap_ext.topology.value import Value

if TYPE_CHECKING:
    from lap_ext.topology.tracer import Tracer


@rule("einsum")
def _einsum(t: Tracer, call: Call) -> Result:
    equation, values = call["equation"].replace(" ", ""), call.values
    if "..." in equation or "->" not in equation or len(values) != 2:
        return t.unknown(call)
    inputs, out = equation.split("->")
    a, b = inputs.split(",")
    if any(len(set(letters)) != len(letters) for letters in (a, b, out)):
        return t.unknown(call)
    if values[1].view is not None and values[0].view is None:
        return _weighted(t, call, values[0], a, values[1], b, out)
    if values[0].view is not None and values[1].view is None:
        return _weighted(t, call, values[1], b, values[0], a, out)
    if any(x.static is not None and x.static.trainable for x in values):
        return t.unknown(call)
    return _product(t, call, values[0], a, values[1], b, out)


def _weighted(t: Tracer, call: Call, x: Value, a: str, w: Value, b: str, out: str) -> Result:
    """A weight whose dimensions are [group], outputs, inputs or [group], inputs, outputs."""
    assert w.view is not None
    full = t.full_shape(w.view.parameter)
    if w.view.routed or w.shape != full or not w.view.meta.is_contiguous():
        return t.unknown(call)
    group = "".join(c for c in b if c in a and c in out)
    into = "".join(c for c in b if c in a and c not in out)
    made = "".join(c for c in b if c not in a)
    if not into or not made or len(group) > 1 or any(c not in out for c in made):
        return t.unknown(call)
    if b not in (group + made + into, group + into + made):
        return t.unknown(call)
    transposed = b == group + into + made
    size = {c: n for letters, v in ((a, x), (b, w)) for c, n in zip(letters, v.shape, strict=True)}

    def total(letters: str) -> int:
        return torch.Size([size[c] for c in letters]).numel()

    rows, cols = (into, made) if transposed else (made, into)
    part = Part((total(group + rows), total(cols)), total(group), transposed)
    order = group + into + "".join(c for c in a if c not in group + into)
    moved = x.labels.permute([a.index(c) for c in order])
    shape = [size[c] for c in order]
    flat = (total(group + into), total(order) // total(group + into))
    pairs = lab.pairs_along(lab.reshaped(moved, shape, flat), 0, flat[0])
    axes = group + made
    in_dims = tuple(a.index(c) for c in group + into)
    out_dims = tuple(out.index(c) for c in axes)
    space = role_of(t, call, w.view.parameter, part, pairs, "linear", x, in_dims, out_dims).out
    labels = space.labels.reshape([size[c] for c in axes])
    labels = labels.permute([axes.index(c) for c in out if c in axes])
    return Value(call.shape, labels.reshape([size[c] if c in axes else 1 for c in out]))


def _product(t: Tracer, call: Call, x: Value, a: str, y: Value, b: str, out: str) -> Result:
    """As a batched matrix product: batch, left, contracted and right letters."""
    batch = "".join(c for c in out if c in a and c in b)
    summed = "".join(c for c in a if c in b and c not in out)
    left, right = "".join(c for c in a if c not in b), "".join(c for c in b if c not in a)
    if any(c not in out for c in left + right):
        return t.unknown(call)
    size = {c: n for letters, v in ((a, x), (b, y)) for c, n in zip(letters, v.shape, strict=True)}

    def matrix(v: Value, letters: str, first: str, second: str) -> Value:
        order = batch + first + second
        moved = v.labels.permute([letters.index(c) for c in order])
        head = [size[c] for c in batch]
        ends = [torch.Size([size[c] for c in group]).numel() for group in (first, second)]
        shape = [size[c] for c in order]
        return Value((*head, *ends), lab.reshaped(moved, shape, [*head, *ends]), trail=v.trail)

    one, two = matrix(x, a, left, summed), matrix(y, b, summed, right)
    shape = (*one.shape[:-1], two.shape[-1])
    made = product(t, call, one, two, shape)
    order = batch + left + right
    labels = lab.reshaped(made.labels, shape, [size[c] for c in order])
    labels = labels.permute([order.index(c) for c in out])
    return Value(call.shape, labels, trail=made.trail)
