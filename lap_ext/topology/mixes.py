# SPDX-License-Identifier: MIT
"""Operations that mix positions: pooling, resizing, softmax, and reductions.

Along a dimension in which the channel does not change, mixing changes nothing: a mean over the
image is the same channels. Along one in which it does (a mean over channels), the result is a new
channel whose parents are all that were mixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lap_ext.topology.call import Call, Result, rule
from lap_ext.topology.channels import Arcs
from lap_ext.topology.joins import joined
from lap_ext.topology.mixing import mixed
from lap_ext.topology.value import Value, plain

if TYPE_CHECKING:
    from lap_ext.topology.tracer import Tracer

_SPATIAL = {  # operations on images: trailing dimensions that they mix
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp",
                                          "_adaptive_avg") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": n for n in (1, 2, 3)},
    **{f"upsample_{kind}": n for kind, n in (
        ("nearest1d", 1), ("nearest2d", 2), ("nearest3d", 3), ("linear1d", 1), ("bilinear2d", 2),
        ("bicubic2d", 2), ("trilinear3d", 3), ("_nearest_exact1d", 1), ("_nearest_exact2d", 2))},
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
    result = x.passed(call.name, call.shape, x.labels)
    return result if len(call.shapes) == 1 else [result, *map(plain, call.shapes[1:])]


@rule("softmax", "_softmax", "_safe_softmax", "softmin")
def _softmax(t: Tracer, call: Call) -> Result:
    """Remembered: where it weighs the values of an attention, its own channels end."""
    x = call.values[0]
    if not x.has_channels:
        return plain(call.shape)
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
    labels = mixed(t.channels, call.name, x.labels, dims, mean=call.name == "mean")
    if not call.get("keepdim", False):
        labels = labels.reshape([n for dim, n in enumerate(labels.shape) if dim not in dims])
    results = [x.passed(call.name, shape, labels) for shape in call.shapes]
    results = [x if x.has_channels else plain(x.shape) for x in results]
    return results[0] if len(results) == 1 else results


@rule("max", "min")
def _extreme(t: Tracer, call: Call) -> Result:
    if call.get("other") is not None:
        return joined(t, call, call.values)
    result = _reduce(t, call)
    return [result[0], plain(call.shapes[1])] if isinstance(result, list) else result


@rule("topk", "sort", "kthvalue", "cummax", "cummin")
def _ranked(t: Tracer, call: Call) -> Result:
    x = call.values[0]
    labels = x.labels
    dim = call.get("dim", -1)
    if labels.dim() and labels.shape[dim] > 1:
        labels = mixed(t.channels, call.name, labels, [dim % labels.dim()])
    if len(call.shape) < labels.dim():
        labels = labels.squeeze(dim)
    return [x.passed(call.name, call.shape, labels), plain(call.shapes[1])]
