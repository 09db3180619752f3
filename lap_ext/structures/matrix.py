# SPDX-License-Identifier: MIT
"""Sees a weight as a matrix of channels, and cuts that matrix into blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """The shape of a weight, [rows, columns, *window].

    Rows are output channels and columns are input channels; if transposed, it is the other way
    round. With groups, a row meets only the columns of its group.

    Attributes:
        shape: of two dimensions or more.
        groups: of the rows; the columns are those of one group.
        transposed: whether rows are input channels.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, shape: Sequence[int], groups: int = 1, transposed: bool = False) -> Matrix:
        """Makes a matrix of any shape; a vector is one row."""
        sizes = tuple(shape)
        return cls((1,) * (2 - len(sizes)) + sizes, groups, transposed)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.shape[0]

    @property
    def cols(self) -> int:
        """The number of columns."""
        return self.shape[1]

    @property
    def window(self) -> int:
        """The number of kernel positions."""
        return math.prod(self.shape[2:])

    @property
    def height(self) -> int:
        """The number of rows of a group."""
        return self.rows // self.groups

    @property
    def numel(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Grid:
    """A matrix cut into blocks of rows and columns with all kernel positions.

    Blocks end where a group of rows ends; those at the lower and right edges may be smaller. They
    are numbered row by row, so that a lower number begins at a lower flat index.

    Attributes:
        matrix: the matrix.
        block: rows and columns of a block, at most those of a group.
    """

    matrix: Matrix
    block: tuple[int, int]

    @classmethod
    def of(cls, matrix: Matrix, rows: int, cols: int) -> Grid:
        """Cuts a matrix into blocks of at most so many rows and columns."""
        return cls(matrix, (max(min(rows, matrix.height), 1), max(min(cols, matrix.cols), 1)))

    @property
    def shape(self) -> tuple[int, int]:
        """The number of blocks: in all groups from top to bottom, and across."""
        matrix, (rows, cols) = self.matrix, self.block
        return matrix.groups * -(-matrix.height // rows), -(-matrix.cols // cols)

    @property
    def count(self) -> int:
        """The number of blocks."""
        return math.prod(self.shape)

    def heights(self) -> list[int]:
        """Counts the rows of the blocks of each row of blocks."""
        return _parts(self.matrix.height, self.block[0]) * self.matrix.groups

    def widths(self) -> list[int]:
        """Counts the columns of the blocks of each column of blocks."""
        return _parts(self.matrix.cols, self.block[1])


def _parts(size: int, step: int) -> list[int]:
    """Cuts size into steps, the last of which may be smaller."""
    return [min(step, size - begin) for begin in range(0, size, step)]
