# SPDX-License-Identifier: MIT
"""Mixing along dimensions: the same channels where they do not change, else a new one of many."""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.topology import labels as lab
from lap_ext.topology.channels import Arcs, Channels


def mixed(
    channels: Channels, name: str, labels: Tensor, dims: list[int], mean: bool = False
) -> Tensor:
    """Labels after an operation has mixed along dims, which keep size 1.

    Where labels change along dims, each element that remains is a channel of kind "reduce" whose
    parents are all channels that were mixed into it; in a mean, each counts the square of its share
    of the elements.
    """
    changing = [dim for dim in dims if labels.shape[dim] > 1]
    if not changing:
        return labels
    kept = [1 if dim in changing else n for dim, n in enumerate(labels.shape)]
    ends = list(range(labels.dim() - len(changing), labels.dim()))
    rows = labels.movedim(changing, ends).reshape(torch.Size(kept).numel(), -1)
    sets, place = torch.unique(rows, dim=0, return_inverse=True)
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
    return torch.where(live, space.labels, 0)[place].reshape(kept)
