# SPDX-License-Identifier: MIT
"""Helpers of the rules: new roles, and weights of experts among which data chooses.

A routed weight [E, O, I] has one group per expert. Its output channel o is a channel of kind
"routed" whose parents are channel o of all experts. Where another routed weight reads it (or the
result of element-wise operations on it), expert e reads the channels of expert e.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lap_ext._text import layer_name
from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call, node_key
from lap_ext.topology.channels import ChannelEdges
from lap_ext.topology.noting import belong
from lap_ext.topology.roles import Part, Role
from lap_ext.topology.tracer import Tracer
from lap_ext.topology.value import Value, plain


def weigh(
    t: Tracer,
    call: Call,
    kind: str,
    parameter: str,
    part: Part,
    inputs: tuple[Tensor, Tensor],
    x: Value,
    into: tuple[int, ...],
    dim: int | tuple[int, int],
    positions: int | None = None,
) -> Value:
    """Adds a role whose channels lie along dim of the result (group and channel of the group).

    positions: how often its matrix is applied; None: once for each element of an output channel.
    """
    dims = (dim,) if isinstance(dim, int) else dim
    if positions is None:
        positions = math.prod(call.shape) // max(part.channels[1], 1)
    out = role_of(t, call, parameter, part, inputs, kind, positions, x, into, dims).out
    size = out.size
    rank = len(call.shape)
    shape = [1] * rank
    if isinstance(dim, int):
        shape[dim] = size
    else:
        shape[dim[0]], shape[dim[1]] = part.groups, size // part.groups
    result = Value(call.shape, out.ids.reshape(shape))
    if isinstance(dim, int):
        belong(t, call.get("bias"), result.ids.movedim(dim, -1), adds=True)
    return result


def role_of(
    t: Tracer,
    call: Call,
    parameter: str,
    part: Part,
    inputs: Any,
    kind: str,
    positions: int,
    x: Value | None = None,
    in_dims: tuple[int, ...] = (),
    out_dims: tuple[int, ...] = (),
) -> Role:
    """Adds a role and returns it, without a value for its result."""
    name = layer_name(parameter)
    group = t.channels.add(part.channels[1], "role", name)
    trail = () if x is None else x.trail
    argument = next((n for n, value in enumerate(call.values) if value is x), -1)
    views = (value.view for value in call.values if value.view is not None)
    computation = next((v.computation for v in views if v.parameter == parameter), None)
    role = Role(
        name,
        parameter,
        kind,
        part,
        node_key(call.node),
        inputs,
        group,
        trail,
        argument,
        in_dims,
        out_dims,
        computation,
        positions,
    )
    t.roles.append(role)
    return role


def picked(t: Tracer, call: Call, w: Value, index: Value) -> Any:
    """Indexes a parameter by data: an embedding, or the weights of the tokens' experts."""
    assert w.view is not None
    full = t.full_shape(w.view.parameter)
    if tuple(w.view.meta.shape) != full or not w.view.meta.is_contiguous():
        return t.unknown(call)
    if len(full) == 3:
        return Value(
            call.shape,
            channel_ids.none(len(call.shape)),
            None,
            replace(w.view, routed=index),
        )
    if len(full) != 2:
        return t.unknown(call)
    if w.view.parameter.endswith("bias"):  # of the tokens' experts: a constant, as all biases
        return plain(call.shape)
    nothing = torch.zeros(0, dtype=torch.int64)
    part = Part(full, 1, transposed=True)
    return weigh(
        t,
        call,
        "embedding",
        w.view.parameter,
        part,
        (nothing, nothing),
        index,
        (),
        len(call.shape) - 1,
        positions=0,
    )


def routed(
    t: Tracer, call: Call, parameter: str, part: Part, x: Value, dim: int, out: int, by: Any
) -> Value:
    """Adds a role of experts that by has picked: inputs along dim of x, outputs along out."""
    experts, into = part.groups, x.shape[dim]
    index, ids = channel_ids.pairs_along(x.ids, dim, into)
    by_expert = per_expert(t, ids, experts, by)  # [experts, n]
    inputs = (torch.arange(experts)[:, None] * into + index).flatten()
    pairs = inputs, by_expert.flatten()
    size = part.channels[1] // experts
    positions = math.prod(call.shape) // max(size, 1)
    role = role_of(t, call, parameter, part, pairs, "linear", positions, x, (dim,), (out,))
    role.by_data = True
    edges = ChannelEdges(torch.arange(size).repeat(experts), role.out.ids)
    group = t.channels.add(size, "routed", role.layer, [edges])
    t.routes[len(t.channels.groups) - 1] = by
    shape = [1] * len(call.shape)
    shape[out] = size
    return Value(call.shape, group.ids.reshape(shape))


def per_expert(t: Tracer, ids: Tensor, experts: int, by: Any) -> Tensor:
    """Returns the channels [n] as each expert sees them, [experts, n].

    Channels that another index has routed are the same for all experts: their tokens have mixed.
    """
    channels = t.channels
    result = ids.repeat(experts, 1)
    indices = channels.group_index(ids)
    for index in torch.unique(indices).tolist():
        group = channels.groups[index]
        mask = indices == index
        own, back = torch.unique(ids[mask] - group.first, return_inverse=True)
        if index < 0 or group.kind in ("role", "input", "boundary"):
            continue
        if group.kind == "routed":
            by_expert = group.edges[0].parent.reshape(-1, group.size)
            if by_expert.shape[0] == experts and t.routes[index] is by:
                result[:, mask] = by_expert[:, own][:, back]
            continue
        copies = [_copied(t, edges, own, experts, by) for edges in group.edges]
        if all(same for _, same in copies):
            continue
        edges_copied = [edges for edges, _ in copies]
        copy = channels.add(own.numel() * experts, group.kind, group.name, edges_copied)
        result[:, mask] = copy.ids.reshape(experts, -1)[:, back]
    return result


def _copied(
    t: Tracer, edges: ChannelEdges, children: Tensor, experts: int, by: Any
) -> tuple[ChannelEdges, bool]:
    """Copies the edges of some children for each expert; tells whether all parents are the same."""
    used = torch.isin(edges.child, children)
    parents = per_expert(t, edges.parent[used], experts, by)
    child = torch.searchsorted(children, edges.child[used])
    child = (torch.arange(experts)[:, None] * children.numel() + child).flatten()

    def again(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[used].repeat(experts)

    copy = replace(
        edges,
        child=child,
        parent=parents.flatten(),
        entry=again(edges.entry),
        weight=again(edges.weight),
    )
    return copy, bool((parents == edges.parent[used]).all())
