# SPDX-License-Identifier: MIT
"""Weighted layers: each use of a weight is a role, and its outputs are new channels.

Linear (also as addmm, mm or matmul with a weight, on either side), batched weights [E, I, O],
convolutions and their transposes, embeddings.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.roles import Part, part_of
from lap_ext.topology.rules.attention import product
from lap_ext.topology.rules.fixed import filtered, is_fixed
from lap_ext.topology.rules.joins import by_number, joined
from lap_ext.topology.rules.mixing import projected
from lap_ext.topology.rules.routing import routed, weigh
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, WeightView


@rule("linear")
def _linear(t: Tracer, call: Call) -> Result:
    x, w = call["input"], call["weight"]
    if is_fixed(w):
        dim = x.ids.dim() - 1
        ids = projected(t.channels, call.name, x.ids, dim, w.static, w.shape[0], flipped=True)
        return t.unknown(call) if ids is None else Value(call.shape, ids, trail=x.trail)
    return _times_weight(t, call, x, w, flipped=False)


@rule("addmm", "mm", "mv", "matmul", "bmm", "baddbmm")
def _matmul(t: Tracer, call: Call) -> Result:
    """Handles a product, or beta * self + alpha * product."""
    result = _multiplied(t, call)
    if call.name not in {"addmm", "baddbmm"} or not isinstance(result, Value):
        return result
    terms = ((call["self"], call["beta"]), (result, call["alpha"]))
    return joined(t, call, [by_number(t, call, x, float(factor)) for x, factor in terms])


def _multiplied(t: Tracer, call: Call) -> Result:
    a, b = call.get("mat1", call.get("batch1")), call.get("mat2", call.get("batch2"))
    if a is None:
        a, b = call.values[0], call.values[1]
    if b is None:
        b = call["mat2"]
    if b.view is not None and a.view is None:
        if b.view.routed:
            return _routed(t, call, a, b, dim=-1)
        return _times_weight(t, call, a, b, flipped=True)
    if a.view is not None and b.view is None:
        if a.view.routed:
            return _routed(t, call, b, a, dim=-2)
        return _weight_times(t, call, a, b)
    if (b.static is not None and b.static.trainable) or (
        a.static is not None and a.static.trainable
    ):
        return t.unknown(call)
    result = product(t, call, a, b)
    return t.unknown(call) if result is None else result


def _times_weight(t: Tracer, call: Call, x: Value, w: Value, flipped: bool) -> Result:
    """Multiplies x [..., I] by w [O, I], w [I, O] when flipped, or, x [E, ..., I], w [E, I, O]."""
    if w.view is None or len(w.shape) not in (2, 3):
        return t.unknown(call)
    if len(w.shape) == 3:
        return _batched(t, call, x, w)
    view = WeightView(w.view.parameter, w.view.meta.t() if flipped else w.view.meta)
    part = part_of(view, t.full_shape(view.parameter))
    if part is None:
        return t.unknown(call)
    pairs = channel_ids.pairs_along(x.ids, x.ids.dim() - 1, x.shape[-1])
    into, out = (len(x.shape) - 1,), len(call.shape) - 1
    return weigh(t, call, "linear", view.parameter, part, pairs, x, into, out)


def _weight_times(t: Tracer, call: Call, w: Value, x: Value) -> Result:
    """Multiplies w [O, I] by x [..., I, N]."""
    if w.view is None or len(w.shape) != 2:
        return t.unknown(call)
    part = part_of(w.view, t.full_shape(w.view.parameter))
    if part is None:
        return t.unknown(call)
    dim = max(x.ids.dim() - 2, 0)
    pairs = channel_ids.pairs_along(x.ids, dim, x.shape[dim])
    out = max(len(call.shape) - 2, 0) if len(x.shape) > 1 else len(call.shape) - 1
    return weigh(t, call, "linear", w.view.parameter, part, pairs, x, (dim,), out)


def _routed(t: Tracer, call: Call, x: Value, w: Value, dim: int) -> Result:
    """Multiplies x [S, 1, I] by w[e] [S, I, O], or w[e] [S, O, I] by x [S, I, 1]; data picks e."""
    assert w.view is not None
    part = _experts(t, w.view, inner=dim == -2)
    if part is None or x.ids.shape[0] > 1:
        return t.unknown(call)
    out = len(call.shape) + (-1 if dim == -1 else -2)
    return routed(t, call, w.view.parameter, part, x, dim % len(x.shape), out, w.view.routed)


@rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
def _grouped(t: Tracer, call: Call) -> Result:
    """Multiplies x [S, I], rows sorted by expert, by w [E, I, O]; offsets mark the rows."""
    x, w = call.values[:2]
    if w.view is None or len(w.shape) != 3 or len(x.shape) != 2 or x.ids.shape[0] > 1:
        return t.unknown(call)
    part = _experts(t, w.view, inner=False)
    if part is None:
        return t.unknown(call)
    return routed(t, call, w.view.parameter, part, x, 1, 1, call.get("offs"))


def _experts(t: Tracer, view: WeightView, inner: bool) -> Part | None:
    """Finds the part of a view [E, I, O] (inner: [E, O, I]) of a full parameter; else None."""
    full = t.full_shape(view.parameter)
    meta = view.meta.transpose(1, 2) if inner and view.meta.dim() == 3 else view.meta
    if meta.dim() != 3 or len(full) != 3 or meta.shape[0] != full[0] or meta.storage_offset():
        return None
    strides = meta.stride()
    stored_out_in = strides == (full[1] * full[2], 1, full[2])
    stored_in_out = strides == (full[1] * full[2], full[2], 1)
    if not (stored_out_in or stored_in_out):
        return None
    return Part((full[0] * full[1], full[2]), full[0], transposed=not stored_out_in)


def _batched(t: Tracer, call: Call, x: Value, w: Value) -> Result:
    """Multiplies x [E, N, I] by w [E, I, O], a view of a parameter; one group per expert."""
    assert w.view is not None
    part = _experts(t, w.view, inner=False)
    if part is None or len(x.shape) != 3:
        return t.unknown(call)
    experts, into = w.shape[:2]
    ids = x.ids.movedim(1, -1)  # [E or 1, I or 1, N or 1]
    flat = channel_ids.reshaped(ids, (experts, into, x.shape[1]), (experts * into, x.shape[1]))
    pairs = channel_ids.pairs_along(flat, 0, experts * into)
    return weigh(t, call, "linear", w.view.parameter, part, pairs, x, (0, 2), (0, 2))


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution",
      "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")  # fmt: skip
def _convolution(t: Tracer, call: Call) -> Result:
    x, w = call["input"], call["weight"]
    transposed = "transpose" in call.name or bool(call.get("transposed", False))
    spatial = len(w.shape) - 2
    dim = len(x.shape) - 1 - spatial
    if is_fixed(w):
        return filtered(t, call, x, w, dim, transposed)
    part = None if w.view is None else _kernel(w.view, t.full_shape(w.view.parameter), w.shape)
    if w.view is None or part is None or (call["groups"] > 1 and not _by_group(part)):
        return t.unknown(call)
    part = replace(part, groups=call["groups"], transposed=transposed)
    pairs = channel_ids.pairs_along(x.ids, dim, x.shape[dim])
    kind = f"conv_transpose{spatial}d" if transposed else f"conv{spatial}d"
    at = math.prod(x.shape) // max(x.shape[dim], 1) if transposed else None
    return weigh(t, call, kind, w.view.parameter, part, pairs, x, (dim,), dim, at)


def _kernel(view: WeightView, full: tuple[int, ...], shape: tuple[int, ...]) -> Part | None:
    """Finds the part [rows, cols, *window] that a view shows of a kernel; None if not a block."""
    if _is_full(view, full, shape):
        return Part(shape)
    strides = torch.empty(full, device="meta").stride()
    if len(full) != len(shape) or view.meta.stride() != strides or full[2:] != shape[2:]:
        return None
    top, rest = divmod(int(view.meta.storage_offset()), strides[0])
    left = rest // strides[1]
    rows = None if shape[0] == full[0] else (top, top + shape[0])
    return Part(full, 1, False, rows, None if shape[1] == full[1] else (left, left + shape[1]))


def _by_group(part: Part) -> bool:
    """Whether a part has whole groups, from the first one on."""
    return part.cols is None and (part.rows is None or part.rows[0] == 0)


@rule("embedding", "embedding_bag")
def _embedding(t: Tracer, call: Call) -> Result:
    w = call["weight"]
    part = None if w.view is None else _kernel(w.view, t.full_shape(w.view.parameter), w.shape)
    if w.view is None or part is None:
        return t.unknown(call)
    empty = torch.zeros(0, dtype=torch.int64)
    part = replace(part, transposed=True)  # rows are inputs: the entries
    indices = call["indices"]
    result = weigh(
        t,
        call,
        "embedding",
        w.view.parameter,
        part,
        (empty, empty),
        indices,
        (),
        len(call.shape) - 1,
        positions=0,
    )
    return [result, *[None] * (len(call.shapes) - 1)] if len(call.shapes) > 1 else result


def _is_full(view: WeightView, full: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a view is the full parameter, up to dimensions of size 1."""
    return (
        view.meta.is_contiguous()
        and torch.Size(full).numel() == torch.Size(shape).numel()
        and (tuple(full[:2]) == tuple(shape[:2]))
    )
