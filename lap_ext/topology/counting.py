# SPDX-License-Identifier: MIT
"""Counts parameters and FLOPs of a model from which channels are removed, through the graph.

    parameters   of each layer: rows * columns * window, group by group, without the rows and
                 columns all of whose channels are gone; biases and norms without the entries of
                 such channels; other parameters in full. What is tied counts once.
    FLOPs        2 * multiply-adds of layers (linear, convolutions, recurrent ones) and of products
                 of activations, for the example inputs of the trace. An embedding multiplies
                 nothing, and what is not a product of matrices (norms, activations) counts nothing.

torch.utils.flop_counter counts the same, from the dense model and from one that is built thinner.
Where data picks the experts of a position, each position uses as many of them as before, and
expert by expert the work is as long as that of the average expert that is left.

Both are sums of a * b * each over cells: of the rows and columns of one group of a layer, of the
two channels of a product. A line (a row, a column) is gone with the last of its channels in all
uses of the weight, so that removing a few channels changes only the cells that they touch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lap_ext._text import some
from lap_ext.computed import sources
from lap_ext.errors import LapValueError
from lap_ext.topology.channels import Step
from lap_ext.topology.export import first_names
from lap_ext.topology.roles import Part, Role
from lap_ext.topology.topology import Topology

Pairs = tuple[Tensor, Tensor]  # lines and the channels that they belong to


class _Matrix(NamedTuple):
    """A weight with its uses, and the (row, id) and (column, id) pairs of all of them."""

    parameter: str
    roles: list[Role]
    alike: bool  # whether these are all uses
    rows: Pairs
    cols: Pairs


def params(topology: Topology, removed: Tensor) -> int:
    """Counts the parameters of a model without some channels.

    Args:
        topology: of the model.
        removed: bool [channels], True for each channel that is gone, and for what is computed from
            it alone.
    """
    counter = _params(topology)
    counter.remove(removed.nonzero().flatten())
    return counter.total


def flops(topology: Topology, removed: Tensor) -> int:
    """Counts the FLOPs of a model without some channels; arguments as in `params`."""
    counter = _flops(topology)
    counter.remove(removed.nonzero().flatten())
    return counter.total


class Counter:
    """Parameters and FLOPs while channels are removed one after the other.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> topology = lap_ext.trace(net, torch.ones(1, 4))
        >>> counter = Counter(topology)
        >>> counter.params, counter.flops  # 32 + 8 + 16 + 2 and 2 * (32 + 16)
        (58, 96)
        >>> counter.remove(topology.roles[0].out.ids[:3])
        >>> counter.params, counter.flops
        (37, 60)
    """

    def __init__(self, topology: Topology) -> None:
        self._topology, self._params = topology, _params(topology)
        self._flops = None if topology.graph.facts.uncounted else _flops(topology)

    def remove(self, ids: Tensor) -> None:
        """Removes channels, int64 [n]; those that are gone already change nothing."""
        self._params.remove(ids)
        if self._flops is not None:
            self._flops.remove(ids)

    def params_without(self, ids: Tensor) -> int:
        """Counts the parameters that would be left without these channels too."""
        return self._params.without(ids)

    def flops_without(self, ids: Tensor) -> int:
        """Counts the FLOPs that would be left without these channels too."""
        return self._counted().without(ids)

    @property
    def params(self) -> int:
        """The number of parameters that are left."""
        return self._params.total

    @property
    def flops(self) -> int:
        """The number of FLOPs that are left; an error where the values of inputs decide it."""
        return self._counted().total

    def _counted(self) -> _Tally:
        return _flops(self._topology) if self._flops is None else self._flops


class _Cells:
    """Collects cells, their lines, and the channels that lines belong to."""

    def __init__(self) -> None:
        self.constant = 0
        self.count = 0  # of cells
        self.each: list[Tensor] = []
        self.alive: list[Tensor] = []  # [cells, 2]: lines on either side
        self.pools: list[tuple[int, int, int]] = []  # first cell, end, each
        self.lines = 0
        self.side: list[Tensor] = []  # of each line: 2 * cell, or 2 * cell + 1
        self.at: list[Tensor] = []
        self.of: list[Tensor] = []

    def block(
        self,
        shape: tuple[int, int, int],
        each: int,
        rows: Pairs,
        cols: Pairs,
        by_data: bool = False,
    ) -> None:
        """Adds the cells of a matrix, one for each group.

        Args:
            shape: groups, rows of a group, columns of a group.
            each: what a row and a column count.
            rows: (row, id) pairs.
            cols: (column, id) pairs; column c of group g is g * columns + c.
            by_data: whether the groups share the work evenly, as long as there is one.
        """
        groups, height, width = shape
        if by_data:
            self.pools.append((self.count, self.count + groups, each))
        self.each.append(torch.full((groups,), 0 if by_data else each))
        self.alive.append(torch.tensor([[height, width]]).repeat(groups, 1))
        cell = torch.arange(self.count, self.count + groups)
        self._side(2 * cell.repeat_interleave(height), rows)
        self._side(2 * cell.repeat_interleave(width) + 1, cols)
        self.count += groups

    def pairs(self, ids: Tensor, others: Tensor, each: Tensor) -> None:
        """Adds a cell for each pair of channels; without id 0."""
        n = ids.numel()
        self.each.append(each)
        self.alive.append(torch.ones(n, 2, dtype=torch.int64))
        cell, index = torch.arange(self.count, self.count + n), torch.arange(n)
        for side, own in enumerate((ids, others)):
            self._side(2 * cell + side, (index[own != 0], own[own != 0]))
        self.count += n

    def _side(self, sides: Tensor, pairs: Pairs) -> None:
        self.side.append(sides)
        self.of.append(pairs[0] + self.lines)
        self.at.append(pairs[1])
        self.lines += sides.numel()


class _Change(NamedTuple):
    """What removing some channels changes in a tally."""

    ids: Tensor  # those that are not gone yet
    lines: Tensor  # that have such channels
    channels: Tensor  # that these lines still have
    sides: Tensor  # of cells that lose lines
    lost: Tensor  # lines of each such side
    cells: Tensor
    areas: Tensor  # of these cells
    change: int  # of the sum


class _Tally:
    """The sum over cells while channels are removed."""

    def __init__(self, cells: _Cells) -> None:
        def joined(parts: list[Tensor], *shape: int) -> Tensor:
            return torch.cat([torch.zeros(0, *shape, dtype=torch.int64), *parts])

        self._lines = Step.of(joined(cells.at), joined(cells.of))
        self._channels = torch.bincount(self._lines.to, minlength=cells.lines)  # left of each line
        self._gone = torch.zeros(self._lines.low + self._lines.starts.numel(), dtype=torch.bool)
        self._side, self._each = joined(cells.side), joined(cells.each)
        self._alive = joined(cells.alive, 2).flatten()
        self._areas = self._alive[::2] * self._alive[1::2]
        self._pools = cells.pools
        self._sum = cells.constant + int((self._areas * self._each).sum())

    @property
    def total(self) -> int:
        """What is left."""
        return self._total(self._sum, *(torch.zeros(0, dtype=torch.int64),) * 2)

    def without(self, ids: Tensor) -> int:
        """Counts what would be left without these channels too; nothing is removed."""
        change = self._change(ids)
        return self._total(self._sum + change.change, change.cells, change.areas)

    def remove(self, ids: Tensor) -> None:
        """Removes channels."""
        change = self._change(ids)
        self._gone[change.ids] = True
        self._channels[change.lines] = change.channels
        self._alive.index_add_(0, change.sides, -change.lost)
        self._areas[change.cells] = change.areas
        self._sum += change.change

    def _change(self, ids: Tensor) -> _Change:
        ids = torch.unique(ids[ids < self._gone.numel()])
        ids = ids[~self._gone[ids]]
        lines = self._lines.to[self._lines.found(ids)[1]]
        lines, met = torch.unique(lines, return_counts=True)
        channels = self._channels[lines] - met
        sides, lost = torch.unique(self._side[lines[channels == 0]], return_counts=True)
        cells, place = torch.unique(sides // 2, return_inverse=True)
        less = torch.zeros(2 * cells.numel(), dtype=torch.int64)
        less[2 * place + sides % 2] = lost
        high, wide = (self._alive[2 * cells + side] - less[side::2] for side in (0, 1))
        areas = high * wide
        change = int(((areas - self._areas[cells]) * self._each[cells]).sum())
        return _Change(ids, lines, channels, sides, lost, cells, areas, change)

    def _total(self, total: int, cells: Tensor, areas: Tensor) -> int:
        """Adds the pools, in which some cells have other areas."""
        for first, end, each in self._pools:
            own = self._areas[first:end].clone()
            here = (cells >= first) & (cells < end)
            own[cells[here] - first] = areas[here]
            total += each * int(own.sum()) // max(int((own > 0).sum()), 1)
        return total


def _flops(topology: Topology) -> _Tally:
    """Raises where the data decides how many rows are multiplied."""
    if topology.graph.facts.uncounted:
        raise LapValueError(
            "a model whose FLOPs follow from the shapes of its inputs",
            f"{some(topology.graph.facts.uncounted, 3)}, of as many rows as the data selects",
            "Give a budget of parameters: allocation.params.",
        )
    cells = _Cells()
    for matrix in _matrices(topology):
        positions: dict[tuple[Part, bool], int] = {}
        for role in matrix.roles:
            use = role.part, role.by_data
            positions[use] = positions.get(use, 0) + role.positions
        for (part, by_data), n in positions.items():
            if n:
                _add(cells, matrix, part, 2 * n, by_data)
    for ids, others, macs in topology.graph.facts.products:
        cells.pairs(ids, others, 2 * macs)
    return _Tally(cells)


def _params(topology: Topology) -> _Tally:
    cells = _Cells()
    first = first_names(topology.model)
    sizes = {
        name: parameter.shape
        for name, parameter in topology.model.named_parameters()
        if first[name] == name
    }
    cells.constant = sum(map(math.prod, sizes.values()))
    matrices = _matrices(topology)
    for matrix in matrices:
        for stored in _stored(topology, matrix.parameter, sizes):
            if matrix.alike:
                cells.constant -= math.prod(sizes[stored])
                _add(cells, matrix, replace(matrix.roles[0].part, rows=None, cols=None), 1)
    layers = {matrix.parameter for matrix in matrices}
    vectors: dict[str, list[Pairs]] = {}
    for vector in topology.graph.facts.vectors:
        if vector.name in sizes and vector.name not in layers:
            vectors.setdefault(vector.name, []).append((vector.entries, vector.ids))
    for name, given in vectors.items():
        size = math.prod(sizes[name])
        cells.constant -= size
        cells.block((1, size, 1), 1, _together(given), _together([]))
    return _Tally(cells)


def _stored(topology: Topology, name: str, known: Iterable[str]) -> list[str]:
    """Lists the parameters that hold a weight: itself, or what it is computed from in its shape."""
    if name in known:
        return [name]
    path, _, attribute = name.rpartition(".")
    inside = f"{path}.parametrizations.{attribute}.".removeprefix(".")
    shape = topology.layers[name.removesuffix(".weight")].shape
    return [
        source
        for source in sources(topology.model)
        if (source.startswith(inside) or source in {f"{name}_orig", f"{name}_v"})
        and source in known
        and tuple(topology.model.get_parameter(source).shape) == shape
    ]


def _matrices(topology: Topology) -> list[_Matrix]:
    """Lists the weights and their uses; uses that see different matrices, one by one."""
    zeros = torch.tensor([g.first for g in topology.graph.channels.groups if g.kind == "zero"])
    by_parameter: dict[str, list[Role]] = {}
    for role in topology.roles:
        by_parameter.setdefault(role.parameter, []).append(role)
    result = []
    for parameter, roles in by_parameter.items():
        alike = _are_alike(roles)
        for seen in [roles] if alike else [[role] for role in roles]:
            lines = [_lines(role, zeros) for role in seen]
            rows, cols = (_together([x[side] for x in lines]) for side in (0, 1))
            result.append(_Matrix(parameter, seen, alike, rows, cols))
    return result


def _are_alike(roles: list[Role]) -> bool:
    """Whether all uses see the same matrix; a weight that is seen as several counts in full."""
    parts = [role.part for role in roles]
    whole = all(part.groups == 1 or part.full for part in parts)
    return whole and len({(part.shape, part.groups) for part in parts}) == 1


def _add(cells: _Cells, matrix: _Matrix, part: Part, each: int, by_data: bool = False) -> None:
    """Adds a block of a matrix; each: what an entry of it counts."""
    height, width, *window = part.block
    top, left = _corner(part)
    rows = _within(matrix.rows, top, height)
    cols = _within(matrix.cols, left, part.groups * width)
    shape = (part.groups, height // part.groups, width)
    cells.block(shape, each * math.prod(window), rows, cols, by_data)


def _lines(role: Role, zeros: Tensor) -> tuple[Pairs, Pairs]:
    """Returns the (row, id) and (column, id) pairs of a role; column c of group g is g * C + c."""
    outputs = torch.arange(role.out.size), role.out.ids
    index, ids = role.inputs
    live = ~torch.isin(ids, zeros)  # a channel that is always zero keeps no column
    inputs = index[live], ids[live]
    sides = (inputs, outputs) if role.part.transposed else (outputs, inputs)
    (rows, row_ids), (cols, col_ids) = sides
    top, left = _corner(role.part)
    return (rows + top, row_ids), (cols + left, col_ids)


def _corner(part: Part) -> tuple[int, int]:
    """Returns the first row and the first column of a block."""
    return (part.rows or (0, 0))[0], (part.cols or (0, 0))[0]


def _within(pairs: Pairs, first: int, size: int) -> Pairs:
    """Returns the pairs of some lines, counted from the first of them."""
    lines, ids = pairs
    inside = (lines >= first) & (lines < first + size)
    return lines[inside] - first, ids[inside]


def _together(pairs: list[Pairs]) -> Pairs:
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *(x for x, _ in pairs)]), torch.cat([none, *(x for _, x in pairs)])
