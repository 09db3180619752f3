# SPDX-License-Identifier: MIT
"""Weights that are buffers or constants: fixed linear maps, whose entries scale the edges.

    linear        out[o] = sum over i of w[o, i] x[i]: scales |w[o, i]|, as of any constant matrix
    convolution   scales g[o, i], the sum of |w[o, i]| over the window: the most that the filter can
                  amplify its channel. 1 for a filter that averages (BlurPool), as for a pooling.
                  Divided by the strides of a transposed one, where each result meets so much less
                  of the window: 1 for a filter that interpolates.

They are no layers, and are never pruned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lap_ext.topology.call import Call
from lap_ext.topology.rules.joins import scaled
from lap_ext.topology.rules.mixing import connected
from lap_ext.topology.static import Scale, Static
from lap_ext.topology.tracer import Result, Tracer
from lap_ext.topology.value import Value, plain


def is_fixed(w: Value) -> bool:
    """Whether a weight depends on buffers and constants alone."""
    return w.static is not None and not w.static.trainable


def filtered(t: Tracer, call: Call, x: Value, w: Value, dim: int, transposed: bool) -> Result:
    """Convolves with a fixed kernel; channels lie along dim of x and of the result."""
    if not x.has_channels:
        return plain(call.shape)
    if any(n > 1 for d, n in enumerate(x.ids.shape) if d > dim):
        return t.unknown(call)
    groups, into, out = call["groups"], x.shape[dim], call.shape[dim]
    steps = math.prod(call["stride"]) if transposed else 1
    gains = Static(target=_gains, args=(w.static, steps))
    if into == groups and not transposed:  # by channel
        spread = x.ids.repeat_interleave(out // into, dim) if x.ids.shape[dim] > 1 else x.ids
        shape = tuple(n if d == dim else 1 for d, n in enumerate(call.shape))
        moved = Value(call.shape, spread, trail=x.trail)
        return scaled(t, call, moved, Value(shape, w.ids, gains), Scale("parameter", (gains,)))
    wide, many = into // groups, out // groups
    child = torch.arange(out).repeat_interleave(wide)
    local = torch.arange(wide).repeat(out)
    parent = child // many * wide + local
    entry = parent * many + child % many if transposed else child * wide + local
    ids = x.ids.expand([into if d == dim else n for d, n in enumerate(x.ids.shape)])
    scale = Scale("parameter", (gains,))
    result = connected(t.channels, call.name, ids, dim, out, (child, parent, entry), scale)
    return t.unknown(call) if result is None else Value(call.shape, result, trail=x.trail)


def _gains(kernel: Tensor, steps: int) -> Tensor:
    """Returns the gain of each [row, column] of a kernel [rows, columns, *window]."""
    return kernel.abs().flatten(2).sum(2) / steps
