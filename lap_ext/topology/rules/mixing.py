# SPDX-License-Identifier: MIT
"""Helpers of the rules, no rules: mixing along dimensions.

Where channels do not change along a dimension they stay the same ones; where they do, each result
is a new channel made of many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.topology import labels as lab
from lap_ext.topology.channels import Arcs, Channels
from lap_ext.topology.static import Scale, Static

_MOST_ARCS = 1 << 22  # 100 MB of them


def mixed(
    channels: Channels, name: str, labels: Tensor, dims: list[int], mean: bool = False
) -> Tensor:
    """Labels after an operation has mixed along dims, which keep size 1.

    Where labels change along dims, each element that remains is a channel of kind "reduce" whose
    parents are all channels that were mixed into it; in a mean, each counts the square of its share
    of the elements.
    """
    if all(labels.shape[dim] == 1 for dim in dims):
        return labels
    sets, place = sets_along(labels, dims)
    base = int(sets.max()) + 1
    keys, counts = torch.unique(
        torch.arange(sets.shape[0])[:, None] * base + sets, return_counts=True
    )
    keys, counts = keys[keys % base != 0], counts[keys % base != 0]  # 0 is no channel
    child, parent = keys // base, keys % base
    if parent.numel() == 0:
        return lab.none(labels.dim())
    weights = (counts.double() / sets.shape[1]).square() if mean else None
    arcs = Arcs(child, parent, weight=weights)
    space = channels.add(sets.shape[0], "reduce", name, [arcs])
    live = torch.zeros(sets.shape[0], dtype=torch.bool)
    live[child] = True
    return torch.where(live, space.labels, 0)[place]


def sets_along(labels: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """What lies along dims: the distinct runs of labels [n, m], and which one is where.

    The places have the rank of labels and size 1 along dims.
    """
    changing = [dim for dim in dims if labels.shape[dim] > 1]
    kept = [1 if dim in changing else n for dim, n in enumerate(labels.shape)]
    ends = list(range(labels.dim() - len(changing), labels.dim()))
    rows = labels.movedim(changing, ends).reshape(torch.Size(kept).numel(), -1)
    sets, place = torch.unique(rows, dim=0, return_inverse=True)
    return sets, place.reshape(kept)


def projected(
    channels: Channels, name: str, labels: Tensor, dim: int, matrix: Static, n: int, flipped: bool
) -> Tensor | None:
    """Labels after a constant matrix [size of dim, n] (flipped: [n, size]) was applied along dim.

    Each result is a channel of kind "reduce" with the matrix's entries as scales. None: the matrix
    is too large to be followed entry by entry.
    """
    k = labels.shape[dim]
    moved = labels.movedim(dim, -1)
    sets, place = torch.unique(moved.reshape(-1, k), dim=0, return_inverse=True)
    if sets.shape[0] * n * k > _MOST_ARCS:
        return None
    parent = sets[:, None].expand(-1, n, k).flatten()
    child = torch.arange(sets.shape[0] * n).repeat_interleave(k)
    places = torch.arange(n * k).reshape(n, k) if flipped else torch.arange(n * k).reshape(k, n).T
    entry = places.expand(sets.shape[0], n, k).flatten()
    live = parent != 0
    scale = Scale("parameter", (matrix,))
    arcs = Arcs(child[live], parent[live], scale=scale, entry=entry[live])
    space = channels.add(sets.shape[0] * n, "reduce", name, [arcs])
    return space.labels.reshape(-1, n)[place].reshape(*moved.shape[:-1], n).movedim(-1, dim)
