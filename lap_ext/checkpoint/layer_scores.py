# SPDX-License-Identifier: MIT
"""Scores of a layer's weights, a run of rows at a time: the same bits as of the whole layer.

A score depends on its weight and on one factor a row and one a column, so runs of whole rows can be
scored by themselves. With groups a run is cut where a group ends.

    scaled  factors times powers of two, the largest in [0.5, 1): keys then sort as those of the
            fused mask do, unless products underflow
    wide    the same roundings with float64's range, for layers where that happens
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext.checkpoint.files import FUNCTION, wrong
from lap_ext.criteria import Criterion, Random
from lap_ext.criteria.context import Network
from lap_ext.ops import check, from_norms
from lap_ext.ops.reference.common import exact_sqrt, outer, rounded, score_dtype
from lap_ext.ops.reference.scale import scaled_to_one
from lap_ext.topology import Layer
from lap_ext.topology.roles import Part


@dataclass(frozen=True)
class Piece:
    """Rows [top, bottom) of a part, of group and of the groups behind it."""

    top: int
    bottom: int
    group: int
    groups: int


def row_length(layer: Layer) -> int:
    """Elements of the longest row that a part of the layer's weight has: runs are cut between."""
    return max((_length(role.part) for role in layer.roles), default=1)


def _length(part: Part) -> int:
    return max(1, torch.Size(part.shape[1:]).numel())


def pieces(part: Part, first: int, count: int) -> Iterator[Piece]:
    """The rows of a part in a run of elements, cut so that each piece has one group or whole ones."""
    length = _length(part)
    top, bottom = first // length, (first + count) // length
    if part.rows is not None:
        top, bottom = max(top, part.rows[0]), min(bottom, part.rows[1])
    height = part.shape[0] // part.groups if part.rows is None else max(part.shape[0], 1)
    while top < bottom:
        group = top // height
        if top % height == 0 and bottom - top >= height:
            whole = (bottom - top) // height
            yield Piece(top, top + whole * height, group, whole)
            top += whole * height
        else:
            end = min(bottom, (group + 1) * height)
            yield Piece(top, end, group, 1)
            top = end


@contextmanager
def of_layer(layer: Layer, first: int, weight: Tensor) -> Iterator[None]:
    """Errors name the layer, and the place in it where a weight is not finite."""
    try:
        yield
    except ValueError as error:
        bad = ~weight.isfinite()
        if bad.any():
            place = first + int(bad.flatten().to(torch.uint8).argmax())
            count = int(bad.count_nonzero())
            raise wrong(
                f"finite weights in layer {layer.name!r}",
                f"{count} non-finite values from flat index {place} on",
                "Repair them.",
            ) from None
        raise check.renamed(f"{FUNCTION}, layer {layer.name!r}", error) or error from None


