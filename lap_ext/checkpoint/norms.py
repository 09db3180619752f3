# SPDX-License-Identifier: MIT
"""Row and column squared norms of weights in files: the same bits as of the full weight in memory.

A weight that fits is measured at once. A larger one comes in chunks of rows, in order. The squared
norm of a row needs no other row. Column squared norms are added 64 rows at a time
(csrc/math/sums.h): rows are held back until there are 64 of them, or until their group ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lap_ext.checkpoint.layer_scores import in_chunk, row_ranges
from lap_ext.criteria.context import Network
from lap_ext.ops import schema
from lap_ext.ops.reference.norms import SEGMENT_ROWS
from lap_ext.options import BatchNorm
from lap_ext.topology import Layer, Topology
from lap_ext.topology.roles import Role

SquaredNorms = tuple[Tensor, Tensor]  # of the inputs [I] and outputs [O], float64


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
        sums = [_Sums(self, index) for index in indices]
        for first, weight in chunks:
            with in_chunk(layer, first, weight):
                for role_sums in sums:
                    role_sums.add(first, weight)
        for index, role_sums in zip(indices, sums, strict=True):
            self._squared_norms[index] = role_sums.squared_norms()

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


class _Sums:
    """The squared norms of a role, over the rows so far."""

    def __init__(self, network: FileNetwork, index: int) -> None:
        self.network = network
        self.role: Role = network.topology.roles[index]
        self.part = self.role.part
        self.across = network.row_weight(index, self.role)
        # all that stays is allocated now: small buffers between large ones would fragment the heap
        groups, width = self.part.groups, torch.Size(self.part.block[1:]).numel()
        self.rows = torch.zeros(self.part.block[0], dtype=torch.float64)
        self.columns = torch.zeros(groups, width, dtype=torch.float64)
        self.segment: Tensor | None = None  # [64, width]: the rows of an incomplete segment
        self.waiting = 0  # how many of them there are
        self.height = self.part.block[0] // groups
        self.seen = 0  # rows

    def add(self, first: int, weight: Tensor) -> None:
        """Adds the rows in a chunk of the layer's elements."""
        part = self.part
        length = max(1, torch.Size(part.shape[1:]).numel())
        for x in row_ranges(part, first, weight.numel()):
            rows = weight[x.top * length - first : x.bottom * length - first]
            rows = rows.view(x.bottom - x.top, *part.shape[1:])
            if part.cols is not None:
                rows = rows[:, part.cols[0] : part.cols[1]]
            counted = self._counted(rows, x.top)
            by_row, by_column = (counted, rows) if part.transposed else (rows, counted)
            self._add(by_row.flatten(1), by_column.flatten(1))

    def _counted(self, rows: Tensor, top: int) -> Tensor:
        """Weights rows as a consumer's column norm counts them: with batch norms folded in."""
        if self.across is None:
            return rows
        top -= self.part.rows[0] if self.part.rows is not None else 0
        bottom = top + rows.shape[0]
        if self.part.transposed:
            group = torch.arange(top, bottom) // max(self.height, 1)
            factor = self.across.view(self.part.groups, rows.shape[1])[group]
        else:
            factor = self.across[top:bottom, None]
        return rows.double() * factor.view(*factor.shape, *[1] * (rows.dim() - 2))

    def _add(self, by_row: Tensor, by_column: Tensor) -> None:
        """Adds rows, as row and as column squared norms count them, segment by segment."""
        begin = 0
        while begin < by_row.shape[0]:
            group, row_index = divmod(self.seen, self.height)
            missing = min(SEGMENT_ROWS - row_index % SEGMENT_ROWS, self.height - row_index)
            rows, columns = by_row[begin : begin + missing], by_column[begin : begin + missing]
            complete, count = rows.shape[0] == missing, rows.shape[0]
            if complete and not self.waiting and self.across is None:
                row, column = self._call(schema.squared_norms, rows, 1)  # read once for both
                self.columns[group] += column
            else:
                row = self._call(schema.row_squared_norms, rows)
                columns = self._joined(columns, complete)
                if complete:
                    self.columns[group] += self._call(schema.col_squared_norms, columns, 1)
            self.rows[self.seen : self.seen + count] = row
            self.seen, begin = self.seen + count, begin + count

    def _joined(self, rows: Tensor, complete: bool) -> Tensor:
        """Appends rows to those that wait for the end of their segment."""
        if complete and not self.waiting:
            return rows
        if self.segment is None:
            self.segment = rows.new_empty(SEGMENT_ROWS, rows.shape[1])
        end = self.waiting + rows.shape[0]
        self.segment[self.waiting : end] = rows  # copied: the chunk's buffer is used again
        self.waiting = 0 if complete else end
        return self.segment[:end]

    def _call(self, op: Callable[..., Any], rows: Tensor, *options: object) -> Any:
        return schema.call(op, rows, *options, self.network.check_finite, "w")

    def squared_norms(self) -> SquaredNorms:
        """Returns those of the inputs and of the outputs."""
        taps = self.columns.view(self.part.groups * self.part.block[1], -1)
        columns = torch.zeros(taps.shape[0], dtype=torch.float64)
        for tap in taps.unbind(1):
            columns += tap
        return (self.rows, columns) if self.part.transposed else (columns, self.rows)
