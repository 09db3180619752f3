# SPDX-License-Identifier: MIT
"""Complex numbers: pairs of channels, which a rotary embedding turns.

view_as_complex, complex   a channel of kind "complex" for each pair: its real and imaginary part
moves                      move it
times a constant           turns the pair by an angle of the position: both parts of the result come
                           from both parts of the pair, each with cos^2 and sin^2, 1/2 on average,
                           as where it is written with cosines and sines (joins.py)
view_as_real, real, imag   the parts again
"""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.channels import ChannelEdges
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, merged, plain


@rule("view_as_complex", "complex")
def _pair(t: Tracer, call: Call) -> Result:
    if call.name == "complex":
        sides = [channel_ids.broadcast(x.ids, len(call.shape)) for x in call.values]
    else:
        ids = call["self"].ids
        sides = [ids.select(-1, 0), ids.select(-1, -1)]
    if not any(bool((ids != 0).any()) for ids in sides):
        return plain(call.shape)
    real, imaginary, pair = channel_ids.unique_pairs(*sides)
    group = _computed(t, call, "complex", real, imaginary, None)
    t.pairs[len(t.channels.groups) - 1] = real, imaginary
    trail = merged(*(x.trail for x in call.values), (call.name,))
    return Value(call.shape, torch.where((real | imaginary) != 0, group, 0)[pair], trail=trail)


@rule("view_as_real", "real", "imag")
def _parts(t: Tracer, call: Call) -> Result:
    x = call["self"]
    real, imaginary = _sides(t, x.ids)
    ids = {"real": real, "imag": imaginary}.get(call.name)
    ids = torch.stack([real, imaginary], -1) if ids is None else ids
    return x.passed(call.name, call.shape, channel_ids.compressed(ids))


def paired(t: Tracer, values: list[Value]) -> bool:
    """Whether one of some values has pairs of channels that are not turned yet."""
    return (
        any(bool(t.channels.of_kind(x.ids, "complex").any()) for x in values) if t.pairs else False
    )


def turned(t: Tracer, call: Call, values: list[Value]) -> Value:
    """Multiplies pairs of channels by complex numbers of modulus 1, or by others by position."""
    with_channels = [x for x in values if x.has_channels]
    rest = [x for x in values if not x.has_channels and not (x.static and x.static.trainable)]
    if len(with_channels) != 1 or len(rest) != 1 or not _turns(t, rest[0], with_channels[0]):
        unknown: Value = t.unknown(call)
        return unknown
    x = with_channels[0]
    ids, back = torch.unique(x.ids, return_inverse=True)
    weight = torch.full(ids.shape, 0.5, dtype=torch.float64)
    group = _computed(t, call, "join", *_sides(t, ids), weight)
    ids = channel_ids.broadcast(torch.where(ids != 0, group, 0)[back], len(call.shape))
    return Value(call.shape, ids, trail=(*x.trail, call.name))


def _turns(t: Tracer, factor: Value, x: Value) -> bool:
    """Whether a factor is the same for all channels of a position, or has modulus 1."""
    constant = t.constant(factor)
    if constant is None or bool(((constant.abs() - 1).abs() < 1e-3).all()):
        return True
    rank = max(len(factor.shape), len(x.shape))
    ids = channel_ids.broadcast(x.ids, rank)
    sizes = [1] * (rank - len(factor.shape)) + list(factor.shape)
    return any(m == 1 < n for m, n in zip(ids.shape, sizes, strict=True))


def _computed(
    t: Tracer, call: Call, kind: str, real: Tensor, imaginary: Tensor, weight: Tensor | None
) -> Tensor:
    """Adds channels that are computed from both parts of pairs, and returns them."""
    edges = []
    for part in (real, imaginary):
        child = torch.nonzero(part).flatten()
        share = None if weight is None else weight[child]
        edges.append(ChannelEdges(child, part[child], weight=share))
    return t.channels.add(real.numel(), kind, call.name, edges).ids


def _sides(t: Tracer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the real and the imaginary part of each; other channels are both parts."""
    real, imaginary = ids.clone(), ids.clone()
    indices = t.channels.group_index(ids)
    for index in torch.unique(indices).tolist():
        if index in t.pairs:
            mask = indices == index
            own = ids[mask] - t.channels.groups[index].first
            real[mask], imaginary[mask] = (part[own] for part in t.pairs[index])
    return real, imaginary
