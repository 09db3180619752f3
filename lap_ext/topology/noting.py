# SPDX-License-Identifier: MIT
"""Notes the facts of facts.py while the rules follow the channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call, module_path, operation_name
from lap_ext.topology.facts import Balanced, Heads, Together, Vector
from lap_ext.topology.static import Static, names_of
from lap_ext.topology.tracer import WEIGHTED, Tracer
from lap_ext.topology.value import Value, WeightView

_MOST = 1 << 24  # elements that are looked at one by one


def named(call: Call) -> str:
    """Names an operation and its module in reasons.

    Returns:
        For example "layer_norm in 'blocks.0.norm1'".
    """
    path = module_path(call.node)
    return f"{call.name} in {path!r}" if path else call.name


def belong(t: Tracer, value: object, ids: Tensor, *, adds: bool) -> None:
    """Notes which channels the entries of a parameter or buffer belong to.

    Args:
        t: the tracer.
        value: what is added to channels or multiplies them; anything but a static one is ignored.
        ids: of the result; value broadcasts against them.
        adds: whether it is added, so that an entry must be 0 where a channel is.
    """
    if not isinstance(value, Value) or value.static is None or not value.shape:
        return
    rank = max(ids.dim(), len(value.shape))
    ids = channel_ids.broadcast(ids, rank)
    sizes = [1] * (rank - len(value.shape)) + list(value.shape)
    along = [n for n, changing in zip(sizes, ids.shape, strict=True) if changing > 1]
    if along and max(along) == 1:
        return  # the same for all channels
    for name, shown, zeroed in _entries(t, value):
        entries = channel_ids.broadcast(shown, rank)
        for dim in range(rank):  # what does not change along a dimension is looked at once
            if entries.shape[dim] > 1 and entries.stride(dim) == 0:
                entries = entries.narrow(dim, 0, 1)
        shape = torch.broadcast_shapes(entries.shape, ids.shape)
        if math.prod(shape) > _MOST:
            t.facts.large.append((torch.unique(ids[ids != 0]), name))
            continue
        if not math.prod(shape):
            continue
        pairs = channel_ids.unique_pairs(entries, ids)[:2]
        live = pairs[1] != 0
        if bool(live.any()):
            buffer = name not in t.first
            found = Vector(name, pairs[0][live], pairs[1][live], zeroed or not adds, buffer)
            t.facts.vectors.append(found)


def _entries(t: Tracer, value: Value) -> list[tuple[str, Tensor, bool]]:
    """Lists (name, flat indices in the shape of value, whether it is the entry itself)."""
    static, view = value.static, value.view
    assert static is not None
    if view is not None and not view.routed:
        return [(view.parameter, _shown(t, view), view.computation is None)]
    result = []
    for name in dict.fromkeys(names_of(static)):
        tensor = t.tensors[name]
        if tensor.numel() == math.prod(value.shape) and tensor.dim():
            own = _is_plain(static)
            result.append((t.first.get(name, name), _counted(value.shape), own))
    return result


def _is_plain(static: Static) -> bool:
    """Whether an expression is a parameter or buffer as it is."""
    return static.name is not None


def _counted(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


def _shown(t: Tracer, view: WeightView) -> Tensor:
    """Returns the flat index in the parameter of each element of a view."""
    full = torch.arange(math.prod(t.full_shape(view.parameter)))
    meta = view.meta
    return full.as_strided(meta.shape, meta.stride(), int(meta.storage_offset()))


def together(t: Tracer, call: Call, ids: Tensor, dims: list[int]) -> None:
    """Notes that an operation reads all channels along dims at once."""
    dims = [dim % ids.dim() for dim in dims]
    changing = [dim for dim in dims if ids.shape[dim] > 1]
    if not changing:
        return
    kept = [dim for dim in range(ids.dim()) if dim not in changing]
    size = math.prod(ids.shape[dim] for dim in changing)
    rows = ids.permute(kept + changing).reshape(-1, size)
    rows = torch.unique(rows, dim=0)
    row = torch.arange(rows.shape[0]).repeat_interleave(size)
    live = rows.flatten() != 0
    t.facts.together.append(Together(row[live], rows.flatten()[live], named(call)))


def choice_among(t: Tracer, ids: Tensor, dim: int | None) -> None:
    """Notes the channels among which data chooses along a dimension."""
    if dim is not None and ids.dim() and ids.shape[dim] > 1:
        t.facts.choices.append(torch.unique(ids[ids != 0]))


def balanced(t: Tracer, call: Call, rows: Tensor, strict: bool) -> None:
    """Notes that rows of channels must stay equal in number."""
    if min(rows.shape) > 1 and bool((rows != 0).any()):
        t.facts.balanced.append(Balanced(rows, named(call), strict))


def split(t: Tracer, call: Call, x: Value, ids: Tensor, new_shape: tuple[int, ...]) -> None:
    """Notes the equal numbers that a reshape of one dimension of channels into several needs.

    ids: of the result.
    """
    if 0 in x.shape:
        return
    for old, new in channel_ids.matched(list(x.shape), list(new_shape)):
        wide = [dim for dim in new if new_shape[dim] > 1]
        if len(old) != 1 or len(wide) < 2 or x.ids.shape[old[0]] == 1:
            continue
        others = [dim for dim in range(ids.dim()) if dim not in wide]
        lead = math.prod(new_shape[dim] for dim in wide[:-1])
        sizes = [new_shape[d] if d in wide else n for d, n in enumerate(ids.shape)]
        every = ids.expand(sizes).permute(others + wide).reshape(-1, lead, new_shape[wide[-1]])
        for rows in torch.unique(every, dim=0):
            balanced(t, call, rows, strict=False)


def parts(t: Tracer, call: Call, results: list[Tensor], dim: int) -> None:
    """Notes the equal numbers that a chunk into equal parts needs."""
    if len(results) > 1 and len({x.shape for x in results}) == 1 and results[0].shape[dim] > 1:
        moved = [x.movedim(dim, -1).reshape(-1, x.shape[dim]) for x in results]
        for rows in torch.unique(torch.stack(moved, 1), dim=0):
            balanced(t, call, rows, strict=True)


def heads(
    t: Tracer, call: Call, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> None:
    """Notes the heads of an attention.

    Args:
        t: the tracer.
        call: the operation.
        query: ids [..., heads, positions, channels]; batches and heads may be one dimension.
        key: ids, like query.
        value: ids, like query.
        bias: ids [..., heads, positions, positions] that are added to the logits.
    """
    sides = [x for x in (query, key, value, bias) if x is not None]
    if min(x.dim() for x in (query, key, value)) < 3:
        return
    count = max(x.shape[-3] for x in sides if x.dim() > 2)
    if any(x.dim() > 2 and x.shape[-3] not in (1, count) for x in sides):
        return
    rows = [_by_head(x, count) for x in sides]
    of_values = rows[2]
    if bool((of_values != 0).any()):
        t.facts.heads.append(Heads(torch.cat(rows, 1), of_values, named(call)))


def _by_head(ids: Tensor, count: int) -> Tensor:
    """Returns the channels of each head, [heads, n]."""
    if ids.dim() < 3:
        return ids.reshape(1, -1).expand(count, -1)
    moved = ids.movedim(-3, 0).reshape(ids.shape[-3], -1)
    return moved.expand(count, -1)


def logits_before(
    node: fx.Node, known: dict[fx.Node, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Finds the product of queries and keys that attention weights are computed from.

    Args:
        node: computes the attention weights.
        known: products of queries and keys -> their ids.

    Returns:
        Their ids; None where layers or other products lie before the weights.
    """
    seen, queue = {node}, [node]
    while queue:
        at = queue.pop(0)
        if at in known:
            return known[at]
        if operation_name(at) in WEIGHTED:
            continue
        for before in at.all_input_nodes:
            if before not in seen and before.op == "call_function":
                seen.add(before)
                queue.append(before)
    return None
