# SPDX-License-Identifier: MIT
"""Masks the rows and columns that a layer loses with units across layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext.places import Chunk
from lap_ext.topology.coupling import Assigned


@dataclass(frozen=True)
class KeptAxes:
    """The rows and columns of a layer that are kept.

    Attributes:
        views: of the weight as a matrix, with the groups of its rows and columns.
        removed: the groups that go, bool.
        zeros: whether weights that are zero are kept like others.
    """

    views: tuple[Assigned, ...]
    removed: Tensor
    zeros: bool = False

    def mask(self, chunk: Chunk) -> Tensor:
        """Masks a chunk: True where its row and its column are kept."""
        shape = chunk.layer.shape
        result: Tensor | None = None
        for x in self.views:
            rows, cols = x.kept(self.removed)
            window = torch.Size(shape).numel() // max(1, x.shape[0] * x.shape[1])
            length = max(1, x.shape[1] * window)
            first, count = chunk.first // length, chunk.weight.numel() // length
            at = torch.arange(first, first + count)
            kept = rows[at].unsqueeze(1) & cols[at // (x.shape[0] // x.groups)]
            spread = kept.unsqueeze(-1).expand(*kept.shape, window)
            mask = spread.reshape(chunk.weight.shape).contiguous()
            result = mask if result is None else result & mask
        assert result is not None
        return result.to(chunk.weight.device)
