# SPDX-License-Identifier: MIT
"""Operations that mix positions: pooling, resizing, softmax, and reductions.

Along a dimension in which the channel does not change, mixing changes nothing: a mean over the
image is the same channels. Along one in which it does (a mean over channels), the result is a new
channel whose parents are all that were mixed. Where data chooses one of them (a maximum, a sorted
order) each counts 1, as what an activation may let pass does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lap_ext.topology.call import Call
from lap_ext.topology.channels import Arcs
from lap_ext.topology.labels import unique_pairs
from lap_ext.topology.rules.joins import joined
from lap_ext.topology.rules.mixing import mixed, sets_along
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, plain

_SPATIAL = {  # operations on images: trailing dimensions that they mix
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
       for n in (1, 2, 3)},
    "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3,
    **{f"max_pool{n}d_with_indices": n for n in (1, 2, 3)},
    **{f"upsample_{kind}": n for kind, n in (
        ("nearest1d", 1), ("nearest2d", 2), ("nearest3d", 3), ("linear1d", 1), ("bilinear2d", 2),
        ("bicubic2d", 2), ("trilinear3d", 3))},
    **{f"_upsample_nearest_exact{n}d": n for n in (1, 2, 3)},
    "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2, "grid_sampler": 2,
    "grid_sampler_2d": 2, "grid_sampler_3d": 3, "fractional_max_pool2d": 2,
}  # fmt: skip


@rule(*_SPATIAL)
def _spatial(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    rank = len(x.shape)
    dims = range(rank - _SPATIAL[call.name], rank)
    if any(x.labels.shape[dim] > 1 for dim in dims):
        return t.unknown(call)
    for other in call.values[1:]:  # places to look at: a decision
        t.end(other, call.name)
    result = x.passed(call.name, call.shape, x.labels)
    return result if len(call.shapes) == 1 else [result, *map(plain, call.shapes[1:])]


@rule("softmax", "_softmax", "_safe_softmax")
def _softmax(t: Tracer, call: Call) -> Result:
    """Over channels an activation. Over positions it is remembered: weights, whose channels end.

    So is that of the rows of a matrix of channels: the weights of an attention between channels.
    """
    x = call.values[0]
    if not x.has_channels:
        return plain(call.shape)
    rank, dim = x.labels.dim(), call["dim"]
    matrix = rank > 1 and dim % rank == rank - 1 and min(x.labels.shape[-2:]) > 1
    if rank and not matrix and (x.labels.shape[dim] > 1 or _is_choice(t, x.labels)):
        return x.passed(call.name, call.shape, x.labels)
    parents = torch.unique(x.labels[x.labels != 0])
    arcs = Arcs(torch.arange(parents.numel()), parents, x.trail)
    space = t.channels.add(parents.numel(), "softmax", call.name, [arcs])
    made = space.first + torch.searchsorted(parents, x.labels)
    return Value(call.shape, torch.where(x.labels != 0, made, 0), trail=(call.name,))


@rule("mean", "sum", "nansum", "amax", "amin", "aminmax", "var", "std", "var_mean", "std_mean",
      "prod", "norm", "linalg_vector_norm", "logsumexp", "median", "mode")  # fmt: skip
def _reduce(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    rank = len(x.shape)
    given = call.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    dims = [dim % rank for dim in dims] if rank else []
    if call.name in {"mean", "sum", "nansum"} and _repeats(x, dims):
        labels = _term_by_term(t, call, x, dims)
    else:
        labels = mixed(t.channels, call.name, x.labels, dims, mean=call.name == "mean")
    if not call.get("keepdim", False):
        labels = labels.reshape([n for dim, n in enumerate(labels.shape) if dim not in dims])
    results = [x.passed(call.name, shape, labels) for shape in call.shapes]
    results = [x if x.has_channels else plain(x.shape) for x in results]
    return results[0] if len(results) == 1 else results


def _repeats(x: Value, dims: list[int]) -> bool:
    """Whether one term of a sum is the same channel along dims in which another is not."""
    changing = [dim for dim in dims if x.labels.shape[dim] > 1]
    return any(y.labels.shape[dim] == 1 for y in x.terms for dim in changing)


def _term_by_term(t: Tracer, call: Call, x: Value, dims: list[int]) -> Tensor:
    """Adds up a sum term by term: a term that is the same channel at every place counts once, as positions do."""
    parts = [
        replace(y, labels=mixed(t.channels, call.name, y.labels, dims, mean=call.name == "mean"))
        for y in x.terms
    ]
    whole = joined(t, call, parts, x.shape).labels
    sets, here = sets_along(x.labels, dims)
    run, parent, place = unique_pairs(here, whole)
    n, m = run.numel(), sets.shape[1]
    space = t.channels.add(n, "reduce", call.name, [Arcs(torch.arange(n), parent)])
    t.channels.sum_of(torch.arange(n).repeat_interleave(m), sets[run].flatten())
    return space.labels[place]


@rule("max", "min")
def _extreme(t: Tracer, call: Call) -> Result:
    if call.get("other") is not None:
        return joined(t, call, call.values)
    result = _reduce(t, call)
    return [result[0], plain(call.shapes[1])] if isinstance(result, list) else result


@rule("topk", "sort", "kthvalue", "cummax", "cummin")
def _ranked(t: Tracer, call: Call) -> Result:
    """Any channel may come to any place; the indices remember what they were chosen from."""
    x = call.values[0]
    labels = x.labels
    dim = call.get("dim", -1)
    places = plain(call.shapes[1])
    if labels.dim() and labels.shape[dim] > 1:
        labels = mixed(t.channels, call.name, labels, [dim % labels.dim()])
        choice = len(t.channels.spaces) - 1
        t.choices[choice] = x.labels, dim % labels.dim()
        places = replace(places, choice=choice)
    if len(call.shape) < labels.dim():
        labels = labels.squeeze(dim)
    return [x.passed(call.name, call.shape, labels), places]


def _is_choice(t: Tracer, labels: Tensor) -> bool:
    """Whether these are places to which a top-k brings any of some channels."""
    return all(place in t.choices for place in torch.unique(t.channels.place(labels)).tolist())
