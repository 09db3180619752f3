# SPDX-License-Identifier: MIT
"""Row and column energies of weights that come from files: the same bits as of the whole weight.

A weight that fits is measured whole, as in memory. Of a larger one, runs of whole rows come in
order. Row energies are each a row's own. Column energies are added 64 rows at a time
(csrc/math/sums.h): rows wait until 64 of them, or the end of their group, are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lap_ext.checkpoint.files import FUNCTION
from lap_ext.checkpoint.layer_scores import of_layer, pieces
from lap_ext.criteria.context import Network
from lap_ext.ops import schema
from lap_ext.ops.reference.norms import SEGMENT_ROWS
from lap_ext.topology import Layer, Topology
from lap_ext.topology.roles import Role

Energies = tuple[Tensor, Tensor]  # squared norms of the inputs [I] and outputs [O], float64


class FileNetwork(Network):
    """A network whose weights are not there: energies are set from outside, one layer at a time."""

    def __init__(self, topology: Topology, bn: str) -> None:
        super().__init__(topology, bn, function=FUNCTION)
        self._held: dict[str, Tensor] = {}

    def weight(self, layer: Layer) -> Tensor:
        """The weight that is held now."""
        return self._held[layer.name].view(layer.shape)

    def hold(self, layer: Layer, weight: Tensor) -> None:
        """Lets scores and energies of a layer be computed from this weight, and no other's."""
        self._held = {layer.name: weight}

    def measure(self, layer: Layer) -> None:
        """Energies of the layer that is held."""
        with of_layer(layer, 0, self._held[layer.name]):
            for role in layer.roles:
                place = self.topology.roles.index(role)
                self._energies[place] = self._measure(place)

    def measure_runs(self, layer: Layer, runs: Iterable[tuple[int, Tensor]]) -> None:
        """Energies of a layer whose elements come in runs of whole rows, in order."""
        places = [self.topology.roles.index(role) for role in layer.roles]
        sums = [_Sums(self, place) for place in places]
        for first, weight in runs:
            with of_layer(layer, first, weight):
                for found in sums:
                    found.add(first, weight)
        for place, found in zip(places, sums, strict=True):
            self._energies[place] = found.energies()

    def state(self) -> dict[str, Tensor]:
        """The energies by name, to be saved."""
        return {
            f"{place}.{side}": energy
            for place, found in enumerate(self._energies)
            if found is not None
            for side, energy in zip(("in", "out"), found, strict=True)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """What `state` has returned."""
        for place in range(len(self._energies)):
            self._energies[place] = (state[f"{place}.in"], state[f"{place}.out"])


class _Sums:
    """The energies of one role, so far."""

    def __init__(self, network: FileNetwork, place: int) -> None:
        self.network = network
        self.role: Role = network.topology.roles[place]
        self.part = self.role.part
        self.across = network.row_weight(place, self.role)
        # all that stays is allocated now: small pieces between large ones would fragment the heap
        groups, width = self.part.groups, torch.Size(self.part.block[1:]).numel()
        self.rows = torch.zeros(self.part.block[0], dtype=torch.float64)
        self.columns = torch.zeros(groups, width, dtype=torch.float64)
        self.segment: Tensor | None = None  # [64, width]: rows of one that is not complete
        self.waiting = 0  # how many
        self.height = self.part.block[0] // groups
        self.seen = 0  # rows

    def add(self, first: int, weight: Tensor) -> None:
        """The rows in a run of the layer's elements."""
        part = self.part
        length = max(1, torch.Size(part.shape[1:]).numel())
        for x in pieces(part, first, weight.numel()):
            run = weight[x.top * length - first : x.bottom * length - first]
            block = run.view(x.bottom - x.top, *part.shape[1:])
            if part.cols is not None:
                block = block[:, part.cols[0] : part.cols[1]]
            counted = self._counted(block, x.top)
            by_row, by_column = (counted, block) if part.transposed else (block, counted)
            self._add(by_row.flatten(1), by_column.flatten(1))

    def _counted(self, block: Tensor, top: int) -> Tensor:
        """The block as a consumer's column norm counts it: with batch norms folded into its outputs."""
        if self.across is None:
            return block
        top -= self.part.rows[0] if self.part.rows is not None else 0
        bottom = top + block.shape[0]
        if self.part.transposed:
            group = torch.arange(top, bottom) // max(self.height, 1)
            factor = self.across.view(self.part.groups, block.shape[1])[group]
        else:
            factor = self.across[top:bottom, None]
        return block.double() * factor.view(*factor.shape, *[1] * (block.dim() - 2))

    def _add(self, by_row: Tensor, by_column: Tensor) -> None:
        """The next rows, as row and as column energies count them, up to the end of each segment."""
        begin = 0
        while begin < by_row.shape[0]:
            group, place = divmod(self.seen, self.height)
            missing = min(SEGMENT_ROWS - place % SEGMENT_ROWS, self.height - place)
            rows, columns = by_row[begin : begin + missing], by_column[begin : begin + missing]
            complete, count = rows.shape[0] == missing, rows.shape[0]
            if complete and not self.waiting and self.across is None:
                row, column = self._call(schema.energies, rows, 1)  # one reading for both
                self.columns[group] += column
            else:
                row = self._call(schema.row_energy, rows)
                columns = self._joined(columns, complete)
                if complete:
                    self.columns[group] += self._call(schema.col_energy, columns, 1)
            self.rows[self.seen : self.seen + count] = row
            self.seen, begin = self.seen + count, begin + count

    def _joined(self, rows: Tensor, complete: bool) -> Tensor:
        """The rows behind those that wait for the end of their segment."""
        if complete and not self.waiting:
            return rows
        if self.segment is None:
            self.segment = rows.new_empty(SEGMENT_ROWS, rows.shape[1])
        end = self.waiting + rows.shape[0]
        self.segment[self.waiting : end] = rows  # copied: the run's buffer is used again
        self.waiting = 0 if complete else end
        return self.segment[:end]

    def _call(self, op: Callable[..., Any], block: Tensor, *options: object) -> Any:
        return schema.call(
            FUNCTION, op, block, *options, self.network.check_finite, self.role.layer
        )

    def energies(self) -> Energies:
        """Of the inputs and outputs."""
        taps = self.columns.view(self.part.groups * self.part.block[1], -1)
        columns = torch.zeros(taps.shape[0], dtype=torch.float64)
        for tap in taps.unbind(1):
            columns += tap
        return (self.rows, columns) if self.part.transposed else (columns, self.rows)
