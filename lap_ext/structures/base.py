# SPDX-License-Identifier: MIT
"""Defines structures: what is removed together.

A pattern says how many of a few neighboring weights are kept, everywhere. A partition cuts a weight
into units that are kept or removed as a whole; the units are ranked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.structures.matrix import Grid, Matrix

Aggregate: TypeAlias = Literal["energy", "mean", "exact"]  # how the worth of a unit is made
Axis: TypeAlias = Literal["in", "out", "flat"]
Along: TypeAlias = Literal["rows", "cols", "flat"]
_MOST = 1_000_000_000  # no dimension is so long
_AXES = ("in", "out", "flat")


class Structure(ABC):
    """What is removed together; the base class of all structures."""

    @property
    @abstractmethod
    def spelled(self) -> str:
        """The text that `structure=` takes for it, and that files of masks hold."""

    def __str__(self) -> str:
        return self.spelled


@dataclass(frozen=True)
class NM(Structure):
    """Keeps `keep` of every `of` consecutive weights: those with the highest scores.

    Of equal scores, the one at the lower index is kept. 2:4 is `NM(2, 4)`, or "2:4": two of four
    are kept, as NVIDIA's sparse tensor cores read it.

    Args:
        keep: how many are kept.
        of: of how many.
        axis: which weights are consecutive: "in", the input channels of one output at one kernel
            position (what TensorRT, ASP and ModelOpt read); "out", the output channels of one input
            at one kernel position; "flat", the order in memory of a contiguous weight (the scores
            of a convolution are stored then).
        transposable: whether the pattern holds along inputs and along outputs at once, in tiles of
            `of` by `of`, so that a transposed product is sparse, too. For 2:4, the sum of the kept
            squared scores of a tile is the largest of all 90 patterns. For others it is nearly so
            (in tests 97 % of the largest on average, 85 % at the least), and scores are stored.

    Raises:
        TypeError: keep or of is not an integer.
        ValueError: not 1 <= keep <= of, of < 2, axis is not one of the above, or a transposable
            pattern has another axis than "in".

    Example:
        >>> import torch, lap_ext
        >>> scores = torch.tensor([[1., 4., 2., 3.]])
        >>> lap_ext.topk_mask(scores, structure=lap_ext.structures.NM(2, 4))
        tensor([[False,  True, False,  True]])
    """

    keep: int
    of: int
    axis: Axis = "in"
    transposable: bool = False

    def __post_init__(self) -> None:
        for name, value in (("keep", self.keep), ("of", self.of)):
            _integer(name, value)
        if self.of < 2 or not 1 <= self.keep <= self.of:
            raise LapValueError(
                "N:M with 1 <= N <= M and M >= 2 (N are kept of every M)",
                f"{self.keep}:{self.of}",
                f"Did you mean {self.of}:{self.keep}?" if 1 <= self.of < self.keep else "",
            )
        if self.axis not in _AXES:
            raise LapValueError(
                "{argument} to be 'in', 'out' or 'flat'", repr(self.axis), argument="axis"
            )
        if self.transposable and self.axis != "in":
            raise LapValueError(
                "axis='in' for a transposable pattern, which holds along both",
                f"axis={self.axis!r}",
            )

    @property
    def spelled(self) -> str:
        """For example "2:4", "2:4/out" or "2:4/transposable"."""
        how = "transposable" if self.transposable else "" if self.axis == "in" else self.axis
        return f"{self.keep}:{self.of}{how and '/'}{how}"

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that it removes."""
        return (self.of - self.keep) / self.of

    def along(self, matrix: Matrix) -> Along:
        """Says along what of a matrix the weights of a group lie."""
        if self.axis == "flat":
            return "flat"
        return "cols" if (self.axis == "in") != matrix.transposed else "rows"

    def misfit(self, matrix: Matrix) -> str:
        """Says why a matrix cannot have the pattern; empty where it can."""
        along = self.along(matrix)
        if along == "flat":
            sizes = [("weights", matrix.numel)]
        else:
            rows = ("inputs" if matrix.transposed else "outputs", matrix.height)
            cols = ("outputs" if matrix.transposed else "inputs", matrix.cols)
            sizes = [rows, cols] if self.transposable else [rows if along == "rows" else cols]
        if 0 in matrix.shape:
            return "it has no weights"
        for name, size in sizes:
            if size % self.of:
                group = " in each group" if matrix.groups > 1 and along != "flat" else ""
                return f"{self.of} does not divide its {size} {name}{group}"
        return ""

    def rows_together(self, matrix: Matrix) -> int:
        """Counts the rows that must be seen at once: 1 where each row has its own groups."""
        if self.transposable or self.along(matrix) == "rows":
            return self.of
        if self.axis == "flat":
            return self.of // math.gcd(self.of, matrix.cols * matrix.window)
        return 1


