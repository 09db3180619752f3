# SPDX-License-Identifier: MIT
"""What a result says of units across layers: how many of each family, and which cannot go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext._text import layer_name, some
from lap_ext.topology.coupling import CoupledGroups, Fixed

_LISTED = 5  # of many layers, a line lists the first ones


@dataclass(frozen=True)
class FamilyResult:
    """How many units of a family are kept.

    Attributes:
        name: that of its first layer, and how many more there are.
        layers: the layers that make its channels.
        kept: the number of groups that are kept.
        total: the number of groups.
    """

    name: str
    layers: tuple[str, ...]
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """The fraction of the groups that was removed."""
        return 1.0 - self.kept / self.total if self.total else 0.0


def families_of(groups: CoupledGroups, removed: Tensor) -> list[FamilyResult]:
    """Counts the groups of each family; removed: those that go, bool [n]."""
    return [
        FamilyResult(x.name, x.layers, int((~removed[x.groups]).count_nonzero()), x.groups.numel())
        for x in groups.families
    ]


def removed_by(groups: CoupledGroups, masks: Mapping[str, Tensor]) -> Tensor:
    """Finds the groups of whose rows and columns masks keep no weight, bool [n].

    masks: layer name -> mask; layers without one keep all.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
        >>> groups = lap_ext.trace(net, torch.ones(1, 1)).groups("channel")
        >>> removed_by(groups, {"0": torch.tensor([[True], [False]]),
        ...                     "1": torch.tensor([[True, False]])})
        tensor([False,  True])
    """
    alive = torch.zeros(len(groups) + 1, dtype=torch.bool)  # the last one: index -1
    for x in groups.weights:
        mask = masks.get(layer_name(x.parameter))
        if mask is None:
            alive[x.rows] = alive[x.cols.flatten()] = True
            continue
        window = mask.numel() // max(1, x.shape[0] * x.shape[1])
        kept = mask.reshape(*x.shape, window).any(2).cpu()
        alive[x.rows[kept.any(1)]] = True
        kept = kept.reshape(x.groups, x.shape[0] // x.groups, x.shape[1]).any(1)
        alive[x.cols[kept]] = True
    return ~alive[:-1]


def fixed_notes(fixed: Sequence[Fixed]) -> list[str]:
    """Says in a sentence for each reason which channels cannot be removed.

    Example:
        >>> fixed_notes([Fixed("fc", 10, "an output of the model")])
        ["Fixed: 10 channels of 'fc' (an output of the model)."]
    """
    notes = []
    for reason in dict.fromkeys(x.reason for x in fixed):
        own = [x for x in fixed if x.reason == reason]
        names = some(map(repr, dict.fromkeys(x.layer for x in own)), _LISTED)
        count = sum(x.channels for x in own)
        notes.append(f"Fixed: {count:,} channels of {names} ({reason}).")
    return notes
