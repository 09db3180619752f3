# SPDX-License-Identifier: MIT
"""Scores of a layer's weights, a chunk of rows at a time: the same bits as of the full layer.

A score depends on its weight and on the norms of its row and column, so that chunks of rows can be
scored by themselves. If the layer has groups, a chunk is split where a group ends.

    scaled  norms times powers of two, the largest in [0.5, 1): keys then sort as those of the
            fused mask do, unless products underflow
    wide    the same roundings with float64's range, for layers where that happens
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext.criteria import Criterion
from lap_ext.criteria.context import Network
from lap_ext.errors import LapError, LapValueError, in_layer
from lap_ext.ops import from_norms
from lap_ext.ops.reference.common import (
    exact_sqrt,
    outer,
    require_finite,
    rounded,
    score_dtype,
)
from lap_ext.ops.reference.scale import scaled_to_one
from lap_ext.topology import Layer
from lap_ext.topology.roles import Part


@dataclass(frozen=True)
class RowRange:
    """Rows [top, bottom) of a part, in so many groups from group on."""

    top: int
    bottom: int
    group: int
    groups: int


def row_length(layer: Layer) -> int:
    """Counts the elements of the longest row of the parts of a layer: chunks end between rows."""
    return max((_length(role.part) for role in layer.roles), default=1)


def _length(part: Part) -> int:
    return max(1, torch.Size(part.shape[1:]).numel())


def row_ranges(part: Part, first: int, count: int) -> Iterator[RowRange]:
    """Splits the rows of a part in a chunk: each range is within one group, or of full groups."""
    length = _length(part)
    top, bottom = first // length, (first + count) // length
    if part.rows is not None:
        top, bottom = max(top, part.rows[0]), min(bottom, part.rows[1])
    height = part.shape[0] // part.groups if part.rows is None else max(part.shape[0], 1)
    while top < bottom:
        group = top // height
        if top % height == 0 and bottom - top >= height:
            groups = (bottom - top) // height
            yield RowRange(top, top + groups * height, group, groups)
            top += groups * height
        else:
            end = min(bottom, (group + 1) * height)
            yield RowRange(top, end, group, 1)
            top = end


@contextmanager
def in_chunk(layer: Layer, first: int, weight: Tensor) -> Iterator[None]:
    """Names the layer in errors, and the index in the layer of a weight that is not finite."""
    with in_layer(layer.name):
        try:
            yield
        except LapError:
            bad = ~weight.isfinite()
            if not bad.any():
                raise
            index = first + int(bad.flatten().to(torch.uint8).argmax())
            raise LapValueError(
                "finite weights in {argument}",
                f"{int(bad.count_nonzero())} non-finite values, the first at flat index {index}",
                "Repair them.",
                argument="w",
            ) from None


class LayerScores:
    """Computes the scores of a layer from its norms.

    Args:
        network: with all squared norms.
        criterion: one that reads weights only.
        layer: to score.
        how: "plain" (the scores that `lap_ext.scores` returns), "scaled" or "wide".
    """

    def __init__(
        self, network: Network, criterion: Criterion, layer: Layer, how: str = "plain"
    ) -> None:
        self.layer = layer
        self.how = how
        self._criterion = criterion
        self._parts: list[tuple[Part, Tensor | None, Tensor | None]] = []
        if criterion.by_role:
            for role in layer.roles:
                into, out = criterion.norms(network, role)
                rows, cols = (into, out) if role.part.transposed else (out, into)
                if how != "plain":
                    rows, cols = (None if x is None else _to_one(x) for x in (rows, cols))
                self._parts.append((role.part, rows, cols))

    @property
    def simple(self) -> bool:
        """Whether the full weight is used once: the fused operator masks it alike."""
        return not self._parts or (len(self._parts) == 1 and self._parts[0][0].full)

    def of(self, weight: Tensor, first: int) -> Tensor:
        """Scores elements [first, first + len(weight)), flat, float32 (float64 for float64)."""
        with in_chunk(self.layer, first, weight):
            return self._of(weight, first)

    def _of(self, weight: Tensor, first: int) -> Tensor:
        if self._criterion.replaces:  # no operator sees the weights
            require_finite(weight, "w")
        weight = self._criterion.values(self.layer, weight, first)
        if not self._parts:
            return self._times(weight[None], None, None, 1).flatten()
        if self.simple:
            part, rows, cols = self._parts[0]
            scores = [
                self._range_scores(weight, first, part, rows, cols, x).flatten()
                for x in row_ranges(part, first, weight.numel())
            ]
            return scores[0] if len(scores) == 1 else torch.cat(scores)
        total = torch.zeros(weight.shape, dtype=torch.float64)
        for part, rows, cols in self._parts:
            for x in row_ranges(part, first, weight.numel()):
                ranged = self._range_scores(weight, first, part, rows, cols, x)
                rows_of(total, first, part, x).add_(ranged.double().square_())
        return exact_sqrt(total, out=total).to(score_dtype(weight.dtype))

    def at(self, weight: Tensor, step: int) -> Tensor:
        """Approximates the scores of every step-th weight, float64."""
        size = self._criterion.values(self.layer, weight, 0, step).double().abs()
        if not self._parts:
            return size
        index = torch.arange(size.numel()) * step
        total = torch.zeros_like(size)
        for part, rows, cols in self._parts:
            length, window = _length(part), max(1, torch.Size(part.shape[2:]).numel())
            row, col = index // length, index % length // window
            (top, bottom), (left, right) = (
                part.rows or (0, part.shape[0]),
                part.cols or (0, part.shape[1]),
            )
            used = (row >= top) & (row < bottom) & (col >= left) & (col < right)
            row, col = row[used] - top, col[used] - left
            scores = size[used]
            if rows is not None:
                scores = scores * rows[row]
            if cols is not None:
                height = part.block[0] // part.groups
                scores = scores * cols[row // max(height, 1) * part.block[1] + col]
            total[used] += scores.square()
        return exact_sqrt(total, out=total)

    def _range_scores(
        self,
        weight: Tensor,
        first: int,
        part: Part,
        rows: Tensor | None,
        cols: Tensor | None,
        x: RowRange,
    ) -> Tensor:
        """Scores a range of rows, [rows, cols, *window]."""
        chunk = rows_of(weight, first, part, x)
        start = 0 if part.rows is None else part.rows[0]
        if rows is not None:
            rows = rows[x.top - start : x.bottom - start]
        if cols is not None and part.groups > 1:
            cols = cols[x.group * chunk.shape[1] : (x.group + x.groups) * chunk.shape[1]]
        return self._times(chunk, rows, cols, x.groups)

    def _times(
        self, chunk: Tensor, rows: Tensor | None, cols: Tensor | None, groups: int
    ) -> Tensor:
        """Computes |chunk| * (row norm * column norm)."""
        if self.how == "wide":
            return _wide(chunk, rows, cols, groups)
        return from_norms.score_from_norms(chunk, cols, rows, groups=groups)


def rows_of(flat: Tensor, first: int, part: Part, x: RowRange) -> Tensor:
    """Views a range of rows in a chunk that begins at element first, [rows, cols, *window]."""
    length = _length(part)
    begin = x.top * length - first
    rows = flat[begin : begin + (x.bottom - x.top) * length]
    rows = rows.view(x.bottom - x.top, *part.shape[1:])
    return rows if part.cols is None else rows[:, part.cols[0] : part.cols[1]]


def _to_one(norm: Tensor) -> Tensor:
    return scaled_to_one(norm)[0]


def _wide(chunk: Tensor, rows: Tensor | None, cols: Tensor | None, groups: int) -> Tensor:
    """Computes scores in float64, rounded to 24 bits wherever the formula rounds."""
    ones = torch.ones(1, dtype=torch.float64)
    rows = ones.expand(chunk.shape[0]) if rows is None else rows
    cols = ones.expand(groups * chunk.shape[1]) if cols is None else cols
    rows, cols = (rounded(x.contiguous(), torch.float32) for x in (rows, cols))
    norms = rounded(outer(rows, cols, chunk, groups), torch.float32)
    return rounded(chunk.double().abs() * norms, torch.float32)
