# SPDX-License-Identifier: MIT
"""Counts how the weights of a pruned checkpoint differ from those of its original."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Differences:
    """Numbers of weights, by how they differ.

    Attributes:
        changed: kept weights that are not those of the original.
        lost: those of them that are zero.
        alive: pruned weights that are not zero.
        zeros: weights that are zero.
        gone: weights of matrices that are zero, and not in the original.
        revived: weights of matrices that are not zero, but in the original.
    """

    changed: int = 0
    lost: int = 0
    alive: int = 0
    zeros: int = 0
    gone: int = 0
    revived: int = 0

    def count(
        self, mine: Tensor, theirs: Tensor, kept: Tensor | None, *, is_matrix: bool = True
    ) -> None:
        """Counts a chunk of both, as integers with the weights' bits.

        Args:
            mine: of the pruned checkpoint.
            theirs: of the original.
            kept: its mask; None if nothing of it is pruned.
            is_matrix: whether it is of a tensor that may be a layer's weight.

        Example:
            >>> import torch
            >>> differences, mine = Differences(), torch.tensor([0, 2, 0, 5, 7])
            >>> differences.count(mine, torch.tensor([1, 2, 0, 4, 0]), mine != 0)
            >>> differences
            Differences(changed=2, lost=0, alive=0, zeros=2, gone=1, revived=1)
        """
        differ, zero = mine != theirs, mine == 0
        changed = differ if kept is None else differ & kept
        count = _count(changed)
        lost = _count(changed & zero) if count else 0
        alive = 0 if kept is None else _count(~(zero | kept))
        self.changed += count
        self.lost += lost
        self.alive += alive
        self.zeros += _count(zero)
        if is_matrix:
            self.gone += _count(differ & zero)
            self.revived += _count(differ & (theirs == 0)) if count or alive else 0

    def add(self, other: Differences) -> None:
        """Adds those of another tensor."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())
