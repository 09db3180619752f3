# SPDX-License-Identifier: MIT
"""In-place writes: slice assignment, index_put, masked_fill, where.

Constant indices are replayed on the channel ids. With data-dependent indices every channel that
may end up in a position counts, if it is the same channel at every position.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call, mapped
from lap_ext.topology.rules.joins import joined
from lap_ext.topology.rules.mixing import mixed
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, merged, plain

_MOST = 1 << 24  # elements that are expanded


@rule("copy")
def _copy(t: Tracer, call: Call) -> Result:
    """Overwrites everything with the source."""
    source = call["src"]
    return source.passed(call.name, call.shape, channel_ids.broadcast(source.ids, len(call.shape)))


@rule("fill", "zero")
def _fill(t: Tracer, call: Call) -> Result:
    """Overwrites everything with a constant."""
    value = call.get("value")
    return t.unknown(call) if isinstance(value, Value) and value.has_channels else plain(call.shape)


@rule("where")
def _where(t: Tracer, call: Call) -> Result:
    if call.get("self") is None:
        return t.unknown(call)
    return _chosen(t, call, call["condition"], call["self"], call["other"])


@rule("masked_fill")
def _masked_fill(t: Tracer, call: Call) -> Result:
    return _chosen(t, call, call["mask"], call["value"], call["self"])


def _chosen(t: Tracer, call: Call, mask: Value, yes: Any, no: Any) -> Value:
    """Takes elements of yes where a mask is true, of no elsewhere; one of them may be a number.

    With a data-dependent mask both count. With a constant mask a channel counts where it is taken.
    """
    values = [x for x in (yes, no) if isinstance(x, Value)]
    known = t.constant(mask) if any(x.has_channels for x in values) else None
    if known is None:
        return joined(t, call, values)
    rank = len(call.shape)
    taken = channel_ids.broadcast(known.bool(), rank)
    sides = [_expanded(t, x, rank) for x in (yes, no)]
    steady = [d for d in range(rank) if all(x.ids.shape[d] == 1 for x in sides)]
    yes_taken, no_taken = (x.any(steady, keepdim=True) if steady else x for x in (taken, ~taken))
    both = joined(
        t, call, [replace(x, ids=torch.where(yes_taken & no_taken, x.ids, 0)) for x in sides]
    )
    alone = torch.where(yes_taken, sides[0].ids, sides[1].ids)
    ids = torch.where(yes_taken & no_taken, both.ids, alone)
    trail = merged(*(x.trail for x in sides), (call.name,))
    return Value(call.shape, channel_ids.compressed(ids), trail=trail)


def _expanded(t: Tracer, x: Any, rank: int) -> Value:
    """Gives a tensor or number ids of a rank; a constant 0 gets the zero channel's id."""
    if not isinstance(x, Value):
        return Value((), torch.full([1] * rank, t.channels.zero() if x == 0 else 0))
    constant = None if x.has_channels else t.constant(x)
    if constant is not None and not constant.any():
        return Value(x.shape, torch.full([1] * rank, t.channels.zero()))
    return replace(x, ids=channel_ids.broadcast(x.ids, rank), static=None, view=None)


@rule("index_put", "_index_put_impl")
def _index_put(t: Tracer, call: Call) -> Result:
    x, source, indices = call["self"], call["values"], call["indices"]
    if not x.has_channels and not source.has_channels:
        return plain(call.shape)
    exact = _applied(t, call, "self", "values")
    if exact is not None:
        return exact
    lead = len(indices)
    fixed = source.ids.dim() - (len(x.shape) - lead)
    changing = [n for n, index in zip(x.ids.shape, indices, strict=False) if index is not None]
    if max(changing, default=1) > 1 or any(n > 1 for n in source.ids.shape[: max(fixed, 0)]):
        return t.unknown(call)
    ids = source.ids.reshape([1] * lead + list(source.ids.shape[fixed:]))
    return joined(t, call, [x, Value(x.shape, ids, trail=source.trail)])


@rule("index_add", "scatter", "scatter_add", "scatter_reduce", "index_copy", "masked_scatter",
      "index_fill")  # fmt: skip
def _write(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    source = call.get("source", call.get("src", call.get("value")))
    if not x.has_channels and not (isinstance(source, Value) and source.has_channels):
        return plain(call.shape)
    dims = [call["dim"] % len(x.shape)] if call.get("dim") is not None else []
    filled = not isinstance(source, Value) or not source.has_channels
    if call.name == "scatter" and not filled and not x.has_channels:
        back = _put_back(t, call["index"], source, dims)
        if back is not None:
            return source.passed(call.name, call.shape, back)
    added = call.name in {"index_add", "scatter_add"} and not filled
    if added and all(x.ids.shape[dim] == 1 for dim in dims) and t.constant(call["index"]) is None:
        source = replace(source, ids=mixed(t.channels, call.name, source.ids, dims))
    written = [x] if filled else [x, source]
    if any(y.ids.shape[dim] > 1 for y in written for dim in dims):
        if call.name in {"scatter", "index_copy", "index_fill"} and call.get("reduce") is None:
            exact = _applied(t, call, "self", "source", "src", "value")
            if exact is not None:
                return exact
        if not filled or t.constant(call["index"]) is not None:
            return t.unknown(call)
    if filled:
        return x.passed(call.name, call.shape, x.ids)
    return joined(t, call, [x, Value(x.shape, source.ids, trail=source.trail)])


def _applied(t: Tracer, call: Call, *written: str) -> Value | None:
    """Applies the operation to the ids; None: its indices are not constant, or too many.

    written: the arguments that have ids; a constant or number 0 is the zero channel.
    """
    values = [x for name in written if isinstance(x := call.get(name), Value)]
    if call.get("accumulate", False) or sum(torch.Size(x.shape).numel() for x in values) > _MOST:
        return None
    known: dict[str, Any] = {}
    for name, given in call.arguments.items():
        if name not in written:
            known[name] = mapped(given, lambda x: t.constant(x) if isinstance(x, Value) else x)
        elif isinstance(given, Value):
            expanded = _expanded(t, given, len(given.shape))
            known[name] = expanded.ids.expand(given.shape).clone()
        else:
            known[name] = int(_expanded(t, given, 0).ids)
    if _lost(list(call.arguments.values()), list(known.values())):
        return None
    ids = channel_ids.compressed(call.target(**known))
    trail = merged(*(x.trail for x in values), (call.name,))
    return Value(call.shape, ids, trail=trail)


def _lost(given: Any, known: Any) -> bool:
    """Whether a tensor has become None because it is not constant."""
    if isinstance(given, (list, tuple)):
        return any(_lost(a, b) for a, b in zip(given, known, strict=True))
    return isinstance(given, Value) and known is None


def _put_back(t: Tracer, index: Value, source: Value, dims: list[int]) -> Tensor | None:
    """Returns a top-k's input ids where its values go back to their positions; else None."""
    if index.choice is None:
        return None
    ids, dim = t.choices[index.choice]
    same = t.channels.group_index(source.ids) == index.choice
    return ids if [dim] == dims and bool(same.all()) else None
