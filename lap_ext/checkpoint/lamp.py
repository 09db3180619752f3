# SPDX-License-Identifier: MIT
"""How many weights each layer keeps in one ranking by LAMP scores that are never all in memory.

    lamp[j] = s[j]^2 / sum of s[m]^2 over m ranked at or above j     (pruning/normalization.py)

The search is the one in memory (pruning/shares.py), over scores of chunks of rows. Each layer then
is ranked by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from lap_ext.checkpoint.layer_scores import LayerScores
from lap_ext.checkpoint.passes import Task
from lap_ext.checkpoint.reading import Buffer
from lap_ext.ops.reference.common import score_dtype
from lap_ext.pruning import shares
from lap_ext.topology import Layer

_HELD = 2  # candidates of a ranking that take the memory of one here


def kept(task: Task, layers: Sequence[Layer], keep: int) -> dict[str, int]:
    """Finds for each layer how many weights it keeps of keep in all."""
    buffer = Buffer()
    sources = [_source(task, layer, buffer) for layer in layers]
    found = shares.shares(sources, keep, task.limits.candidates // _HELD)
    return {layer.name: share for layer, share in zip(layers, found, strict=True)}


def _source(task: Task, layer: Layer, buffer: Buffer) -> shares.Source:
    def read() -> Iterator[Tensor]:
        task.begin("rank", [layer])
        scores = LayerScores(task.network, task.criterion, layer)
        for first, weight in task.chunks(layer, task.copies[layer.name][0], buffer):
            yield scores.of(weight, first)

    dtype = score_dtype(task.dtype(layer))
    return shares.Source(layer.name, read, math.prod(layer.shape), dtype)
