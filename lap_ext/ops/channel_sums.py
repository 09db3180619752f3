# SPDX-License-Identifier: MIT
"""Adds up the squared norms of a weight's rows and columns over chunks of rows that come in order.

The bits are those of the full weight. The squared norm of a row needs no other row. Column squared
norms are added 64 rows at a time (csrc/math/sums.h): rows are held back until there are 64 of them,
or until their group ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lap_ext.ops import schema
from lap_ext.ops.reference.norms import SEGMENT_ROWS

SquaredNorms = tuple[Tensor, Tensor]  # of the inputs [I] and outputs [O], float64


class ChannelSums:
    """The squared norms of a weight, over the rows so far.

    Args:
        shape: of the weight, [rows, cols, *window].
        groups: of channels, as in `score_from_norms`.
        transposed: whether rows are inputs.
        scale: each output channel's scale in column norms, float64 [O], or None for ones.
        check_finite: whether to raise an error if a weight is inf or NaN.
        device: of the rows.
    """

    def __init__(
        self,
        shape: Sequence[int],
        groups: int,
        transposed: bool,
        scale: Tensor | None,
        check_finite: bool,
        device: torch.device | str,
    ) -> None:
        self._cols, self._groups, self._transposed = shape[1], groups, transposed
        self._window = torch.Size(shape[2:]).numel()
        self._check = check_finite
        self._scale = None if scale is None else scale.to(device)
        # all that stays is allocated now: small buffers between large ones would fragment the heap
        width = torch.Size(shape[1:]).numel()
        self._rows = torch.zeros(shape[0], dtype=torch.float64, device=device)
        self._columns = torch.zeros(groups, width, dtype=torch.float64, device=device)
        self._segment: Tensor | None = None  # [64, width]: the rows of an incomplete segment
        self._waiting = 0  # how many of them there are
        self._height = shape[0] // groups
        self._seen = 0  # rows

    def add(self, rows: Tensor) -> None:
        """Adds the next rows, [r, cols, *window]."""
        counted = self._counted(rows)
        by_row, by_column = (counted, rows) if self._transposed else (rows, counted)
        self._add(by_row.flatten(1), by_column.flatten(1))

    def squared_norms(self) -> SquaredNorms:
        """Returns those of the inputs and of the outputs."""
        taps = self._columns.view(self._groups * self._cols, self._window)
        columns = torch.zeros_like(taps[:, 0]) if taps.shape[1] else self._columns.flatten()
        for tap in taps.unbind(1):
            columns += tap
        return (self._rows, columns) if self._transposed else (columns, self._rows)

    def _counted(self, rows: Tensor) -> Tensor:
        """Weights rows as a consumer's column norm counts them: with batch norms folded in."""
        if self._scale is None:
            return rows
        top, bottom = self._seen, self._seen + rows.shape[0]
        if self._transposed:
            group = torch.arange(top, bottom, device=rows.device) // max(self._height, 1)
            factor = self._scale.view(self._groups, rows.shape[1])[group]
        else:
            factor = self._scale[top:bottom, None]
        return rows.double() * factor.view(*factor.shape, *[1] * (rows.dim() - 2))

    def _add(self, by_row: Tensor, by_column: Tensor) -> None:
        """Adds rows, as row and as column squared norms count them, segment by segment."""
        begin = 0
        while begin < by_row.shape[0]:
            group, row_index = divmod(self._seen, self._height)
            missing = min(SEGMENT_ROWS - row_index % SEGMENT_ROWS, self._height - row_index)
            rows, columns = by_row[begin : begin + missing], by_column[begin : begin + missing]
            complete, count = rows.shape[0] == missing, rows.shape[0]
            if complete and not self._waiting and self._scale is None:
                row, column = self._call(schema.squared_norms, rows, 1)  # read once for both
                self._columns[group] += column
            else:
                row = self._call(schema.row_squared_norms, rows)
                columns = self._joined(columns, complete)
                if complete:
                    self._columns[group] += self._call(schema.col_squared_norms, columns, 1)
            self._rows[self._seen : self._seen + count] = row
            self._seen, begin = self._seen + count, begin + count

    def _joined(self, rows: Tensor, complete: bool) -> Tensor:
        """Appends rows to those that wait for the end of their segment."""
        if complete and not self._waiting:
            return rows
        if self._segment is None:
            self._segment = rows.new_empty(SEGMENT_ROWS, rows.shape[1])
        end = self._waiting + rows.shape[0]
        self._segment[self._waiting : end] = rows  # copied: the chunk's buffer is used again
        self._waiting = 0 if complete else end
        return self._segment[:end]

    def _call(self, op: Callable[..., Any], rows: Tensor, *options: object) -> Any:
        return schema.call(op, rows, *options, self._check, "w")
