# SPDX-License-Identifier: MIT
"""How many weights each layer keeps in one ranking by LAMP scores that are never all in memory.

    lamp[j] = s[j]^2 / sum of s[m]^2 over m ranked at or above j     (pruning/normalization.py)

The search is the one in memory (pruning/shares.py), over scores of chunks of rows. Each layer then
is ranked by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lap_ext import allocation
from lap_ext.checkpoint.layer_scores import LayerScores
from lap_ext.checkpoint.passes import Task
from lap_ext.checkpoint.reading import Buffer
from lap_ext.ops.reference.common import score_dtype
from lap_ext.pruning import shares
from lap_ext.topology import Layer

_HELD = 2  # candidates of a ranking that take the memory of one here


def kept(
    task: Task, layers: Sequence[Layer], keep: int, floors: Mapping[str, int]
) -> dict[str, int]:
    """Finds for each layer how many weights it keeps of keep in all, at least its floor."""
    buffer = Buffer()
    sources = {layer.name: _source(task, layer, buffer) for layer in layers}
    counts: dict[str, int] = {}

    def rank(names: Sequence[str], keep: int) -> dict[str, int]:
        some = [sources[name] for name in names]
        found = shares.shares(some, keep, task.limits.candidates // _HELD)
        new = dict(zip(names, found, strict=True))
        counts.update(new)
        return new

    allocation.rank_with_floors(list(sources), keep, floors, rank)
    return counts


def _source(task: Task, layer: Layer, buffer: Buffer) -> shares.Source:
    """Describes the scores of a layer; weights that are zero may not be kept."""

    def read() -> Iterator[Tensor]:
        task.begin("rank", [layer])
        scores = LayerScores(task.network, task.criterion_of(layer), layer)
        for first, weight in task.chunks(layer, task.copies[layer.name][0], buffer):
            yield torch.where(weight == 0, -1.0, scores.of(weight, first))

    dtype = score_dtype(task.dtype(layer))
    return shares.Source(layer.name, read, math.prod(layer.shape), dtype)
