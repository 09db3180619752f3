# SPDX-License-Identifier: MIT
"""Products of two activations: attention, written out or fused.

q k^T      contracts channels: q and k are each other's neighbors (the logit is bilinear, so that
           the distortion of one weight of q's layer is |w| * in_norm * ||row of k's||); the logits
           carry no channels
a v        contracts positions: the channels of v continue; the channels of the attention weights a
           (a softmax over positions, or over the rows of a matrix of channels) end here, also where
           the product is written out as a multiplication and a sum
otherwise  where the channel of one operand does not change along the contracted dimension: an
           element-wise product, summed
"""

from __future__ import annotations

from torch import Tensor, fx

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.noting import heads, logits_before
from lap_ext.topology.rules.joins import joined, weights_of_positions
from lap_ext.topology.rules.mixing import mixed, projected
from lap_ext.topology.rules.states import read
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, plain
from lap_ext.topology.work import attention


def product(
    t: Tracer,
    call: Call,
    a: Value,
    b: Value,
    shape: tuple[int, ...] | None = None,
    gate: bool = False,
) -> Value | None:
    """Multiplies a [..., m, k] by b [..., k, n]; None where channels cannot be followed.

    shape: of the result, if it is not the call's. gate: one of them has a vector where the other
    has matrices, so that the result is their element-wise product, summed.
    """
    shape = call.shape if shape is None else shape
    if len(a.shape) < 2 or len(b.shape) < 2:
        return None
    rank = len(shape)
    left, right = channel_ids.broadcast(a.ids, rank), channel_ids.broadcast(b.ids, rank)
    changes_a, changes_b = left.shape[-1] > 1, right.shape[-2] > 1
    if not a.has_channels and not b.has_channels:
        return plain(shape)
    if a.has_channels and b.has_channels:
        weights = weights_of_positions(t, a, b)
        if weights is a:
            t.end(a, "attention")
            _note_heads(t, call, left, right)
            return b.passed(call.name, shape, mixed(t.channels, call.name, right, [rank - 2]))
        if weights is b:
            t.end(b, "attention")
            return a.passed(call.name, shape, mixed(t.channels, call.name, left, [rank - 1]))
        if changes_a and changes_b and not gate:
            if left.shape[-2] > 1 or right.shape[-1] > 1:  # they are channels, not logits
                return _read(t, call, left, right, shape)
            _couple(t, left, right)
            t.logits[call.node] = left, right.mT
            return plain(shape)
    if b.has_channels and a.static is None and not changes_b:
        _note_heads(t, call, left, right)
    for x, other, ids, dim, flipped in (
        (a, b, left, rank - 1, False),
        (b, a, right, rank - 2, True),
    ):
        if other.static is not None and ids.shape[dim] > 1:  # a constant matrix over channels
            if len(other.shape) > 2:
                return None
            result = projected(t.channels, call.name, ids, dim, other.static, shape[dim], flipped)
            return None if result is None else Value(shape, result, trail=x.trail)
    terms = []
    for x, ids, dim in ((a, left, rank - 1), (b, right, rank - 2)):
        summed = mixed(t.channels, call.name, ids, [dim])
        terms.append(Value(shape, summed, trail=x.trail))
    return joined(t, call, terms, shape)


def _note_heads(t: Tracer, call: Call, weights: Tensor, value: Tensor) -> None:
    """Notes the heads of an attention that is written out, at the product with its values."""
    node = next((x for x in call.node.all_input_nodes if _is_first(call, x)), None)
    logits = None if node is None else logits_before(node, t.logits)
    if logits is not None:
        bias = weights if bool((weights != 0).any()) else None
        heads(t, call, *logits, value, bias)


def _is_first(call: Call, node: fx.Node) -> bool:
    """Whether a node is the first operand of a product."""
    return next((x for x in call.node.args if isinstance(x, fx.Node)), None) is node


def _read(
    t: Tracer, call: Call, left: Tensor, right: Tensor, shape: tuple[int, ...]
) -> Value | None:
    """Reads channels out of the one operand that is a state (states.py)."""
    if left.shape[-2] > 1 and right.shape[-1] > 1:
        return None
    flipped = right.shape[-1] > 1
    ids = read(t, call, right.mT, left) if flipped else read(t, call, left, right.mT)
    return None if ids is None else Value(shape, ids.mT if flipped else ids, trail=(call.name,))


def _couple(t: Tracer, left: Tensor, right: Tensor) -> None:
    """Couples channels that are multiplied with each other: left [..., m, k], right [..., k, n]."""
    t.couple(left.unsqueeze(-1), right.unsqueeze(-3))


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
      "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_cudnn_attention")  # fmt: skip
def _attention(t: Tracer, call: Call) -> Result:
    query, key, value = call["query"], call["key"], call["value"]
    key, value = (_repeated(query, x) for x in (key, value))
    t.facts.products += attention(query, key, value)
    if query.has_channels and key.has_channels:
        _couple(t, query.ids, key.ids.transpose(-1, -2))
    else:  # one of them is a constant, such as a learned query
        t.end(query, "attention")
        t.end(key, "attention")
    bias = None
    if isinstance(call.get("attn_mask"), Value):
        t.end(call["attn_mask"], "attention")
        bias = call["attn_mask"].ids
    heads(t, call, query.ids, key.ids, value.ids, bias)
    ids = mixed(t.channels, call.name, value.ids, [len(value.shape) - 2])
    result = value.passed(call.name, call.shape, ids)
    result = result if value.has_channels else plain(call.shape)
    return result if len(call.shapes) == 1 else [result, *map(plain, call.shapes[1:])]


def _repeated(query: Value, x: Value) -> Value:
    """Repeats keys or values for the query's heads (grouped-query attention)."""
    if len(query.shape) < 3 or x.shape[-3] in (1, query.shape[-3]) or x.ids.shape[-3] == 1:
        return x
    ids = x.ids.repeat_interleave(query.shape[-3] // x.shape[-3], -3)
    shape = (*x.shape[:-3], query.shape[-3], *x.shape[-2:])
    return Value(shape, ids, trail=x.trail)
