# SPDX-License-Identifier: MIT
"""Row and column squared norms of weights in files: the same bits as of the full weight in memory.

A weight that fits is measured at once. A larger one comes in chunks of rows, in order
(ops/channel_sums.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lap_ext.checkpoint.layer_scores import in_chunk, row_ranges, rows_of
from lap_ext.criteria.context import Network
from lap_ext.ops.channel_sums import ChannelSums
from lap_ext.options import BatchNorm
from lap_ext.topology import Layer, Topology


class FileNetwork(Network):
    """A network without weights: it is given one layer at a time, and keeps the squared norms."""

    def __init__(self, topology: Topology, batch_norm: BatchNorm) -> None:
        super().__init__(topology, batch_norm)
        self._held: dict[str, Tensor] = {}

    def weight(self, layer: Layer) -> Tensor:
        """Returns the weight that is held now."""
        return self._held[layer.name].view(layer.shape)

    def hold(self, layer: Layer, weight: Tensor) -> None:
        """Replaces the weight that is held by a layer's, to score and measure it."""
        self._held = {layer.name: weight}

    def measure(self, layer: Layer) -> None:
        """Takes the squared norms of the layer that is held."""
        with in_chunk(layer, 0, self._held[layer.name]):
            for role in layer.roles:
                index = self.topology.roles.index(role)
                self._squared_norms[index] = self._measure(index)

    def measure_chunks(self, layer: Layer, chunks: Iterable[tuple[int, Tensor]]) -> None:
        """Takes the squared norms of a layer whose elements come in chunks of rows, in order."""
        indices = [self.topology.roles.index(role) for role in layer.roles]
        sums = [self._sums(index) for index in indices]
        for first, weight in chunks:
            with in_chunk(layer, first, weight):
                for role, role_sums in zip(layer.roles, sums, strict=True):
                    for x in row_ranges(role.part, first, weight.numel()):
                        role_sums.add(rows_of(weight, first, role.part, x))
        for index, role_sums in zip(indices, sums, strict=True):
            self._squared_norms[index] = role_sums.squared_norms()

    def _sums(self, index: int) -> ChannelSums:
        role = self.topology.roles[index]
        part, scale = role.part, self.row_weight(index, role)
        options = part.groups, part.transposed, scale, self.check_finite
        return ChannelSums(part.block, *options, "cpu")

    def state(self) -> dict[str, Tensor]:
        """Returns the squared norms by name, to be saved."""
        return {
            f"{index}.{side}": squared_norm
            for index, pair in enumerate(self._squared_norms)
            if pair is not None
            for side, squared_norm in zip(("in", "out"), pair, strict=True)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Sets the squared norms that `state` has returned."""
        for index in range(len(self._squared_norms)):
            self._squared_norms[index] = (state[f"{index}.in"], state[f"{index}.out"])
