# SPDX-License-Identifier: MIT
"""Operations that mix positions: pooling, resizing, softmax, and reductions.

Mixing along a dimension in which the channel does not change keeps the channels: a mean over the
image. Mixing along a dimension in which it changes (a mean over channels) creates a channel whose
parents are all channels that were mixed. Where data chooses one of them (a maximum, a sorted
order), each counts 1, like the input of an activation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.call import Call
from lap_ext.topology.channel_ids import unique_pairs
from lap_ext.topology.channels import ChannelEdges
from lap_ext.topology.noting import choice_among, together
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
    if any(x.ids.shape[dim] > 1 for dim in dims):
        return t.unknown(call)
    for other in call.values[1:]:  # positions to read: a decision
        t.end(other, call.name)
    result = x.passed(call.name, call.shape, x.ids)
    return result if len(call.shapes) == 1 else [result, *map(plain, call.shapes[1:])]


@rule("col2im")
def _fold(t: Tracer, call: Call) -> Result:
    """Adds up patches [N, C * window, L]: a channel comes from all entries of its window.

    Patches that do not overlap are moved instead, so that each position has its own channel.
    """
    x = call["self"]
    window = [*call["kernel_size"]]
    apart = all(step >= size for step, size in zip(call["stride"], window, strict=True))
    if apart and set(call["dilation"]) == {1}:
        moved = call.target(x.ids.expand(x.shape).double(), *call.args[1:], **call.kwargs).long()
        return x.passed(call.name, call.shape, channel_ids.compressed(moved))
    if x.ids.shape[-1] > 1:
        return t.unknown(call)
    batch, taps = x.ids.shape[:-2], torch.Size(window).numel()
    ids = x.ids.expand(*batch, x.shape[-2], 1).reshape(*batch, -1, taps)
    summed = mixed(t.channels, call.name, channel_ids.compressed(ids), [len(batch) + 1])
    return x.passed(call.name, call.shape, summed.unsqueeze(-1))


@rule("softmax", "_softmax", "_safe_softmax")
def _softmax(t: Tracer, call: Call) -> Result:
    """Handles a softmax over channels as an activation; over positions it makes attention weights.

    Their channels end in the product with the values (kind "softmax"). The same holds for a softmax
    over the rows of a matrix of channels: the weights of an attention between channels.
    """
    x = call.values[0]
    if not x.has_channels:
        return plain(call.shape)
    rank, dim = x.ids.dim(), call["dim"]
    matrix = rank > 1 and dim % rank == rank - 1 and min(x.ids.shape[-2:]) > 1
    if rank and not matrix and (x.ids.shape[dim] > 1 or _is_choice(t, x.ids)):
        together(t, call, x.ids, [dim])
        return x.passed(call.name, call.shape, x.ids)
    parents = torch.unique(x.ids[x.ids != 0])
    edges = ChannelEdges(torch.arange(parents.numel()), parents, x.trail)
    group = t.channels.add(parents.numel(), "softmax", call.name, [edges])
    ids = group.first + torch.searchsorted(parents, x.ids)
    return Value(call.shape, torch.where(x.ids != 0, ids, 0), trail=(call.name,))


@rule("mean", "sum", "nansum", "amax", "amin", "aminmax", "var", "std", "var_mean", "std_mean",
      "prod", "norm", "linalg_vector_norm", "logsumexp", "median", "mode")  # fmt: skip
def _reduce(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    rank = len(x.shape)
    given = call.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    dims = [dim % rank for dim in dims] if rank else []
    if call.name in {"mean", "sum", "nansum"} and _repeats(x, dims):
        ids = _term_by_term(t, call, x, dims)
    else:
        ids = mixed(t.channels, call.name, x.ids, dims, mean=call.name == "mean")
    if not call.get("keepdim", False):
        ids = ids.reshape([n for dim, n in enumerate(ids.shape) if dim not in dims])
    results = [x.passed(call.name, shape, ids) for shape in call.shapes]
    results = [x if x.has_channels else plain(x.shape) for x in results]
    return results[0] if len(results) == 1 else results


def _repeats(x: Value, dims: list[int]) -> bool:
    """Whether one term of a sum is the same channel along dims in which another is not."""
    changing = [dim for dim in dims if x.ids.shape[dim] > 1]
    return any(y.ids.shape[dim] == 1 for y in x.terms for dim in changing)


def _term_by_term(t: Tracer, call: Call, x: Value, dims: list[int]) -> Tensor:
    """Adds up a sum term by term; a term with one channel at all positions counts once."""
    terms = [
        replace(y, ids=mixed(t.channels, call.name, y.ids, dims, mean=call.name == "mean"))
        for y in x.terms
    ]
    sums = joined(t, call, terms, x.shape).ids
    sets, set_of = sets_along(x.ids, dims)
    of, parent, child_of = unique_pairs(set_of, sums)
    n, m = of.numel(), sets.shape[1]
    group = t.channels.add(n, "reduce", call.name, [ChannelEdges(torch.arange(n), parent)])
    t.channels.sum_of(torch.arange(n).repeat_interleave(m), sets[of].flatten())
    return group.ids[child_of]


@rule("max", "min")
def _extreme(t: Tracer, call: Call) -> Result:
    if call.get("other") is not None:
        return joined(t, call, call.values)
    result = _reduce(t, call)
    if not isinstance(result, list):
        return result
    choice_among(t, call.values[0].ids, call["dim"])
    return [result[0], plain(call.shapes[1])]


@rule("topk", "sort", "kthvalue", "cummax", "cummin")
def _ranked(t: Tracer, call: Call) -> Result:
    """Lets any channel come to any position; the indices remember what they were chosen from."""
    x = call.values[0]
    ids = x.ids
    dim = call.get("dim", -1)
    chosen = plain(call.shapes[1])
    if ids.dim() and ids.shape[dim] > 1:
        ids = mixed(t.channels, call.name, ids, [dim % ids.dim()])
        choice = len(t.channels.groups) - 1
        t.choices[choice] = x.ids, dim % ids.dim()
        choice_among(t, x.ids, dim)
        chosen = replace(chosen, choice=choice)
    if len(call.shape) < ids.dim():
        ids = ids.squeeze(dim)
    return [x.passed(call.name, call.shape, ids), chosen]


def _is_choice(t: Tracer, ids: Tensor) -> bool:
    """Whether all of these channels are choices of a top-k."""
    return all(i in t.choices for i in torch.unique(t.channels.group_index(ids)).tolist())
