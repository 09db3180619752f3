# SPDX-License-Identifier: MIT
"""Mixing along dimensions: the same channels where they do not change, else a new one of many."""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.topology import labels as lab
from lap_ext.topology.channels import Arcs, Channels


def mixed(
    channels: Channels, name: str, labels: Tensor, dims: list[int], weight: float = 1.0
) -> Tensor:
    """Labels after an operation has mixed along dims, which keep size 1.

    Where labels change along dims, each element that remains is a channel of kind "reduce" whose
    parents are all channels that were mixed into it, each with this weight.
    """
    changing = [dim for dim in dims if labels.shape[dim] > 1]
    if not changing:
        return labels
    kept = [1 if dim in changing else n for dim, n in enumerate(labels.shape)]
    ends = list(range(labels.dim() - len(changing), labels.dim()))
    rows = labels.movedim(changing, ends).reshape(torch.Size(kept).numel(), -1)
    sets, place = torch.unique(rows, dim=0, return_inverse=True)
    child, parent = lab.pairs_along(sets, 0, sets.shape[0])
    if parent.numel() == 0:
        return lab.none(labels.dim())
    weights = None if weight == 1.0 else torch.full(child.shape, weight, dtype=torch.float64)
    arcs = Arcs(child, parent, weight=weights)
    space = channels.add(sets.shape[0], "reduce", name, [arcs])
    live = torch.zeros(sets.shape[0], dtype=torch.bool)
    live[child] = True
    return torch.where(live, space.labels, 0)[place].reshape(kept)