class Partition(Structure):
    """Units of a weight that are kept or removed as a whole; the base class of such structures."""

    @abstractmethod
    def grid(self, matrix: Matrix) -> Grid:
        """Cuts a matrix into units."""


@dataclass(frozen=True)
class Block(Partition):
    """Removes blocks of output channels by input channels, with all kernel positions.

    Blocks end where a group of a grouped convolution ends. Those at the edges may be smaller.

    Args:
        rows: output channels of a block.
        cols: input channels of a block.

    Raises:
        TypeError: rows or cols is not an integer.
        ValueError: one of them is below 1.

    Example:
        >>> import torch, lap_ext
        >>> scores = torch.tensor([[1., 1., 5., 0.], [1., 1., 0., 0.]])
        >>> lap_ext.topk_mask(scores, keep=4, structure=lap_ext.structures.Block(2, 2))
        tensor([[False, False,  True,  True],
                [False, False,  True,  True]])
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("cols", self.cols)):
            _integer(name, value)
            if value < 1:
                raise LapValueError("{argument} >= 1", value, argument=name)

    @property
    def spelled(self) -> str:
        """For example "16x16"."""
        return f"{self.rows}x{self.cols}"

    def grid(self, matrix: Matrix) -> Grid:
        """Cuts a matrix into blocks."""
        down, across = (self.cols, self.rows) if matrix.transposed else (self.rows, self.cols)
        return Grid.of(matrix, down, across)


@dataclass(frozen=True)
class Row(Partition):
    """Removes the weights of one output channel together: a row of W, a filter; also "row".

    Example:
        >>> import torch, lap_ext
        >>> lap_ext.topk_mask(torch.tensor([[1., 1.], [0., 2.]]), keep=2, structure="row")
        tensor([[False, False],
                [ True,  True]])
    """

    @property
    def spelled(self) -> str:
        """The text "row"."""
        return "row"

    def grid(self, matrix: Matrix) -> Grid:
        """Cuts a matrix into output channels."""
        if matrix.transposed:
            return Grid.of(matrix, matrix.height, 1)
        return Grid.of(matrix, 1, matrix.cols)


@dataclass(frozen=True)
class Column(Partition):
    """Removes the weights of one input channel together: a column of W; also "column".

    Example:
        >>> import torch, lap_ext
        >>> lap_ext.topk_mask(torch.tensor([[1., 1.], [0., 2.]]), keep=2, structure="column")
        tensor([[False,  True],
                [False,  True]])
    """

    @property
    def spelled(self) -> str:
        """The text "column"."""
        return "column"

    def grid(self, matrix: Matrix) -> Grid:
        """Cuts a matrix into input channels."""
        if matrix.transposed:
            return Grid.of(matrix, 1, matrix.cols)
        return Grid.of(matrix, matrix.height, 1)


def check_aggregate(aggregate: object, *, exact: bool = True) -> None:
    """Raises unless an aggregate is known; exact: the neighbors of the weights are known."""
    known = [x for x in get_args(Aggregate) if exact or x != "exact"]
    if aggregate not in known:
        choices = ", ".join(map(repr, known[:-1]))
        raise LapValueError(
            f"{{argument}} to be {choices} or {known[-1]!r}", repr(aggregate), argument="aggregate"
        )


def _integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise LapTypeError("{argument} to be an integer", type(value).__name__, argument=name)
    if value >= _MOST:
        raise LapValueError(f"{{argument}} < {_MOST:,}", value, argument=name)
