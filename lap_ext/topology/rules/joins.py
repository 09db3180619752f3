# SPDX-License-Identifier: MIT
"""Element-wise operations: activations, sums, gates, and multiplications by weights and numbers.

f(x)          the same channels, factor 1 (activations, casts, dropout)
a + b, a * b  a new channel with both as parents: squares add (a product is linearized with both
              operands at 1: d(a b) = da + db)
x + f(x)      the same channel: an activation written out
x / norm(x)   the same channel: a statistic over the channels that it normalizes is not a parent
x * weight    a channel scaled by a parameter (layer scale, the weight of a norm)
x * number    a channel scaled by a number
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.channels import ChannelEdges
from lap_ext.topology.noting import belong, choice_among, together
from lap_ext.topology.rules.pairs import paired, turned
from lap_ext.topology.static import Scale
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, merged, plain


@rule(
    "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "prelu", "rrelu",
    "_prelu_kernel", "rrelu_with_noise",
    "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "hardshrink", "softshrink",
    "threshold", "softplus", "log_sigmoid", "log_softmax", "_log_softmax", "exp", "expm1", "log",
    "log1p", "log2", "sqrt", "rsqrt", "neg", "abs", "sin", "cos", "atan", "erf", "square",
    "reciprocal", "sign", "dropout", "feature_dropout", "alpha_dropout", "native_dropout",
    "feature_alpha_dropout", "nan_to_num", "round", "floor", "ceil", "trunc", "logit",
    "to", "_to_copy", "type_as", "contiguous", "clone", "detach", "alias", "lift_fresh",
    "lift_fresh_copy", "cpu", "cuda", "requires_grad",
    "cumsum", "glu_jvp", "_conj", "resolve_conj", "resolve_neg", "positive",
)  # fmt: skip
def _unary(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    if not x.has_channels:
        return plain(call.shape)
    if call.name == "cumsum" and x.ids.shape[call["dim"]] > 1:
        return t.unknown(call)
    if call.name in {"log_softmax", "_log_softmax"}:
        together(t, call, x.ids, [call["dim"]])
    for weight in call.values[1:]:  # of a PReLU
        if len(weight.shape) == 1 and len(x.shape) > 1 and weight.static is not None:
            belong(t, weight, x.ids.movedim(1, -1), adds=False)
    result = x.passed(call.name, call.shape, x.ids)
    return [result, plain(call.shape)] if call.name == "native_dropout" else result


@rule("pow", "clamp", "clamp_min", "clamp_max", "clip")
def _of_several(t: Tracer, call: Call) -> Result:
    """Handles activations whose exponents or bounds may be tensors with their own channels."""
    return joined(t, call, call.values)


@rule("tril", "triu")
def _triangle(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    if max(x.ids.shape[-2:]) > 1:
        return t.unknown(call)
    return x.passed(call.name, call.shape, x.ids) if x.has_channels else plain(call.shape)


@rule(
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor",
    "bitwise_and", "bitwise_or", "bitwise_not", "isnan", "isinf", "isfinite", "isin", "any", "all",
    "nonzero", "searchsorted",
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "bernoulli", "bincount", "numel",
    "_local_scalar_dense",
)  # fmt: skip
def _no_channels(t: Tracer, call: Call) -> Result:
    return plain(call.shape)


@rule("floor_divide", "remainder", "fmod", "sum_to_size")
def _integers(t: Tracer, call: Call) -> Result:
    """Handles arithmetic on indices, which layers do not apply to their channels."""
    return t.unknown(call) if any(x.has_channels for x in call.values) else plain(call.shape)


@rule("argmax", "argmin", "argsort", "one_hot", "histc", "bucketize", "item", "multinomial")
def _choice(t: Tracer, call: Call) -> Result:
    """Handles decisions, in which channels end as in an output."""
    for x in call.values:
        t.end(x, call.name)
        choice_among(t, x.ids, call.get("dim"))
    return plain(call.shape)


@rule("add", "sub", "rsub", "maximum", "minimum", "logaddexp", "fmax", "fmin",
      "atan2", "hypot", "copysign")  # fmt: skip
def _sum(t: Tracer, call: Call) -> Result:
    values = call.values
    alpha = call.get("alpha", 1)
    if alpha not in (1, None) and len(values) > 1:
        index = 0 if call.name == "rsub" else 1
        values[index] = by_number(t, call, values[index], float(alpha))
    return joined(t, call, values)


@rule("addcmul", "addcdiv")
def _add_product(t: Tracer, call: Call) -> Result:
    """Computes self + value * tensor1 * tensor2, or / tensor2."""
    factors = {"self": call["tensor1"], "other": call["tensor2"]}
    product = _product(t, replace(call, name=call.name.removeprefix("addc"), arguments=factors))
    assert isinstance(product, Value)
    return joined(t, call, [call["self"], by_number(t, call, product, float(call["value"]))])


@rule("lerp")
def _lerp(t: Tracer, call: Call) -> Result:
    """Interpolates: a + weight * (b - a)."""
    weight = call["weight"]
    if isinstance(weight, Value):
        return t.unknown(call)
    a, b = call["self"], call["end"]
    parts = [by_number(t, call, a, 1.0 - weight), by_number(t, call, b, float(weight))]
    return joined(t, call, parts)


@rule("mul", "div", "true_divide", "multiply", "divide")
def _product(t: Tracer, call: Call) -> Result:
    values = call.values
    with_channels = [x for x in values if x.has_channels]
    if not with_channels:
        return plain(call.shape)
    if paired(t, values):
        return turned(t, call, values)
    numbers = [x for x in call.arguments.values() if isinstance(x, (int, float))]
    inverse = call.name in {"div", "true_divide", "divide"}
    if len(values) == 1:
        factor = float(numbers[0]) if numbers else 1.0
        if inverse and values[0] is call.get("self"):
            factor = 1.0 / factor if factor else 1.0
        return by_number(t, call, values[0], factor)
    if len(with_channels) == 2:
        weights = weights_of_positions(t, *values)
        if weights is None:
            return joined(t, call, values)
        t.end(weights, "attention")
        other = values[0] if weights is values[1] else values[1]
        return joined(t, call, [other])
    (x,) = with_channels
    other = values[1] if values[0] is x else values[0]
    if other.static is None or (inverse and other is values[0]):
        return x.passed(call.name, call.shape, channel_ids.broadcast(x.ids, len(call.shape)))
    scale = Scale("parameter", (other.static,), inverse=inverse)
    constant = None if scale.names or inverse else t.constant(other)
    if constant is not None and not constant.any():  # the first state of a loop
        return by_number(t, call, x, 0.0)
    return scaled(t, call, x, other, scale)


def weights_of_positions(t: Tracer, a: Value, b: Value) -> Value | None:
    """Returns the one of two factors that comes from a softmax over positions; or None."""
    of_a, of_b = (bool(t.channels.of_kind(x.ids[x.ids != 0], "softmax").all()) for x in (a, b))
    return None if of_a == of_b else (a if of_a else b)


def by_number(t: Tracer, call: Call, x: Value, factor: float) -> Value:
    """Multiplies channels by a number."""
    if not x.has_channels:
        return x
    if factor == 0.0:
        ids = channel_ids.broadcast(x.ids, len(call.shape))
        return x.passed(call.name, call.shape, torch.where(ids != 0, t.channels.zero(), 0))
    if abs(factor) == 1.0 or not math.isfinite(factor):
        return x.passed(call.name, call.shape, x.ids)
    parents, inverse = torch.unique(x.ids, return_inverse=True)
    edges = ChannelEdges(
        torch.arange(parents.numel()),
        parents,
        x.trail,
        Scale("number", number=factor),
        torch.zeros_like(parents),
    )
    live = parents != 0
    group = t.channels.add(
        parents.numel(),
        "number",
        f"{call.name} {factor:g}",
        [_where_live(edges, live)],
        t.channels.root(parents),
    )
    ids = torch.where(live, group.ids, 0)[inverse]
    return Value(call.shape, channel_ids.broadcast(ids, len(call.shape)))


def _where_live(edges: ChannelEdges, live: Tensor) -> ChannelEdges:
    entry = None if edges.entry is None else edges.entry[live]
    weight = None if edges.weight is None else edges.weight[live]
    return replace(
        edges, child=edges.child[live], parent=edges.parent[live], entry=entry, weight=weight
    )


def scaled(
    t: Tracer,
    call: Call,
    x: Value,
    factor: Value,
    scale: Scale,
    shape: tuple[int, ...] | None = None,
) -> Value:
    """Multiplies channels by a static tensor: exactly by channel, by its mean square by position.

    A constant (without parameters) that changes with the position counts as 1: the cosines of a
    rotary embedding, a mask. shape: of the result, if it is not the call's.
    """
    shape = call.shape if shape is None else shape
    rank = len(shape)
    ids = channel_ids.broadcast(x.ids, rank)
    sizes = torch.Size(factor.shape)
    entries = channel_ids.broadcast(torch.arange(sizes.numel()).reshape(sizes), rank)
    steady = [dim for dim in range(rank) if ids.shape[dim] == 1 < entries.shape[dim]]
    if bool(t.channels.of_kind(ids, "input").any()):
        steady = []  # the input has one id for all channels, but each entry is a channel of its own
    first = entries
    for dim in steady:
        first = first.narrow(dim, 0, 1)
    parents, _, child_of = channel_ids.unique_pairs(ids, first)
    n, live = parents.numel(), parents != 0
    assert factor.static is not None
    if steady and not factor.static.trainable:
        edges = ChannelEdges(torch.arange(n), parents, x.trail)
        group = t.channels.add(n, "position", call.name, [_where_live(edges, live)])
    else:
        rows = _entries_of(entries, steady, child_of, n)  # [n, entries by position]
        count = rows.shape[1]
        child = torch.arange(n).repeat_interleave(count)
        weight = torch.full([n * count], 1.0 / count, dtype=torch.float64) if count > 1 else None
        edges = ChannelEdges(child, parents[child], x.trail, scale, rows.flatten(), weight)
        kind = scale.kind if scale.kind == "batch_norm" else "scale"
        group = t.channels.add(n, kind, call.name, [_where_live(edges, live[child])])
    scaled_ids = torch.where(live, group.ids, 0)[child_of]
    belong(t, factor, scaled_ids, adds=False)
    return Value(shape, scaled_ids)


def _entries_of(entries: Tensor, steady: list[int], child_of: Tensor, n: int) -> Tensor:
    """Returns the entries that scale each of n children, [n, entries along steady dimensions]."""
    sizes = [entries.shape[d] if d in steady else m for d, m in enumerate(child_of.shape)]
    ends = list(range(entries.dim() - len(steady), entries.dim()))
    rows = entries.expand(sizes).movedim(steady, ends).reshape(child_of.numel(), -1)
    element = torch.zeros(n, dtype=torch.int64)
    element[child_of.flatten()] = torch.arange(child_of.numel())  # any element of the child
    return rows[element]


def joined(
    t: Tracer, call: Call, values: list[Value], shape: tuple[int, ...] | None = None
) -> Value:
    """Joins the channels of all values, element by element; shape: if it is not the call's."""
    shape = call.shape if shape is None else shape
    result: Value | None = None
    real: tuple[int, ...] = ()  # the size of what has been joined so far
    for x in values:
        if not x.has_channels:
            continue
        wide = x.passed(call.name, shape, channel_ids.broadcast(x.ids, len(shape)))
        if result is None:
            result, real = wide, x.shape
            continue
        ones = [_stretched(own, other.ids) for own, other in ((real, wide), (x.shape, result))]
        result = _join(t, call, result, wide, (ones[0], ones[1]))
        real = tuple(torch.broadcast_shapes(real, x.shape))
    if result is None:
        return plain(shape)
    for x in values:
        if not x.has_channels:
            belong(t, x, result.ids, adds=True)
    return result


