# SPDX-License-Identifier: MIT
"""Defines a place, and the chunks in which it gives weights.

Scores, rankings, rounds and orders run over a place and know nothing else of where weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from lap_ext.ops import schema
from lap_ext.topology import Layer, Topology
from lap_ext.topology.roles import Part


@dataclass(frozen=True)
class Chunk:
    """Whole rows of a layer's weight, next to each other.

    Attributes:
        layer: whose weights they are.
        weight: the weights, detached: in the layer's shape if they are all of it, otherwise flat.
        first: the flat index in the layer of the first weight.
    """

    layer: Layer
    weight: Tensor
    first: int = 0

    @classmethod
    def of(cls, layer: Layer, weight: Tensor, first: int = 0) -> Chunk:
        """Makes a chunk of flat weights, in the layer's shape if they are all of it."""
        if weight.numel() == torch.Size(layer.shape).numel():
            weight = weight.reshape(layer.shape)
        return cls(layer, weight, first)

    @property
    def whole(self) -> bool:
        """Whether it is the full layer."""
        return self.weight.numel() == torch.Size(self.layer.shape).numel()

    @property
    def parameter(self) -> Tensor:
        """The parameter that the weights are made of: p, where w = p * factor."""
        layer = self.layer
        return self.cut_from(layer.weight.detach()) if layer.computed else self.weight

    def cut_from(self, full: Tensor) -> Tensor:
        """Returns what a tensor of the layer's shape holds for this chunk, in the chunk's shape."""
        if self.whole:
            return full
        return full.reshape(-1)[self.first : self.first + self.weight.numel()]

    def split(self, most: int, starts: Collection[int] = ()) -> Iterator[Chunk]:
        """Splits into chunks of at most so many weights, but of a row at least; copies no more.

        starts: flat indices of rows where a chunk must begin.
        """
        row, count = row_length(self.layer), self.weight.numel()
        step = max(most // row, 1) * row
        cuts = {*range(0, count, step), *(x - self.first for x in starts)}
        bounds = [*sorted(x for x in cuts if 0 <= x < count), count]
        if len(bounds) <= 2:
            yield self
            return
        matrix = self.weight.reshape(-1, row) if self.weight.is_contiguous() else self._matrix(row)
        for begin, end in pairwise(bounds):
            rows = matrix[begin // row : end // row]
            yield Chunk(self.layer, rows.reshape(-1), self.first + begin)

    def _matrix(self, row: int) -> Tensor:
        """Views a strided weight as rows; copies it only where no view has them."""
        shape = self.weight.shape
        for lead in range(1, len(shape)):
            if torch.Size(shape[lead:]).numel() == row:
                return self.weight.flatten(0, lead - 1)
        return self.weight.reshape(-1, row)


class Place(Protocol):
    """Where the weights of a topology's layers live.

    The contract, which tests/helpers/place_contract.py checks:

    -   `chunks` gives each weight of a layer once, in flat order, in chunks of whole rows: rows of
        every part of the weight that a role uses, so that no row is in two chunks. A layer without
        weights may have no chunk. A chunk is valid until the next but one of its call is requested,
        and the last ones of a call until the next call; nobody writes to them. Each call begins
        anew and gives the same weights.
    -   Where `fits` says so, `chunks(layer, whole=True)` gives one chunk in the layer's shape.
    -   A mask marks the weights that may still be kept. `mask` returns None where all may; `live`
        leaves out the weights that are stored as zero, too. Both have the chunk's shape and device.
    -   `set_masks` replaces the masks of a layer, of all its weights, in flat order; they keep no
        weight that is stored as zero.
    -   `round` calls `make`, which sets the masks of all layers that are pruned. A place that
        outlives its process may leave out a round that an earlier run has ended; its masks are the
        ones that `mask` then returns.
    -   `noted` and `noted_tensors` return what `make` gives. A place that outlives its process may
        return what an earlier run has noted under the name, which decides the same.
    -   `total` adds integers (counts, histograms, parts of sums) over all that hold weights; in one
        process it returns them.

    Attributes:
        topology: the layers, the channels between them, and the tensors that scale these.
        held: whether all weights are there at once, so that one operator can rank several layers.
        pieces: how many scores are computed at a time, where no operator works on more.
        sampled: how many scores a sample may have.
    """

    topology: Topology
    held: bool
    pieces: int
    sampled: int

    def dtype(self, layer: Layer) -> torch.dtype:
        """Returns the dtype of a layer's weights."""

    def bytes(self, layer: Layer) -> int:
        """Counts the bytes of a layer's weights."""

    def starts(self, layer: Layer) -> Sequence[int]:
        """Returns the flat index of the first weight of each stored slice; [0] for one."""

    def fits(self, layer: Layer, beside: int) -> bool:
        """Says whether a layer can be one chunk, with so many bytes per weight beside it."""

    def ordered(self, layers: Iterable[Layer]) -> list[Layer]:
        """Sorts layers as they are read fastest."""

    def chunks(self, layer: Layer, whole: bool = False) -> Iterator[Chunk]:
        """Reads a layer in chunks of rows, or in one chunk."""

    def each(self, layers: Sequence[Layer], beside: int) -> Iterator[tuple[Layer, Iterator[Chunk]]]:
        """Reads layers one after the other; those that fit with so much beside them as one chunk.

        A place may read the next one meanwhile. A layer's chunks end before the next layer.
        """

    def sample(self, layer: Layer, count: int) -> Iterator[Chunk]:
        """Reads about so many weights of a layer, in chunks that are spread over it."""

    def mask(self, chunk: Chunk) -> Tensor | None:
        """Returns which weights of a chunk may be kept; None for all."""

    def live(self, chunk: Chunk) -> Tensor | None:
        """Returns which weights of a chunk may be kept and are not stored as zero; None: all."""

    def set_masks(self, layer: Layer, masks: Iterable[tuple[Chunk, Tensor]]) -> None:
        """Sets the masks of all chunks of a layer."""

    def round(self, number: int, make: Callable[[], None]) -> None:
        """Sets the masks of round number, from 1 on."""

    def capacity(self, count: int) -> int:
        """Returns how many keys of a ranking of so many weights may be held."""

    def noted(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns a value for JSON under a name, made once."""

    def noted_tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns small tensors under a name, made once."""

    def total(self, counts: Tensor) -> Tensor:
        """Adds integers over all that hold weights."""


@dataclass(frozen=True)
class RowRange:
    """Rows [top, bottom) of a part, in so many groups from group on."""

    top: int
    bottom: int
    group: int
    groups: int


def nonzero(weight: Tensor, mask: Tensor | None) -> Tensor | None:
    """Masks the weights that are not zero; returns the mask where none that it keeps is zero."""
    if not weight.is_contiguous():  # the operator would copy it
        if int(weight.count_nonzero()) == weight.numel():
            return mask
        return weight != 0 if mask is None else (weight != 0) & mask
    which = None if mask is None else mask.contiguous()
    live, count = schema.call(schema.nonzero_mask, weight, which)
    most = weight.numel() if mask is None else int(mask.count_nonzero())
    return mask if int(count) == most else live


def row_length(layer: Layer) -> int:
    """Counts the elements of the longest row of the parts of a layer: chunks end between rows."""
    return max((_length(role.part) for role in layer.roles), default=1)


def _length(part: Part) -> int:
    return max(1, torch.Size(part.shape[1:]).numel())


def row_ranges(part: Part, chunk: Chunk) -> Iterator[RowRange]:
    """Splits the rows of a part in a chunk: each range is within one group, or of full groups."""
    length = _length(part)
    top, bottom = chunk.first // length, (chunk.first + chunk.weight.numel()) // length
    if part.rows is not None:
        top, bottom = max(top, part.rows[0]), min(bottom, part.rows[1])
    start, height = 0 if part.rows is None else part.rows[0], max(part.block[0] // part.groups, 1)
    while top < bottom:
        group = (top - start) // height
        if (top - start) % height == 0 and bottom - top >= height:
            groups = (bottom - top) // height
            yield RowRange(top, top + groups * height, group, groups)
            top += groups * height
        else:
            end = min(bottom, start + (group + 1) * height)
            yield RowRange(top, end, group, 1)
            top = end


def rows_of(chunk: Chunk, values: Tensor, part: Part, x: RowRange) -> Tensor:
    """Views a range of rows of values in a chunk's shape, [rows, cols, *window]."""
    if chunk.whole:
        start = 0 if part.rows is None else part.rows[0]
        rows = part.of(values)
        full = x.top == start and x.bottom - x.top == rows.shape[0]
        return rows if full else rows[x.top - start : x.bottom - start]
    length = _length(part)
    begin = x.top * length - chunk.first
    rows = values[begin : begin + (x.bottom - x.top) * length]
    rows = rows.view(x.bottom - x.top, *part.shape[1:])
    return rows if part.cols is None else rows[:, part.cols[0] : part.cols[1]]
