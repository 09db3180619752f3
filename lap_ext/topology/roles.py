# SPDX-License-Identifier: MIT
"""Defines a role: one use of a weight in the network, and the part of the parameter it uses.

    out[o] = sum over i of w[o, i] x[i]

A layer has one role for each use: two for a weight tied between an embedding and a head, one per
call for a module called twice, one per projection for a packed weight that is used in parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lap_ext.topology.call import NodeKey
from lap_ext.topology.channels import ChannelGroup, Step, Trail
from lap_ext.topology.value import Computation, WeightView


@dataclass(frozen=True)
class Part:
    """A parameter seen as a matrix of channels, [rows, cols, *window], and the block that is used.

    Rows are outputs and columns are inputs; if transposed, it is the other way round. With groups,
    a row meets only the columns of its group; column c of group g is channel g * cols + c.
    """

    shape: tuple[int, ...]  # [rows, cols, *window], a reshape of the parameter
    groups: int = 1
    transposed: bool = False
    rows: tuple[int, int] | None = None  # first and end; None: all
    cols: tuple[int, int] | None = None

    @property
    def full(self) -> bool:
        """Whether the full parameter is used."""
        return self.rows is None and self.cols is None

    def of(self, weight: Tensor) -> Tensor:
        """Returns a parameter's block, [rows, cols, *window], as a view where strides allow."""
        matrix = weight.reshape(self.shape)
        if self.rows is not None:
            matrix = matrix[self.rows[0] : self.rows[1]]
        if self.cols is not None:
            matrix = matrix[:, self.cols[0] : self.cols[1]]
        return matrix

    @property
    def block(self) -> tuple[int, ...]:
        """The shape of the block."""
        rows = self.rows or (0, self.shape[0])
        cols = self.cols or (0, self.shape[1])
        return (rows[1] - rows[0], cols[1] - cols[0], *self.shape[2:])

    @property
    def channels(self) -> tuple[int, int]:
        """The numbers of channels of the block: (input, output)."""
        rows, cols = self.block[0], self.block[1] * self.groups
        return (rows, cols) if self.transposed else (cols, rows)

    @property
    def first(self) -> tuple[int, int]:
        """The indices of the block's first input and output channel in the full parameter."""
        row, col = (side[0] if side else 0 for side in (self.rows, self.cols))
        return (row, col) if self.transposed else (col, row)


@dataclass(eq=False)
class Role:
    """One use of a layer's weight."""

    layer: str
    parameter: str
    kind: str
    part: Part
    node: NodeKey
    inputs: tuple[Tensor, Tensor]  # (input channel, channel id) pairs that occur
    out: ChannelGroup
    trail: Trail = ()  # operations just before it
    # For statistics of activations: x is the index of the input among the tensors of the node's
    # arguments (-1: inside a fused layer). Channels lie along in_dims of x and out_dims of the
    # result, group first; without a dimension for the part's groups, all groups read the same.
    x: int = -1
    in_dims: tuple[int, ...] = ()
    out_dims: tuple[int, ...] = ()
    computation: Computation | None = None  # of the weight; None: it is the parameter
    positions: int = 0  # how often the example inputs apply the matrix; 0: it is looked up
    by_data: bool = False  # whether each position uses one group of it, which data picks

    def __repr__(self) -> str:
        return f"Role({self.kind} {self.layer!r}, {self.part.block})"

    @cached_property
    def reading(self) -> Step:
        """The pairs from the channels that it reads to its input channels."""
        channel, ids = self.inputs
        return Step.of(ids, channel)


def part_of(view: WeightView, full: tuple[int, ...], transposed: bool = False) -> Part | None:
    """Finds the part that a view [A, B] shows of a parameter of shape full; None if not a block.

    A is the output dimension, or the input dimension if transposed. It counts rows of the
    parameter, or columns where the view is a transpose.
    """
    (a, b), (stride_a, stride_b) = view.meta.shape, view.meta.stride()
    offset = int(view.meta.storage_offset())
    if len(full) < 2:
        return None
    lead, inner = full[:-1], full[-1]
    candidates = [(torch.Size(lead).numel(), inner)]
    if len(full) > 2:
        candidates.append((full[0], torch.Size(full[1:]).numel()))
    for rows, cols in candidates:
        for flipped in (False, True):
            row_n, col_n = (b, a) if flipped else (a, b)
            row_stride, col_stride = (stride_b, stride_a) if flipped else (stride_a, stride_b)
            steps = (row_stride == cols or row_n == 1) and (col_stride == 1 or col_n == 1)
            steps |= view.meta.numel() == 0  # strides of nothing say nothing
            top, left = divmod(offset, cols) if cols else (0, 0)
            if steps and top + row_n <= rows and left + col_n <= cols:
                return Part(
                    (rows, cols),
                    1,
                    transposed != flipped,
                    None if row_n == rows else (top, top + row_n),
                    None if col_n == cols else (left, left + col_n),
                )
    return None
