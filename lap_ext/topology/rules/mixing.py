# SPDX-License-Identifier: MIT
"""Helpers of the rules: mixing along dimensions.

Channels that do not change along a dimension stay as they are; where they change, each result is a
new channel with many parents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.topology import channel_ids
from lap_ext.topology.channels import ChannelEdges, Channels
from lap_ext.topology.static import Scale, Static

_MOST_EDGES = 1 << 22  # 100 MB


def mixed(
    channels: Channels, name: str, ids: Tensor, dims: list[int], mean: bool = False
) -> Tensor:
    """Returns the ids after an operation has mixed along dims, which keep size 1.

    Where ids change along dims, each element that remains is a channel of kind "reduce" whose
    parents are all channels that were mixed into it. In a mean, each counts the square of its share
    of the elements.
    """
    if all(ids.shape[dim] == 1 for dim in dims):
        return ids
    sets, set_of = sets_along(ids, dims)
    base = int(sets.max()) + 1
    keys, counts = torch.unique(
        torch.arange(sets.shape[0])[:, None] * base + sets, return_counts=True
    )
    keys, counts = keys[keys % base != 0], counts[keys % base != 0]  # 0 is no channel
    child, parent = keys // base, keys % base
    if parent.numel() == 0:
        return channel_ids.none(ids.dim())
    weights = (counts.double() / sets.shape[1]).square() if mean else None
    edges = ChannelEdges(child, parent, weight=weights)
    group = channels.add(sets.shape[0], "reduce", name, [edges])
    live = torch.zeros(sets.shape[0], dtype=torch.bool)
    live[child] = True
    return torch.where(live, group.ids, 0)[set_of]


def sets_along(ids: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Finds the distinct rows of ids along dims, [n, m], and the index of the row of each element.

    The indices have the rank of ids and size 1 along dims.
    """
    changing = [dim for dim in dims if ids.shape[dim] > 1]
    kept = [1 if dim in changing else n for dim, n in enumerate(ids.shape)]
    ends = list(range(ids.dim() - len(changing), ids.dim()))
    rows = ids.movedim(changing, ends).reshape(torch.Size(kept).numel(), -1)
    sets, set_of = torch.unique(rows, dim=0, return_inverse=True)
    return sets, set_of.reshape(kept)


def projected(
    channels: Channels, name: str, ids: Tensor, dim: int, matrix: Static, n: int, flipped: bool
) -> Tensor | None:
    """Returns the ids after a constant matrix [size of dim, n] (flipped: [n, size]) along dim.

    Each result is a channel of kind "reduce" with the matrix's entries as scales. None: the matrix
    is too large to be followed entry by entry.
    """
    k = ids.shape[dim]
    child = torch.arange(n).repeat_interleave(k)
    index = torch.arange(k).repeat(n)
    entry = torch.arange(n * k) if flipped else torch.arange(n * k).reshape(k, n).T.flatten()
    scale = Scale("parameter", (matrix,))
    return connected(channels, name, ids, dim, n, (child, index, entry), scale)


def connected(
    channels: Channels,
    name: str,
    ids: Tensor,
    dim: int,
    n: int,
    links: tuple[Tensor, Tensor, Tensor],
    scale: Scale,
) -> Tensor | None:
    """Returns the ids after a constant linear map to n channels along dim.

    links: the index of the result, the index along dim and the entry of the scale, one each. None:
    there are too many to be followed one by one.
    """
    child, index, entry = links
    moved = ids.movedim(dim, -1)
    sets, set_of = torch.unique(moved.reshape(-1, ids.shape[dim]), dim=0, return_inverse=True)
    if sets.shape[0] * child.numel() > _MOST_EDGES:
        return None
    parent = sets[:, index].flatten()
    child = (torch.arange(sets.shape[0])[:, None] * n + child).flatten()
    entry = entry.repeat(sets.shape[0])
    live = parent != 0
    edges = ChannelEdges(child[live], parent[live], scale=scale, entry=entry[live])
    group = channels.add(sets.shape[0] * n, "reduce", name, [edges])
    return group.ids.reshape(-1, n)[set_of].reshape(*moved.shape[:-1], n).movedim(-1, dim)
