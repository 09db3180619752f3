# SPDX-License-Identifier: MIT
"""Operations that move data: they are run on the labels themselves.

Where a constant is joined to a tensor along a dimension in which channels do not change (a class
token before the patches, padding around an image), the channels go on through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lap_ext.topology import labels as lab
from lap_ext.topology.call import Call, mapped
from lap_ext.topology.rules.mixing import mixed
from lap_ext.topology.rules.routing import picked
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, merged, plain

_FLOAT_ONLY = {"pixel_shuffle", "pixel_unshuffle", "im2col", "channel_shuffle", "pad"}


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def _reshape(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    return x.passed(call.name, call.shape, lab.reshaped(x.labels, x.shape, call.shape))


@rule(
    "permute", "transpose", "t", "numpy_T", "mT", "adjoint", "movedim", "moveaxis", "swapaxes",
    "swapdims", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "select", "slice",
    "narrow", "flip", "roll", "repeat", "tile", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "unfold", "im2col", "rot90", "diagonal", "atleast_2d", "atleast_3d",
)  # fmt: skip
def _move(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    moved = _run(call, call.args, call.kwargs)
    return x.passed(call.name, call.shape, lab.compressed(moved))


@rule(
    "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk"
)
def _split(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    parts = _run(call, call.args, call.kwargs)
    return [
        x.passed(call.name, shape, lab.compressed(part))
        for part, shape in zip(parts, call.shapes, strict=True)
    ]


@rule("repeat_interleave")
def _repeat_interleave(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    repeats, dim = call["repeats"], call.get("dim")
    if not isinstance(repeats, int) or dim is None:
        return t.unknown(call)
    moved = lab.compressed(_expanded(x).repeat_interleave(repeats, dim))
    return x.passed(call.name, call.shape, moved)


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _cat(t: Tracer, call: Call) -> Result:
    values = [x for x in call.values if x.shape != (0,)]
    dim = call.get("dim", 0) % len(call.shape)
    if call.name in {"cat", "concat", "concatenate"}:
        through = _through(values, dim)
        if through is not None:
            return through.passed(call.name, call.shape, through.labels)
    expanded = [_expanded(x) for x in values]
    if call.name in {"cat", "concat", "concatenate"}:
        moved = torch.cat(expanded, dim)
    elif call.name == "stack":
        moved = torch.stack(expanded, dim)
    else:
        moved = {"hstack": torch.hstack, "vstack": torch.vstack}[call.name](expanded)
    joined = Value(call.shape, lab.none(len(call.shape)), trail=merged(*(x.trail for x in values)))
    return joined.passed(call.name, call.shape, lab.compressed(moved))


def _through(values: list[Value], dim: int) -> Value | None:
    """The tensor that goes on through its constant companions, if it is the only one."""
    found = [x for x in values if x.has_channels]
    if len(found) == len(values) or not found:
        return None
    first = found[0]
    same = all(torch.equal(x.labels, first.labels) for x in found)
    steady = first.labels.shape[dim] == 1 and all(x.shape[dim] > 1 for x in found)
    return first if same and steady else None


@rule("pad", "constant_pad_nd")
def _pad(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    padded = [x.labels.dim() - 1 - place // 2 for place, n in enumerate(call["pad"]) if n]
    if all(x.labels.shape[dim] == 1 for dim in padded):
        grown = any(x.shape[dim] == 1 for dim in padded)  # one channel more: not the same one
        if not grown or call.get("mode", "constant") != "constant":
            return x.passed(call.name, call.shape, x.labels)
    mode, value = call.get("mode", "constant"), call.get("value")
    args = (mode, None) if mode != "constant" else (mode, 0.0)
    zero = t.channels.zero() if mode == "constant" and not value else 0
    moved = torch.nn.functional.pad(_expanded(x).double() - zero, call["pad"], *args).long() + zero
    return x.passed(call.name, call.shape, lab.compressed(moved))


@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def _pad_image(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    dims = range(len(x.shape) - len(call["padding"]) // 2, len(x.shape))
    if any(x.labels.shape[dim] > 1 for dim in dims):
        return t.unknown(call)
    return x.passed(call.name, call.shape, x.labels)


@rule("slice_scatter", "select_scatter")
def _scatter_part(t: Tracer, call: Call) -> Result:
    x, src = call.values[:2]
    if call.name == "slice_scatter" and not x.has_channels:
        dim = call["dim"]
        if src.shape[dim] > 1 == src.labels.shape[dim]:  # a part of the positions
            return src.passed(call.name, call.shape, src.labels)
    moved = _run(call, call.args, call.kwargs)
    trail = merged(x.trail, src.trail)
    return Value(call.shape, lab.compressed(moved), trail=(*trail, call.name))


@rule("index", "_unsafe_index")
def _index(t: Tracer, call: Call) -> Result:
    x, indices = call["self"], call["indices"]
    if x.view is not None and len(indices) == 1:
        return picked(t, call, x, indices[0])
    if not x.has_channels:
        return t.unknown(call) if x.static is not None and x.static.trainable else plain(call.shape)
    labels, shape = x.labels, call.shape
    known: list[Tensor | None] = []  # the places, one index a dimension; None: all
    for index in indices:
        dim = len(known)
        found = None if index is None else t.constant(index)
        if index is None:
            known.append(None)
        elif found is not None and found.dtype == torch.bool:
            known += found.nonzero(as_tuple=True)
        elif found is not None or labels.shape[dim] == 1:
            known.append(torch.zeros(index.shape, dtype=torch.int64) if found is None else found)
        elif index.static is not None:  # a constant without values
            return t.unknown(call)
        else:  # by data: any channel may come
            labels = mixed(t.channels, call.name, labels, [dim])
            known.append(torch.zeros(index.shape, dtype=torch.int64))
    known = [None if places is None else places * (labels.shape[dim] > 1)
             for dim, places in enumerate(known)]  # fmt: skip
    sizes = [n if labels.shape[d] > 1 or d >= len(known) or known[d] is None else 1
             for d, n in enumerate(x.shape)]  # fmt: skip
    moved = torch.ops.aten.index.Tensor(labels.expand(sizes), known)
    return x.passed(call.name, shape, lab.compressed(moved))


@rule("index_select", "gather", "take_along_dim")
def _gather(t: Tracer, call: Call) -> Result:
    x, index, dim = call["self"], call.get("index", call.get("indices")), call["dim"]
    if call.name == "index_select" and x.view is not None and dim == 0:
        return picked(t, call, x, index)
    if x.static is not None and x.static.trainable:
        return t.unknown(call)
    labels = x.labels
    if len(labels.shape) and labels.shape[dim] > 1:
        known = t.constant(index) if call.name == "index_select" else None
        if known is not None:
            moved = labels.expand(x.shape).index_select(dim, known.long())
            return x.passed(call.name, call.shape, lab.compressed(moved))
        labels = mixed(t.channels, call.name, labels, [dim % len(x.shape)])
    for other, n in enumerate(call.shape):  # gather reads the first n of any other dimension
        labels = labels.narrow(other, 0, min(n, labels.shape[other]))
    return x.passed(call.name, call.shape, labels)


def _expanded(x: Value) -> Tensor:
    return x.labels.expand(x.shape)


def _run(call: Call, args: Any, kwargs: Any) -> Any:
    """The operation on labels in place of tensors."""

    def labels(x: Any) -> Any:
        if not isinstance(x, Value):
            return x
        return _expanded(x).double() if call.name in _FLOAT_ONLY else _expanded(x)

    result = call.target(*mapped(args, labels), **mapped(kwargs, labels))
    return result.long() if isinstance(result, Tensor) else result
