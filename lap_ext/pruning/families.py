# SPDX-License-Identifier: MIT
"""What a result says of units across layers: how many of each family, and which cannot go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lap_ext._text import some
from lap_ext.topology.coupling import Fixed

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