def _stretched(shape: tuple[int, ...], other: Tensor) -> bool:
    """Whether a tensor of this shape is repeated where the channels of another one change."""
    sizes = [1] * (other.dim() - len(shape)) + list(shape)
    return any(n == 1 < m for n, m in zip(sizes, other.shape, strict=True))


def _join(t: Tracer, call: Call, a: Value, b: Value, stretched: tuple[bool, bool]) -> Value:
    """Joins two values; stretched: whether each is repeated along channels of the other."""
    left, right, pair = channel_ids.unique_pairs(a.ids, b.ids)
    channels = t.channels
    root_a, root_b = channels.root(left), channels.root(right)
    same = root_a == root_b
    nothing_a = (left == 0) | channels.of_kind(left, "zero")
    nothing_b = (right == 0) | channels.of_kind(right, "zero")
    measured_b = channels.is_parent(left, root_b)
    measured_a = channels.is_parent(right, root_a)
    t.facts.statistics += [root_b[measured_b], root_a[measured_a]]
    only_a, only_b = nothing_b | measured_b, nothing_a | measured_a
    ids = torch.where(only_a, left, torch.where(only_b, right, torch.where(same, root_a, -1)))
    new = ids == -1
    trail = merged(a.trail, b.trail)
    if bool(new.any()):
        n = int(new.sum())
        half = _rotary(t, left[new], right[new])
        edges = [
            ChannelEdges(torch.arange(n), side[new], x.trail, weight=half, broadcast=one)
            for side, x, one in ((left, a, stretched[0]), (right, b, stretched[1]))
        ]
        group = channels.add(n, "join", call.name, edges)
        ids[new] = group.ids
        trail = ()
    terms = (*(a.terms or (a,)), *(b.terms or (b,))) if bool(new.all()) else ()
    return Value(a.shape, channel_ids.compressed(ids[pair]), trail=trail, terms=terms)


def _rotary(t: Tracer, a: Tensor, b: Tensor) -> Tensor | None:
    """Returns weights 1/2 where both operands are channels times constants of the position.

    Such a sum is a rotation of a pair: cos^2 and sin^2 are 1/2 on average. Else weights 1 or None.
    """
    turned = t.channels.of_kind(a, "position") & t.channels.of_kind(b, "position")
    return torch.where(turned, 0.5, 1.0).double() if bool(turned.any()) else None


@rule("glu")
def _glu(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    halves = x.ids.expand(x.shape).chunk(2, call["dim"])
    parts = [Value(call.shape, channel_ids.compressed(half), trail=x.trail) for half in halves]
    return joined(t, call, parts)
