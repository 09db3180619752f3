# SPDX-License-Identifier: MIT
"""Measures what units across layers are worth: from the scores of all of their weights, or by data.

    energy    sqrt(sum of s^2)                      s: scores of the unit's weights, each once
    mean      (sum of s) / (number of its weights)
    exact     how much the linear neighborhood changes when the unit goes (criteria/exact_groups.py)
    data      what a criterion says of the columns or the expert (criteria/units.py)

Biases and norm parameters go with a unit, but have no score.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext.criteria import UnitCriterion
from lap_ext.criteria.context import in_chunk
from lap_ext.criteria.exact_groups import group_worths
from lap_ext.ops.partition import GridUnits, Scored
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.places import Chunk
from lap_ext.progress import Step
from lap_ext.pruning.scoring import Scoring
from lap_ext.structures import Aggregate, Grid, Matrix
from lap_ext.topology import Layer
from lap_ext.topology.coupling import Assigned, CoupledGroups

_ROWS = 1 << 20  # scores that are looked at one by one


@dataclass(frozen=True)
class Worth:
    """What the groups are worth.

    Attributes:
        worth: of each group, float64 [n].
        alive: which have a weight that may be kept, bool [n].
        zero: names of the layers that have none.
    """

    worth: Tensor
    alive: Tensor
    zero: list[str]


def worth_of(scoring: Scoring, groups: CoupledGroups, step: Step, zeros: bool = False) -> Worth:
    """Measures all groups, in one pass over the layers that have some of them.

    zeros: whether weights that are zero may be kept where the place's masks keep them.
    """
    options, sums = scoring.plan.options, _Sums(groups)
    criterion = scoring.plan.criterion
    by_weight = not isinstance(criterion, UnitCriterion) and options.aggregate != "exact"
    for layer in scoring.place.ordered(scoring.plan.layers):
        merged = _merged(groups.views(layer.parameter))
        if merged is not None and 0 not in layer.shape:
            sums.begin(layer.name)
            _measure(scoring, layer, merged, sums, step, (by_weight, zeros))
    zero = sums.end([layer.name for layer in scoring.plan.layers])
    if isinstance(criterion, UnitCriterion):
        worth = _by_data(scoring, criterion, groups)
    elif options.aggregate == "exact":
        worth = group_worths(scoring.network, criterion, groups)
    elif options.aggregate == "mean":
        worth = sums.scores / member_counts(groups).clamp(min=1)
    else:
        worth = exact_sqrt(sums.scores)
    return Worth(worth, sums.alive > 0, zero)


def member_counts(groups: CoupledGroups) -> Tensor:
    """Counts the weights of each group, each once, without biases and norms; int64 [n]."""
    counts = torch.zeros(len(groups) + 1, dtype=torch.int64)  # the first one: of none

    def add(index: Tensor, numbers: Tensor) -> None:
        counts.index_add_(0, index.flatten() + 1, numbers.flatten())

    for parameter in dict.fromkeys(x.parameter for x in groups.weights):
        x = _merged(groups.views(parameter))
        if x is None:
            continue
        window = groups.numel(parameter) // max(1, x.shape[0] * x.shape[1])
        height = x.shape[0] // x.groups
        add(x.rows, torch.full_like(x.rows, x.shape[1] * window))
        add(x.cols, torch.full_like(x.cols, height * window))
        rows, cols = _by_block(x.rows.reshape(x.groups, -1)), _by_block(x.cols)
        keys, index = torch.cat([rows[0], cols[0]]).unique(return_inverse=True)
        times = torch.zeros(2, keys.numel(), dtype=torch.int64)
        times[0, index[: rows[0].numel()]] = rows[1]
        times[1, index[rows[0].numel() :]] = cols[1]
        met = times.prod(0) * window  # where rows and columns of a group meet
        counts.index_add_(0, keys // x.groups, -met)
    return counts[1:]


def _by_block(index: Tensor) -> tuple[Tensor, Tensor]:
    """Counts groups in each block of [blocks, n]: (group + 1) * blocks + block, and how many."""
    blocks = index.shape[0]
    keys = (index + 1) * blocks + torch.arange(blocks).unsqueeze(1)
    return keys.unique(return_counts=True)


def vector_counts(groups: CoupledGroups) -> Tensor:
    """Counts the entries of biases, norms and the like of each group; int64 [n]."""
    counts = torch.zeros(len(groups) + 1, dtype=torch.int64)  # the first one: of none
    for x in groups.vectors:
        if not x.buffer:
            counts += torch.bincount(x.entries + 1, minlength=len(groups) + 1)
    return counts[1:]


class _Sums:
    """Sums over the weights of each group; the first entry is of none.

    Layers are added in the network's order, whatever the order in which they are measured: `begin`
    each one, and `end` them all.
    """

    def __init__(self, groups: CoupledGroups) -> None:
        self._scores = torch.zeros(len(groups) + 1, dtype=torch.float64)
        self._alive = torch.zeros(len(groups) + 1, dtype=torch.float64)
        self._of_layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._own: list[tuple[Tensor, Tensor]] | None = None
        self._live: dict[str, float] = {}
        self._name = ""

    def begin(self, name: str) -> None:
        """Begins a layer."""
        self._own = self._of_layers.setdefault(name, [])
        self._name, self._live[name] = name, 0.0

    def end(self, names: Iterable[str]) -> list[str]:
        """Adds the layers in an order of names, and lists those without weights that are kept."""
        self._own = None
        for name in names:
            for index, values in self._of_layers.pop(name, ()):
                self.add(index, values)
        return [name for name in names if name in self._live and not self._live[name]]

    @property
    def scores(self) -> Tensor:
        """Of scores, or of their squares."""
        return self._scores[1:].clamp(min=0)

    @property
    def alive(self) -> Tensor:
        """Counts the weights that may be kept; some twice."""
        return self._alive[1:]

    def add(self, index: Tensor, values: Tensor) -> None:
        """Adds scores to groups."""
        values = values.flatten().cpu().double()
        if self._own is not None:
            self._own.append((index, values))
            return
        self._scores.index_add_(0, index.flatten() + 1, values)

    def count(self, index: Tensor, values: Tensor) -> None:
        """Adds numbers of weights to groups."""
        values = values.flatten().cpu().double()
        self._live[self._name] += float(values.sum())
        self._alive.index_add_(0, index.flatten() + 1, values)


def _merged(views: Sequence[Assigned]) -> Assigned | None:
    """Joins the uses of a weight that see the same matrix; None where no group has a part of it."""
    if not views:
        return None
    first = views[0]
    same = [x for x in views if (x.shape, x.groups) == (first.shape, first.groups)]
    rows = torch.stack([x.rows for x in same]).amax(0)
    cols = torch.stack([x.cols for x in same]).amax(0)
    if not bool((rows >= 0).any()) and not bool((cols >= 0).any()):
        return None
    return Assigned(first.layer, first.parameter, first.shape, first.groups, rows, cols)


def _measure(
    scoring: Scoring, layer: Layer, x: Assigned, sums: _Sums, step: Step, how: tuple[bool, bool]
) -> None:
    """Adds the scores of a layer to its groups, by rows and by columns.

    how: whether scores are needed, and whether zeros may be kept.
    """
    by_weight, zeros = how
    options = scoring.plan.options
    window = torch.Size(layer.shape).numel() // max(1, x.shape[0] * x.shape[1])
    matrix = Matrix((*x.shape, window), x.groups)
    device = layer.weight.device if scoring.place.held else torch.device("cpu")
    by_row = GridUnits(Grid.of(matrix, 1, x.shape[1]), device)
    by_col = GridUnits(Grid.of(matrix, matrix.height, 1), device)
    sides = [(side, index) for side, index in ((by_row, x.rows), (by_col, x.cols.flatten()))
             if bool((index >= 0).any())]  # fmt: skip
    totals = [side.zeros() for side, _ in sides]
    counts = [side.zeros() for side, _ in sides]
    meet = len(sides) == 2 and _meet(x)
    scorer = scoring.scorer(layer) if by_weight else None
    chunks = scoring.chunks(layer, step) if by_weight else _unscored(scoring, layer, step)
    for chunk in chunks:
        live = scoring.place.mask(chunk) if zeros else scoring.place.live(chunk)
        rows = None if live is None else live.reshape(-1, *matrix.shape[1:])
        first = chunk.first // max(1, x.shape[1] * window)
        for (side, _), count in zip(sides, counts, strict=True):
            _count(side, count, chunk, rows, matrix, first)
        if scorer is None:
            continue
        with in_chunk(chunk):
            for scored in scorer.rows(chunk, matrix.shape[1:]):
                top = scored.first - first
                which = None if rows is None else rows[top : top + scored.x.shape[0]]
                for (side, _), total in zip(sides, totals, strict=True):
                    side.add(total, scored, which, options.aggregate)
                if meet:
                    _take_back(scored, which, x, sums, options.aggregate)
    for (_, index), total, count in zip(sides, totals, counts, strict=True):
        sums.add(index, total)
        sums.count(index, count)


def _unscored(scoring: Scoring, layer: Layer, step: Step) -> Iterator[Chunk]:
    """Reads a layer whose weights have no scores of their own."""
    for chunk in scoring.place.chunks(layer):
        yield chunk
        step.read(layer.name, chunk.weight.nbytes)


def _count(
    side: GridUnits,
    counts: Tensor,
    chunk: Chunk,
    live: Tensor | None,
    matrix: Matrix,
    first: int,
) -> None:
    """Counts the weights that may be kept; None: all."""
    if live is None:
        live = torch.ones(1, 1, 1, device=counts.device).expand(
            chunk.weight.numel() // max(1, matrix.cols * matrix.window), *matrix.shape[1:]
        )
    side.add(counts, Scored.of_scores(live.float().contiguous(), first), None, "mean")


def _meet(x: Assigned) -> bool:
    """Whether a group has both rows and columns of a weight that meet."""
    rows, cols = _by_block(x.rows.reshape(x.groups, -1))[0], _by_block(x.cols)[0]
    return bool(torch.isin(rows[rows >= x.groups], cols).any())


def _take_back(
    scored: Scored, which: Tensor | None, x: Assigned, sums: _Sums, aggregate: Aggregate
) -> None:
    """Subtracts what was added both by row and by column."""
    for top, rows, block in _pieces(x, scored):
        both = _in_both(rows, x.cols[block])
        if not bool(both.any()):
            continue
        part = slice(top, top + rows.numel())
        values = Scored(scored.x[part], *_norms(scored, part, block, x), 1, 0).scores(False)
        values = values.cpu().double()
        values = values.square() if aggregate == "energy" else values
        if which is not None:
            values = values * which[part].cpu().reshape(values.shape)
        values = values.reshape(*both.shape, -1).sum(-1)
        sums.add(rows, -(values * both).sum(1))


def _norms(scored: Scored, part: slice, block: int, x: Assigned) -> tuple[Tensor, Tensor]:
    """Cuts the norms of rows of one group."""
    if not scored.rows.numel():
        return scored.rows, scored.cols
    cols = scored.cols
    if cols.numel() > x.shape[1]:
        first = (scored.first // (x.shape[0] // x.groups)) if scored.groups > 1 else block
        begin = (block - first) * x.shape[1]
        cols = cols[begin : begin + x.shape[1]]
    return scored.rows[part].contiguous(), cols.contiguous()


def _pieces(x: Assigned, scored: Scored) -> Iterator[tuple[int, Tensor, int]]:
    """Splits scored rows where groups end: (index of the first, groups of the rows, block)."""
    height, count = x.shape[0] // x.groups, scored.x.shape[0]
    most = max(1, _ROWS // max(1, x.shape[1]))
    top = 0
    while top < count:
        row = scored.first + top
        block = row // height
        end = min(count, (block + 1) * height - scored.first, top + most)
        yield top, x.rows[row : scored.first + end], block
        top = end


def _in_both(rows: Tensor, cols: Tensor) -> Tensor:
    """Marks the weights whose row and column are of one group, bool [rows, cols]."""
    return (rows.unsqueeze(1) == cols) & (rows >= 0).unsqueeze(1)


def _by_data(scoring: Scoring, criterion: UnitCriterion, groups: CoupledGroups) -> Tensor:
    """Asks a criterion of data for what it says of columns and experts."""
    sums = _Sums(groups)
    for layer in scoring.plan.topology.layers.values():
        views = groups.views(layer.parameter)
        if not views:
            continue
        experts = criterion.expert_scores(scoring.network, layer)
        if experts is not None:
            numbers = views[0].rows.reshape(experts.numel(), -1)[:, 0]
            sums.add(numbers[numbers >= 0], experts[numbers >= 0].square())
            continue
        for role in layer.roles:
            scores = criterion.column_scores(scoring.network, role)
            if scores is None:
                continue
            view = next(x for x in views if x.transposed == role.part.transposed)
            side = view.rows if view.transposed else view.cols.flatten()
            first = role.part.first[0]
            sums.add(side[first : first + scores.numel()], scores.square())
    return exact_sqrt(sums.scores)