class LayerScores:
    """Scores of one layer from its factors.

    Args:
        network: whose factors are complete.
        criterion: one that reads weights only.
        layer: to score.
        how: "plain" (the scores that `lap_ext.scores` returns), "scaled" or "wide".
    """

    def __init__(
        self, network: Network, criterion: Criterion, layer: Layer, how: str = "plain"
    ) -> None:
        self.layer = layer
        self.how = how
        self._given: Tensor | None = None  # Random's: no function of the weight
        self._parts: list[tuple[Part, Tensor | None, Tensor | None]] = []
        if isinstance(criterion, Random):
            self._given = criterion.weight(network, layer).flatten()
        elif criterion.by_role:
            for role in layer.roles:
                into, out = criterion.factors(network, role)
                rows, cols = (into, out) if role.part.transposed else (out, into)
                if how != "plain":
                    rows, cols = (None if x is None else _to_one(x) for x in (rows, cols))
                self._parts.append((role.part, rows, cols))

    @property
    def simple(self) -> bool:
        """Whether all of the weight is used once: the fused mask can be used too."""
        return not self._parts or (len(self._parts) == 1 and self._parts[0][0].whole)

    def of(self, weight: Tensor, first: int) -> Tensor:
        """Scores of elements [first, first + len(weight)), flat, float32 (float64 for float64)."""
        with of_layer(self.layer, first, weight):
            return self._of(weight, first)

    def _of(self, weight: Tensor, first: int) -> Tensor:
        if self._given is not None:
            weight = self._given[first : first + weight.numel()]
        if not self._parts:
            return self._times(weight[None], None, None, 1).flatten()
        if self.simple:
            part, rows, cols = self._parts[0]
            found = [self._block(weight, first, part, rows, cols, x)
                     for x in pieces(part, first, weight.numel())]  # fmt: skip
            return (
                found[0].flatten() if len(found) == 1 else torch.cat([x.flatten() for x in found])
            )
        total = torch.zeros(weight.shape, dtype=torch.float64)
        for part, rows, cols in self._parts:
            for x in pieces(part, first, weight.numel()):
                scores = self._block(weight, first, part, rows, cols, x)
                _block_of(total, first, part, x).add_(scores.double().square_())
        kind = score_dtype(weight.dtype)
        return exact_sqrt(total, out=total).to(kind)

    def at(self, weight: Tensor, position: Tensor) -> Tensor:
        """About the scores of single weights at flat positions, float64."""
        if self._given is not None:
            weight = self._given[position]
        size = weight.double().abs()
        if not self._parts:
            return size
        total = torch.zeros_like(size)
        for part, rows, cols in self._parts:
            length, window = _length(part), max(1, torch.Size(part.shape[2:]).numel())
            row, col = position // length, position % length // window
            (top, bottom), (left, right) = (
                part.rows or (0, part.shape[0]),
                part.cols or (0, part.shape[1]),
            )
            used = (row >= top) & (row < bottom) & (col >= left) & (col < right)
            row, col = row[used] - top, col[used] - left
            found = size[used]
            if rows is not None:
                found = found * rows[row]
            if cols is not None:
                height = part.block[0] // part.groups
                found = found * cols[row // max(height, 1) * part.block[1] + col]
            total[used] += found.square()
        return exact_sqrt(total, out=total)

    def _block(
        self,
        weight: Tensor,
        first: int,
        part: Part,
        rows: Tensor | None,
        cols: Tensor | None,
        x: Piece,
    ) -> Tensor:
        """Scores of the rows of a piece, [rows, cols, *window]."""
        block = _block_of(weight, first, part, x)
        start = 0 if part.rows is None else part.rows[0]
        if rows is not None:
            rows = rows[x.top - start : x.bottom - start]
        if cols is not None and part.groups > 1:
            cols = cols[x.group * block.shape[1] : (x.group + x.groups) * block.shape[1]]
        return self._times(block, rows, cols, x.groups)

    def _times(
        self, block: Tensor, rows: Tensor | None, cols: Tensor | None, groups: int
    ) -> Tensor:
        """|block| * (row factor * column factor)."""
        if self.how == "wide":
            return _wide(block, rows, cols, groups)
        return from_norms.score_from_factors(block, cols, rows, groups=groups)


def _block_of(flat: Tensor, first: int, part: Part, x: Piece) -> Tensor:
    """The rows of a piece in a run that begins at element first, [rows, cols, *window]: a view."""
    length = _length(part)
    begin = x.top * length - first
    run = flat[begin : begin + (x.bottom - x.top) * length]
    block = run.view(x.bottom - x.top, *part.shape[1:])
    return block if part.cols is None else block[:, part.cols[0] : part.cols[1]]


def _to_one(norm: Tensor) -> Tensor:
    return scaled_to_one(norm)[0]


def _wide(block: Tensor, rows: Tensor | None, cols: Tensor | None, groups: int) -> Tensor:
    """Float64 scores rounded to 24 bits as the formula rounds."""
    ones = torch.ones(1, dtype=torch.float64)
    rows = ones.expand(block.shape[0]) if rows is None else rows
    cols = ones.expand(groups * block.shape[1]) if cols is None else cols
    rows, cols = (rounded(x.contiguous(), torch.float32) for x in (rows, cols))
    factor = rounded(outer(rows, cols, block, groups), torch.float32)
    return rounded(block.double().abs() * factor, torch.float32)
