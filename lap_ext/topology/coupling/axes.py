# SPDX-License-Identifier: MIT
"""Finds which channels lie along the rows and columns of each weight.

A weight is a matrix [rows, cols, *window] (roles.py). Rows may be in groups: column c of group g is
column g * cols + c here, so that an input of a grouped convolution is one column. A weight that is
used in several ways at once (as a convolution, and as a matrix) has several such views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext.topology.graph import Graph
from lap_ext.topology.roles import Role


@dataclass(frozen=True, eq=False)
class Axes:
    """The channels along a weight, as pairs (row or column, channel id).

    Attributes:
        layer: name of the layer.
        parameter: name of the parameter.
        shape: of the matrix: (rows, columns of a group).
        groups: how many groups the rows are in.
        rows, cols: (index, id) pairs; an index without a pair has no channel.
        transposed: whether rows are inputs.
        kinds: of the roles.
        partial: whether only some groups of the weight are used.
    """

    layer: str
    parameter: str
    shape: tuple[int, int]
    groups: int
    rows: tuple[Tensor, Tensor]
    cols: tuple[Tensor, Tensor]
    transposed: bool
    kinds: frozenset[str]
    partial: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of rows and of columns, over all groups."""
        return self.shape[0], self.shape[1] * self.groups

    @property
    def made(self) -> tuple[Tensor, Tensor]:
        """The (index, id) pairs of the outputs."""
        return self.cols if self.transposed else self.rows

    @property
    def read(self) -> tuple[Tensor, Tensor]:
        """The (index, id) pairs of the inputs."""
        return self.rows if self.transposed else self.cols


def axes_of(graph: Graph) -> list[Axes]:
    """Gathers the channels of all uses of each weight; one that is always zero is none."""
    views: dict[tuple[object, ...], list[Role]] = {}
    for role in graph.roles:
        part = role.part
        block = part.rows if part.groups > 1 else None
        key = (role.parameter, part.shape[:2], part.groups, block, part.transposed)
        views.setdefault(key, []).append(role)
    zero = [group.ids for group in graph.channels.groups if group.kind == "zero"]
    none = torch.cat([torch.zeros(1, dtype=torch.int64), *zero])
    return [_axes(view, none) for view in views.values()]


def by_parameter(axes: Sequence[Axes]) -> list[list[Axes]]:
    """Gathers the uses of each parameter."""
    views: dict[str, list[Axes]] = {}
    for x in axes:
        views.setdefault(x.parameter, []).append(x)
    return list(views.values())


def differ(views: Sequence[Axes]) -> bool:
    """Whether a parameter is seen as different matrices."""
    return len({(x.shape, x.groups) for x in views}) > 1


def _axes(roles: list[Role], none: Tensor) -> Axes:
    sides: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for role in roles:
        first = role.part.first
        index, ids = role.inputs
        made = torch.arange(role.out.size) + first[1], role.out.ids
        read = index + first[0], ids
        rows, cols = (read, made) if role.part.transposed else (made, read)
        sides[0].append(rows)
        sides[1].append(cols)
    rows, cols = (_distinct(side, none) for side in sides)
    one = roles[0]
    part, kinds = one.part, frozenset(role.kind for role in roles)
    partial = part.groups > 1 and not part.full
    names, shape = (one.layer, one.parameter), (part.shape[0], part.shape[1])
    return Axes(*names, shape, part.groups, rows, cols, part.transposed, kinds, partial)


def _distinct(pairs: list[tuple[Tensor, Tensor]], none: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each pair once, sorted, without the ids that are none."""
    index, ids = (torch.cat(side) for side in zip(*pairs, strict=True))
    live = ~torch.isin(ids, none)
    index, ids = index[live], ids[live]
    if not ids.numel():
        return index, ids
    base = int(ids.max()) + 1
    keys = torch.unique(index * base + ids)
    return keys // base, keys % base
