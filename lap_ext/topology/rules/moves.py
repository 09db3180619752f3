# SPDX-License-Identifier: MIT
"""Operations that move data: they are applied to the channel ids themselves.

Where a constant is joined to a tensor along a dimension in which channels do not change (a class
token before the patches, padding around an image), its elements take the tensor's channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call, mapped
from lap_ext.topology.noting import belong, parts, split
from lap_ext.topology.rules.mixing import mixed
from lap_ext.topology.rules.routing import picked
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, merged, plain

_FLOAT_ONLY = {"pixel_shuffle", "pixel_unshuffle", "im2col", "channel_shuffle", "pad"}


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def _reshape(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    ids = channel_ids.reshaped(x.ids, x.shape, call.shape)
    split(t, call, x, ids, call.shape)
    return x.passed(call.name, call.shape, ids)


@rule(
    "permute", "transpose", "t", "numpy_T", "mT", "adjoint", "movedim", "moveaxis", "swapaxes",
    "swapdims", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "select", "slice",
    "narrow", "flip", "roll", "repeat", "tile", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "unfold", "rot90", "diagonal", "atleast_2d", "atleast_3d",
)  # fmt: skip
def _move(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    moved = _applied(call, call.args, call.kwargs)
    return x.passed(call.name, call.shape, channel_ids.compressed(moved))


@rule("im2col")
def _unfold(t: Tracer, call: Call) -> Result:
    """Lays out windows [N, C * window, L]; padding takes the channels that it is around."""
    x = call["self"]
    if max(x.ids.shape[-2:]) > 1:
        moved = _applied(call, call.args, call.kwargs)
        return x.passed(call.name, call.shape, channel_ids.compressed(moved))
    taps = torch.Size(call["kernel_size"]).numel()
    ids = x.ids.flatten(-2).expand(*x.ids.shape[:-3], x.shape[-3], 1).repeat_interleave(taps, -2)
    return x.passed(call.name, call.shape, channel_ids.compressed(ids))


@rule("_add_batch_dim", "_remove_batch_dim")
def _mapped(t: Tracer, call: Call) -> Result:
    """Follows torch.vmap over positions: inside it, their dimension is not there."""
    x, *_, dim = call.args
    if call.name == "_add_batch_dim":
        dim = call.args[1] % len(x.shape)
        known = x.ids.shape[dim] == 1 and x.view is None
        return x.passed(call.name, call.shape, x.ids.squeeze(dim)) if known else t.unknown(call)
    return x.passed(call.name, call.shape, x.ids.unsqueeze(dim))


@rule(
    "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk"
)
def _split(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    dim = call.get("dim", 0)
    if call.name != "unbind" and x.ids.dim() and x.ids.shape[dim] == 1:  # whatever the sizes are
        return [x.passed(call.name, shape, x.ids) for shape in call.shapes]
    moved = _applied(call, call.args, call.kwargs)
    if call.name in {"chunk", "unsafe_chunk"}:
        parts(t, call, list(moved), dim % len(x.shape))
    return [
        x.passed(call.name, shape, channel_ids.compressed(ids))
        for ids, shape in zip(moved, call.shapes, strict=True)
    ]


@rule("repeat_interleave")
def _repeat_interleave(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    repeats, dim = call["repeats"], call.get("dim")
    if not isinstance(repeats, int) or dim is None:
        return t.unknown(call)
    moved = channel_ids.compressed(_expanded(x).repeat_interleave(repeats, dim))
    return x.passed(call.name, call.shape, moved)


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _cat(t: Tracer, call: Call) -> Result:
    values = [x for x in call.values if x.shape != (0,)]
    dim = call.get("dim", 0) % len(call.shape)
    if call.name in {"cat", "concat", "concatenate"}:
        through = _through(values, dim)
        if through is not None:
            for x in values:
                if not x.has_channels:  # a class token
                    belong(t, x, through.ids, adds=True)
            return through.passed(call.name, call.shape, through.ids)
    expanded = [_expanded(x) for x in values]
    if call.name in {"cat", "concat", "concatenate"}:
        moved = torch.cat(expanded, dim)
    elif call.name == "stack":
        moved = torch.stack(expanded, dim)
    else:
        moved = {"hstack": torch.hstack, "vstack": torch.vstack}[call.name](expanded)
    joined = Value(
        call.shape, channel_ids.none(len(call.shape)), trail=merged(*(x.trail for x in values))
    )
    return joined.passed(call.name, call.shape, channel_ids.compressed(moved))


def _through(values: list[Value], dim: int) -> Value | None:
    """Returns the tensor whose channels the joined constants take; None if there is none."""
    live = [x for x in values if x.has_channels]
    if len(live) == len(values) or not live:
        return None
    first = live[0]
    same = all(torch.equal(x.ids, first.ids) for x in live)
    steady = first.ids.shape[dim] == 1 and all(x.shape[dim] > 1 for x in live)
    return first if same and steady else None


@rule("pad", "constant_pad_nd")
def _pad(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    padded = [x.ids.dim() - 1 - i // 2 for i, n in enumerate(call["pad"]) if n]
    if all(x.ids.shape[dim] == 1 for dim in padded):
        grown = any(x.shape[dim] == 1 for dim in padded)  # an additional channel, not the same one
        if not grown or call.get("mode", "constant") != "constant":
            return x.passed(call.name, call.shape, x.ids)
    mode, value = call.get("mode", "constant"), call.get("value")
    args = (mode, None) if mode != "constant" else (mode, 0.0)
    zero = t.channels.zero() if mode == "constant" and not value else 0
    moved = torch.nn.functional.pad(_expanded(x).double() - zero, call["pad"], *args).long() + zero
    return x.passed(call.name, call.shape, channel_ids.compressed(moved))


@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def _pad_image(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    dims = range(len(x.shape) - len(call["padding"]) // 2, len(x.shape))
    if any(x.ids.shape[dim] > 1 for dim in dims):
        return t.unknown(call)
    return x.passed(call.name, call.shape, x.ids)


@rule("slice_scatter", "select_scatter")
def _scatter_part(t: Tracer, call: Call) -> Result:
    x, src = call.values[:2]
    if call.name == "slice_scatter" and not x.has_channels:
        dim = call["dim"]
        if src.shape[dim] > 1 == src.ids.shape[dim]:  # some of the positions
            return src.passed(call.name, call.shape, src.ids)
    moved = _applied(call, call.args, call.kwargs)
    trail = merged(x.trail, src.trail)
    return Value(call.shape, channel_ids.compressed(moved), trail=(*trail, call.name))


@rule("index", "_unsafe_index")
def _index(t: Tracer, call: Call) -> Result:
    x, indices = call["self"], call["indices"]
    if x.view is not None and len(indices) == 1:
        return picked(t, call, x, indices[0])
    if not x.has_channels:
        return t.unknown(call) if x.static is not None and x.static.trainable else plain(call.shape)
    ids, shape = x.ids, call.shape
    known: list[Tensor | None] = []  # constant indices by dimension; None: all
    nodes: Any = call.node.args[1]
    for index, chosen in zip(indices, nodes, strict=True):
        dim = len(known)
        constant = None if index is None else t.constant(index)
        if index is None:
            known.append(None)
        elif constant is None and chosen.meta["val"].dtype == torch.bool:  # positions, by data
            if any(n > 1 for n in ids.shape[dim : dim + len(index.shape)]):
                return t.unknown(call)
            known += [torch.zeros(1, dtype=torch.int64)] * len(index.shape)
        elif constant is not None and constant.dtype == torch.bool:
            known += constant.nonzero(as_tuple=True)
        elif constant is not None:
            known.append(constant)
        elif ids.shape[dim] == 1:
            known.append(torch.zeros(index.shape, dtype=torch.int64))
        elif index.static is not None:  # a constant without values
            return t.unknown(call)
        else:  # by data: any channel may come
            ids = mixed(t.channels, call.name, ids, [dim])
            known.append(torch.zeros(index.shape, dtype=torch.int64))
    known = [None if x is None else x * (ids.shape[dim] > 1) for dim, x in enumerate(known)]
    sizes = [
        n if ids.shape[d] > 1 or d >= len(known) or known[d] is None else 1
        for d, n in enumerate(x.shape)
    ]
    moved = torch.ops.aten.index.Tensor(ids.expand(sizes), known)
    return x.passed(call.name, shape, channel_ids.compressed(moved))


@rule("index_select", "gather", "take_along_dim")
def _gather(t: Tracer, call: Call) -> Result:
    x, index, dim = call["self"], call.get("index", call.get("indices")), call["dim"]
    if call.name == "index_select" and x.view is not None and dim == 0:
        return picked(t, call, x, index)
    if x.static is not None and x.static.trainable:
        return t.unknown(call)
    ids = x.ids
    if len(ids.shape) and ids.shape[dim] > 1:
        known = t.constant(index) if call.name == "index_select" else None
        if known is not None:
            moved = ids.expand(x.shape).index_select(dim, known.long())
            return x.passed(call.name, call.shape, channel_ids.compressed(moved))
        ids = mixed(t.channels, call.name, ids, [dim % len(x.shape)])
    for other, n in enumerate(call.shape):  # gather reads the first n of any other dimension
        ids = ids.narrow(other, 0, min(n, ids.shape[other]))
    return x.passed(call.name, call.shape, ids)


def _expanded(x: Value) -> Tensor:
    return x.ids.expand(x.shape)


def _applied(call: Call, args: Any, kwargs: Any) -> Any:
    """Applies the operation to channel ids in place of tensors."""

    def ids_of(x: Any) -> Any:
        if not isinstance(x, Value):
            return x
        return _expanded(x).double() if call.name in _FLOAT_ONLY else _expanded(x)

    result = call.target(*mapped(args, ids_of), **mapped(kwargs, ids_of))
    return result.long() if isinstance(result, Tensor) else result
