# SPDX-License-Identifier: MIT
"""Normalizations: their statistics count as 1, their weights are scales on the edge.

A batch norm in evaluation mode is exact: gamma / sqrt(running_var + eps).
"""

from __future__ import annotations

from typing import Any

from lap_ext.topology.call import Call
from lap_ext.topology.noting import belong, together
from lap_ext.topology.rules.joins import scaled
from lap_ext.topology.static import Scale, Static
from lap_ext.topology.tracer import Result, Tracer, rule
from lap_ext.topology.value import Value, plain


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm",
      "_batch_norm_no_update")  # fmt: skip
def _batch_norm(t: Tracer, call: Call) -> Result:
    x, gamma, variance = call["input"], call["weight"], call["running_var"]
    if variance is None or (call.name == "batch_norm" and call["training"]):
        return _several(call, _shifted(t, call, _times(t, call, x, gamma)))
    return _running(t, call)


def _running(t: Tracer, call: Call) -> Result:
    """Normalizes by the running statistics: exactly gamma / sqrt(running_var + eps)."""
    x, gamma, variance = call["input"], call["weight"], call["running_var"]
    sources = (None if gamma is None else gamma.static, variance.static)
    scale = Scale("batch_norm", sources, eps=float(call["eps"]))
    result = _by_channel(t, call, x, scale, variance)
    for name in ("weight", "running_mean"):
        belong(t, call[name], result.ids.movedim(1, -1), adds=False)
    return _several(call, _shifted(t, call, result))


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(t: Tracer, call: Call) -> Result:
    x, weight = call["input"], call["weight"]
    if not x.has_channels:
        return _several(call, plain(call.shape))
    together(t, call, x.ids, list(range(-len(call["normalized_shape"]), 0)))
    if weight is None or weight.static is None:
        return _several(call, x.passed(call.name, call.shape, x.ids))
    scale = Scale("parameter", (weight.static,))
    result = scaled(t, call, x, weight, scale)
    belong(t, call.get("bias"), result.ids, adds=True)
    return _several(call, result)


@rule("group_norm", "native_group_norm", "instance_norm")
def _group_norm(t: Tracer, call: Call) -> Result:
    x = call["input"]
    if call.name == "instance_norm" and not call["use_input_stats"]:
        return _running(t, call)
    if call.name != "instance_norm":
        _coupled_in_groups(t, call, x)
    return _several(call, _shifted(t, call, _times(t, call, x, call["weight"])))


def _coupled_in_groups(t: Tracer, call: Call, x: Value) -> None:
    """Notes that the channels of a group are normalized together."""
    groups = call["num_groups"] if call.name == "group_norm" else call["group"]
    ids = x.ids.movedim(1, -1)
    if ids.shape[-1] > 1:
        together(t, call, ids.unflatten(-1, (groups, -1)), [-1])


def _shifted(t: Tracer, call: Call, result: Value) -> Value:
    """Notes the biases of channels along dimension 1."""
    if result.ids.dim() > 1:
        belong(t, call.get("bias"), result.ids.movedim(1, -1), adds=True)
    return result


@rule("cosine_similarity", "pairwise_distance", "cdist")
def _unsupported(t: Tracer, call: Call) -> Result:
    return t.unknown(call)


def _times(t: Tracer, call: Call, x: Value, weight: Value | None) -> Value:
    """Multiplies by a weight of each channel; None counts as 1."""
    if weight is None or weight.static is None:
        return x.passed(call.name, call.shape, x.ids)
    return _by_channel(t, call, x, Scale("parameter", (weight.static,)), weight)


def _by_channel(t: Tracer, call: Call, x: Value, scale: Scale, source: Value) -> Value:
    """Multiplies by a scale of each channel; channels lie along dimension 1."""
    if not x.has_channels:
        return plain(call.shape)
    shape = tuple(n if d == 1 else 1 for d, n in enumerate(x.shape))
    static = source.static or Static()
    return scaled(t, call, x, Value(shape, source.ids, static), scale)


def _several(call: Call, value: Value) -> Any:
    """Makes a value the first of several results, of which the others are statistics."""
    shapes = call.shapes
    return value if len(shapes) == 1 else [value, *map(plain, shapes[1:])]
