# SPDX-License-Identifier: MIT
"""In-place writes: slice assignment, index_put, masked_fill, where.

Constant indices are replayed on the channel labels. With data-dependent indices every channel that
may end up in a position counts, if it is the same channel at every position.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lap_ext.topology import labels as lab
from lap_ext.topology.call import Call, mapped
from lap_ext.topology.rules.joins import joined
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, merged, plain

_MOST = 1 << 24  # elements that are laid out one by one


@rule("copy")
def _copy(t: Tracer, call: Call) -> Result:
    """Written over: nothing is left of what was there."""
    source = call["src"]
    return source.passed(call.name, call.shape, lab.broadcast(source.labels, len(call.shape)))


@rule("fill", "zero")
def _fill(t: Tracer, call: Call) -> Result:
    """Nothing is left of what was there but a constant."""
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
    """Elements of yes where a mask is true, of no elsewhere, one of them perhaps a number.

    By data both count. By a constant one each channel counts where it is taken at all.
    """
    values = [x for x in (yes, no) if isinstance(x, Value)]
    known = t.constant(mask) if any(x.has_channels for x in values) else None
    if known is None:
        return joined(t, call, values)
    rank = len(call.shape)
    taken = lab.broadcast(known.bool(), rank)
    sides = [_laid_out(t, x, rank) for x in (yes, no)]
    steady = [d for d in range(rank) if all(x.labels.shape[d] == 1 for x in sides)]
    here, there = (x.any(steady, keepdim=True) if steady else x for x in (taken, ~taken))
    both = joined(t, call, [
        replace(x, labels=torch.where(here & there, x.labels, 0)) for x in sides])  # fmt: skip
    alone = torch.where(here, sides[0].labels, sides[1].labels)
    labels = torch.where(here & there, both.labels, alone)
    trail = merged(*(x.trail for x in sides), (call.name,))
    return Value(call.shape, lab.compressed(labels), trail=trail)


def _laid_out(t: Tracer, x: Any, rank: int) -> Value:
    """A tensor or number with labels of a rank, the zero channel where it is a constant 0."""
    if not isinstance(x, Value):
        return Value((), torch.full([1] * rank, t.channels.zero() if x == 0 else 0))
    constant = None if x.has_channels else t.constant(x)
    if constant is not None and not constant.any():
        return Value(x.shape, torch.full([1] * rank, t.channels.zero()))
    return replace(x, labels=lab.broadcast(x.labels, rank), static=None, view=None)


@rule("index_put", "_index_put_impl")
def _index_put(t: Tracer, call: Call) -> Result:
    x, source, indices = call["self"], call["values"], call["indices"]
    if not x.has_channels and not source.has_channels:
        return plain(call.shape)
    exact = _run(t, call, "self", "values")
    if exact is not None:
        return exact
    lead = len(indices)
    fixed = source.labels.dim() - (len(x.shape) - lead)
    changing = [n for n, index in zip(x.labels.shape, indices, strict=False) if index is not None]
    if max(changing, default=1) > 1 or any(n > 1 for n in source.labels.shape[: max(fixed, 0)]):
        return t.unknown(call)
    labels = source.labels.reshape([1] * lead + list(source.labels.shape[fixed:]))
    return joined(t, call, [x, Value(x.shape, labels, trail=source.trail)])


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
    parts = [x] if filled else [x, source]
    if any(y.labels.shape[dim] > 1 for y in parts for dim in dims):
        if call.name in {"scatter", "index_copy", "index_fill"} and call.get("reduce") is None:
            exact = _run(t, call, "self", "source", "src", "value")
            if exact is not None:
                return exact
        if not filled or t.constant(call["index"]) is not None:
            return t.unknown(call)
    if filled:
        return x.passed(call.name, call.shape, x.labels)
    return joined(t, call, [x, Value(x.shape, source.labels, trail=source.trail)])


def _run(t: Tracer, call: Call, *written: str) -> Value | None:
    """The operation on the labels, where its places are constant; None: they are not, or too many.

    written: the arguments that have labels; of a constant, and of a number, 0 is the zero channel.
    """
    values = [x for name in written if isinstance(x := call.get(name), Value)]
    if call.get("accumulate", False) or sum(torch.Size(x.shape).numel() for x in values) > _MOST:
        return None
    known: dict[str, Any] = {}
    for name, given in call.arguments.items():
        if name not in written:
            known[name] = mapped(given, lambda x: t.constant(x) if isinstance(x, Value) else x)
        elif isinstance(given, Value):
            laid_out = _laid_out(t, given, len(given.shape))
            known[name] = laid_out.labels.expand(given.shape).clone()
        else:
            known[name] = int(_laid_out(t, given, 0).labels)
    if _lost(list(call.arguments.values()), list(known.values())):
        return None
    labels = lab.compressed(call.target(**known))
    trail = merged(*(x.trail for x in values), (call.name,))
    return Value(call.shape, labels, trail=trail)


def _lost(given: Any, known: Any) -> bool:
    """Whether a tensor has become None: it is no constant."""
    if isinstance(given, (list, tuple)):
        return any(_lost(a, b) for a, b in zip(given, known, strict=True))
    return isinstance(given, Value) and known is None


def _put_back(t: Tracer, index: Value, source: Value, dims: list[int]) -> Tensor | None:
    """Labels where a top-k's values go back to their places: those it chose from; else None."""
    if index.choice is None:
        return None
    labels, dim = t.choices[index.choice]
    same = t.channels.place(source.labels) == index.choice
    return labels if [dim] == dims and bool(same.all()) else None
