# SPDX-License-Identifier: MIT
"""Helpers of the rules, no rules: new roles, and weights of experts among which data chooses.

A routed weight [E, O, I] is one group an expert. Its output channel o is a channel of kind "routed"
whose parents are channel o of all experts; where another routed weight reads it (or what was made
of it element by element), expert e reads what expert e has made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lap_ext._text import layer_name
from lap_ext.topology import labels as lab
from lap_ext.topology.call import Call
from lap_ext.topology.channels import Arcs
from lap_ext.topology.roles import Part, Role
from lap_ext.topology.tracer import Tracer
from lap_ext.topology.value import Value, WeightView, plain


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
) -> Value:
    """A new role; its channels lie along dim of the result (group and channel of the group)."""
    dims = (dim,) if isinstance(dim, int) else dim
    space = role_of(t, call, parameter, part, inputs, kind, x, into, dims).out
    size = space.size
    rank = len(call.shape)
    shape = [1] * rank
    if isinstance(dim, int):
        shape[dim] = size
    else:
        shape[dim[0]], shape[dim[1]] = part.groups, size // part.groups
    return Value(call.shape, space.labels.reshape(shape))


def role_of(
    t: Tracer,
    call: Call,
    parameter: str,
    part: Part,
    inputs: Any,
    kind: str,
    x: Value | None = None,
    in_dims: tuple[int, ...] = (),
    out_dims: tuple[int, ...] = (),
) -> Role:
    """A new role without a result of its own."""
    name = layer_name(parameter)
    space = t.channels.add(part.channels[1], "role", name)
    trail = () if x is None else x.trail
    place = next((n for n, value in enumerate(call.values) if value is x), -1)
    role = Role(name, parameter, kind, part, call.node, inputs, space, trail, place, in_dims,
                out_dims)  # fmt: skip
    t.roles.append(role)
    return role


def picked(t: Tracer, call: Call, w: Value, index: Value) -> Any:
    """Indexes a parameter by data: an embedding, or the weights of the tokens' experts."""
    assert w.view is not None
    full = t.full_shape(w.view.parameter)
    if tuple(w.view.meta.shape) != full or not w.view.meta.is_contiguous():
        return t.unknown(call)
    if len(full) == 3:
        return Value(call.shape, lab.none(len(call.shape)), None, WeightView(
            w.view.parameter, w.view.meta, routed=index))  # fmt: skip
    if len(full) != 2:
        return t.unknown(call)
    if w.view.parameter.endswith("bias"):  # of the tokens' experts: a constant, as all biases
        return plain(call.shape)
    nothing = torch.zeros(0, dtype=torch.int64)
    part = Part(full, 1, transposed=True)
    return weigh(t, call, "embedding", w.view.parameter, part, (nothing, nothing), index,
                 (), len(call.shape) - 1)  # fmt: skip


def routed(
    t: Tracer, call: Call, parameter: str, part: Part, x: Value, dim: int, out: int, by: Any
) -> Value:
    """Adds a role of experts that by has picked: inputs along dim of x, outputs along out."""
    experts, into = part.groups, x.shape[dim]
    index, label = lab.pairs_along(x.labels, dim, into)
    seen = per_expert(t, label, experts, by)  # [experts, n]
    places = (torch.arange(experts)[:, None] * into + index).flatten()
    pairs = places, seen.flatten()
    role = role_of(t, call, parameter, part, pairs, "linear", x, (dim,), (out,))
    size = role.out.size // experts
    arcs = Arcs(torch.arange(size).repeat(experts), role.out.labels)
    space = t.channels.add(size, "routed", role.layer, [arcs])
    t.routes[len(t.channels.spaces) - 1] = by
    shape = [1] * len(call.shape)
    shape[out] = size
    return Value(call.shape, space.labels.reshape(shape))


def per_expert(t: Tracer, labels: Tensor, experts: int, by: Any) -> Tensor:
    """The channels [n] as each expert has made them, [experts, n].

    What another index has picked is the same for all: the tokens have met since.
    """
    channels = t.channels
    result = labels.repeat(experts, 1)
    places = channels.place(labels)
    for place in torch.unique(places).tolist():
        space = channels.spaces[place]
        here = places == place
        own, back = torch.unique(labels[here] - space.first, return_inverse=True)
        if place < 0 or space.kind in ("role", "input", "boundary"):
            continue
        if space.kind == "routed":
            made = space.arcs[0].parent.reshape(-1, space.size)
            if made.shape[0] == experts and t.routes[place] is by:
                result[:, here] = made[:, own][:, back]
            continue
        copies = [_copied(t, arcs, own, experts, by) for arcs in space.arcs]
        if all(same for _, same in copies):
            continue
        arcs_copied = [arcs for arcs, _ in copies]
        copy = channels.add(own.numel() * experts, space.kind, space.name, arcs_copied)
        result[:, here] = copy.labels.reshape(experts, -1)[:, back]
    return result


def _copied(t: Tracer, arcs: Arcs, children: Tensor, experts: int, by: Any) -> tuple[Arcs, bool]:
    """The arcs of some children once an expert; and whether all experts have the same parents."""
    used = torch.isin(arcs.child, children)
    parents = per_expert(t, arcs.parent[used], experts, by)
    child = torch.searchsorted(children, arcs.child[used])
    child = (torch.arange(experts)[:, None] * children.numel() + child).flatten()

    def again(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[used].repeat(experts)

    copy = Arcs(child, parents.flatten(), arcs.trail, arcs.scale, again(arcs.entry),
                again(arcs.weight))  # fmt: skip
    return copy, bool((parents == arcs.parent[used]).all())
