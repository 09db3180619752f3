# SPDX-License-Identifier: MIT
"""Joins channels that can only be removed together: connected components of channel ids."""

from __future__ import annotations

import torch
from torch import Tensor


class Components:
    """Channel ids 0 to size - 1, each with the lowest id of those that it is joined with.

    Example:
        >>> joined = Components(5)
        >>> joined.join(torch.tensor([1, 4]), torch.tensor([2, 2]))
        >>> joined.labels().tolist()
        [0, 1, 1, 3, 1]
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def join(self, a: Tensor, b: Tensor) -> None:
        """Joins channels pair by pair."""
        if a.numel():
            self._pairs.append((a, b))

    def join_equal(self, keys: Tensor, ids: Tensor) -> None:
        """Joins all channels that have the same key."""
        if ids.numel():
            order = torch.argsort(keys, stable=True)
            keys, ids = keys[order], ids[order]
            same = keys[1:] == keys[:-1]
            self.join(ids[1:][same], ids[:-1][same])

    def labels(self) -> Tensor:
        """Returns the lowest id of each component, int64 [size]."""
        label = torch.arange(self._size)
        if not self._pairs:
            return label
        a, b = (torch.cat(side) for side in zip(*self._pairs, strict=True))
        while True:
            least = torch.minimum(label[a], label[b])
            before = label.clone()
            for side in (label[a], label[b]):  # the roots of both take the lower label
                label = label.scatter_reduce(0, side, least, "amin")
            while not torch.equal(label, label[label]):
                label = label[label]
            if torch.equal(before, label):
                return label
