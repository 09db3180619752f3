# SPDX-License-Identifier: MIT
"""Reads channels out of a state, a matrix of products: linear attention and selective scans.

    q (k^T v) = (q k^T) v     the state k^T v [i, j] is read along i, as attention without a softmax
    sum over n of c[n] h[d, n],  h[d, n] = a[d, n] h[d, n] + b[n] x[d]      Mamba's scan

What the state is computed from and is the same all along the sum (v, x) continues; what changes
along it (k, b) is coupled with what reads the state (q, c), as in attention. A step of a loop that
repeats another one makes the same channels, so that the number of steps does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lap_ext.topology.call import Call
from lap_ext.topology.channels import ChannelEdges, ChannelGroup
from lap_ext.topology.tracer import Tracer


@dataclass
class _Sources:
    """The parents of the channels that continue, and those that change along the sum."""

    edges: dict[bytes, ChannelEdges] = field(default_factory=dict)
    changing: dict[bytes, Tensor] = field(default_factory=dict)


def read(t: Tracer, call: Call, state: Tensor, reader: Tensor) -> Tensor | None:
    """Returns the channels of a sum along the last dimension of state * reader.

    None: nothing of the state continues, or it is not a matrix of products.
    """
    shape = torch.broadcast_shapes(state.shape, reader.shape)
    sources = _Sources()
    if not _split(t, state, sources) or not sources.edges or not sources.changing:
        return None
    for ids in sources.changing.values():
        t.couple(reader.expand(shape), ids.expand(shape), once=True)
    made = _repeated(t, call, sources.edges)
    made = made or _added(t, call, sources.edges, state[..., 0].numel())
    return made.ids.reshape(state[..., :1].shape)


def _repeated(t: Tracer, call: Call, edges: dict[bytes, ChannelEdges]) -> ChannelGroup | None:
    """Returns what another step of the same loop has made, from as many sources or more.

    A first step starts from zeros: it gets the sources that it has not.
    """
    for group, known in t.states.get(_site(call), []):
        more = [x for key, x in edges.items() if key not in known]
        if not more:
            return group
        if known <= edges.keys() and all(int(x.parent.max()) < group.first for x in more):
            group.edges.extend(more)
            known.update(edges)
            return group
    return None


def _added(t: Tracer, call: Call, edges: dict[bytes, ChannelEdges], size: int) -> ChannelGroup:
    group = t.channels.add(size, "join", call.name, [*edges.values()])
    t.states.setdefault(_site(call), []).append((group, set(edges)))
    return group


def _site(call: Call) -> str:
    """Names the place of a call in the source."""
    return str(call.node.meta.get("stack_trace"))


def _split(t: Tracer, ids: Tensor, sources: _Sources) -> bool:
    """Sorts what channels are computed from; False where it cannot be told apart."""
    n, key = ids.shape[-1], ids.numpy().tobytes()
    first = ids[..., :1]
    if torch.equal(ids, first.expand(ids.shape)):
        own = torch.arange(first.numel())
        sources.edges[key] = ChannelEdges(own, first.flatten())
        return True
    parents = _parents(t, ids)
    if parents is None:
        sources.changing[key] = ids
        return True
    group, slots = parents
    if group.kind == "join":
        inner = _Sources()
        if not all(_split(t, slot, inner) for slot, _ in slots):
            return False
        if not inner.edges:
            sources.changing[key] = ids
            return True
        sources.edges |= inner.edges
        sources.changing |= inner.changing
        return True
    ((slot, edges),) = slots
    if not torch.equal(slot, slot[..., :1].expand(slot.shape)):
        sources.changing[key] = ids
        return True
    at = torch.argsort(edges.child)[(ids - group.first).reshape(-1, n).flatten()]
    own = torch.arange(ids[..., 0].numel()).repeat_interleave(n)
    share = torch.full(own.shape, 1.0 / n, dtype=torch.float64)
    entry = None if edges.entry is None else edges.entry[at]
    weight = share if edges.weight is None else share * edges.weight[at]
    sources.edges[key] = ChannelEdges(
        own, edges.parent[at], edges.trail, edges.scale, entry, weight
    )
    return True


def _parents(
    t: Tracer, ids: Tensor
) -> tuple[ChannelGroup, list[tuple[Tensor, ChannelEdges]]] | None:
    """Returns the group of computed channels and their parents, edges by edges.

    None: they are not all of one group of which each channel has one parent in all edges.
    """
    indices = torch.unique(t.channels.group_index(ids)).tolist()
    group = t.channels.groups[indices[0]]
    plain = group.kind == "join" and all(edges.weight is None for edges in group.edges)
    if len(indices) > 1 or not (plain or group.kind in ("scale", "number", "position")):
        return None
    slots = []
    for edges in group.edges:
        if edges.child.unique().numel() != group.size or edges.child.numel() != group.size:
            return None
        parent = torch.zeros(group.size, dtype=torch.int64)
        parent[edges.child] = edges.parent
        slots.append((parent[ids - group.first], edges))
    return (group, slots) if len(slots) == 1 or group.kind == "join" else None
