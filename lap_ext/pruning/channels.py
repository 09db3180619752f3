# SPDX-License-Identifier: MIT
"""Selects the same number of weights in every output channel of a layer.

Every channel keeps the same number, or all that it has if it has fewer. If weights remain to be
kept, the first channels that have more keep one more each. Of equal scores in a channel, the one
with the lower flat index is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.places import Chunk
from lap_ext.pruning.scoring import Scoring
from lap_ext.topology import Layer
from lap_ext.topology.roles import Part


def mask(scores: Tensor, part: Part, keep: int, live: Tensor | None) -> Tensor:
    """Selects the best weights of every output channel of a full layer, keep weights in total.

    Only weights that live marks may be selected.
    """
    rows = _rows(scores, part)  # [O, weights per channel]
    eligible = None if live is None else _rows(live, part)
    n = rows.shape[1]
    capacity = torch.full(rows.shape[:1], n) if eligible is None else eligible.sum(1).cpu()
    kept = _best(rows, eligible, even_counts(capacity, keep))
    return _from_rows(kept, part).reshape(scores.shape).contiguous()


def counts(scoring: Scoring, layer: Layer, keep: int) -> Tensor:
    """Counts what every output channel keeps of a layer that comes in chunks, int64 [O]."""
    part = layer.roles[0].part
    if part.transposed:
        raise LapValueError(
            "room for a full layer whose rows are inputs, to rank within output channels, in "
            "{argument}",
            f"a layer of {scoring.place.bytes(layer):,} bytes beside its scores",
            "Raise it, or rank the whole layer: Wanda(per_row=False).",
            layer=layer.name,
            argument="memory",
        )
    n = max(torch.Size(part.shape[1:]).numel(), 1)
    capacity = torch.full([part.shape[0]], n)
    for chunk in scoring.chunks(layer):
        live = scoring.place.live(chunk)
        if live is not None:
            top, count = chunk.first // n, chunk.weight.numel() // n
            capacity[top : top + count] = live.reshape(-1, n).sum(1).cpu()
    return even_counts(capacity, keep)


def mask_rows(
    scores: Tensor, chunk: Chunk, part: Part, counts: Tensor, live: Tensor | None
) -> Tensor:
    """Selects the best counts[o] weights of each output channel in a chunk; rows are channels."""
    n = max(torch.Size(part.shape[1:]).numel(), 1)
    rows, eligible = scores.reshape(-1, n), None if live is None else live.reshape(-1, n)
    top = chunk.first // n
    return _best(rows, eligible, counts[top : top + rows.shape[0]]).reshape(scores.shape)


def even_counts(capacity: Tensor, keep: int) -> Tensor:
    """Splits keep evenly over rows, up to the capacity of each; returns counts, int64 [rows].

    The first rows with capacity left get one more each from the remainder.

    Example:
        >>> even_counts(torch.tensor([5, 1, 5]), 8)     # 3, 1, 3 and one left over
        tensor([4, 1, 3])
    """
    low, high = 0, int(capacity.max()) if capacity.numel() else 0
    while low < high:  # the largest count per row that fits
        level = (low + high + 1) // 2
        if int(capacity.clamp(max=level).sum()) <= keep:
            low = level
        else:
            high = level - 1
    counts = capacity.clamp(max=low)
    remainder = max(keep - int(counts.sum()), 0)
    more = (capacity > low).nonzero().flatten()[:remainder]
    counts[more] += 1
    return counts


def _best(rows: Tensor, live: Tensor | None, counts: Tensor) -> Tensor:
    """Selects the best counts[r] of each row [rows, n]."""
    if live is not None:
        rows = rows.masked_fill(~live, -1.0)
    order = rows.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(rows.shape[1], device=rows.device) < counts.to(rows.device)[:, None]
    kept = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    return kept.scatter_(1, order, first)


def _rows(x: Tensor, part: Part) -> Tensor:
    """Reshapes a tensor like a weight to one row per output channel, in flat order in each."""
    matrix = x.reshape(part.shape)
    if not part.transposed:
        return matrix.flatten(1)
    groups, (into, out) = part.groups, part.shape[:2]
    split = matrix.reshape(groups, into // groups, out, -1)  # group, input, output, window
    return split.transpose(1, 2).reshape(groups * out, -1)


def _from_rows(rows: Tensor, part: Part) -> Tensor:
    """Inverts `_rows`: back to the flat order of the weight."""
    if not part.transposed:
        return rows
    groups, (into, out) = part.groups, part.shape[:2]
    return rows.reshape(groups, out, into // groups, -1).transpose(1, 2)
