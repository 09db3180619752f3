# SPDX-License-Identifier: MIT
"""Defines groups of weights, biases and norm parameters that are removed together."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, overload

import torch
from torch import Tensor

from lap_ext._text import some
from lap_ext.errors import LapTypeError, LapValueError

_LEFT_OUT = "a layer that makes it is left out"


class Member(NamedTuple):
    """What a group has of one parameter.

    Attributes:
        parameter: its full name.
        shape: the parameter as a matrix, (rows, cols), all else flattened away: [O, I] of a
            convolution's [O, I, *window]; (n,) of a vector.
        rows: int64 indices of rows; None means all. Flat indices, where shape has one dimension.
        cols: int64 indices of columns; None means all.
    """

    parameter: str
    shape: tuple[int, ...]
    rows: Tensor | None
    cols: Tensor | None


class Fixed(NamedTuple):
    """Output channels of a layer that cannot be removed, and why."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True, eq=False)
class Family:
    """Groups of the same layers, which are ranked with each other.

    Attributes:
        name: that of the first layer, and how many more there are.
        layers: the layers that make the channels.
        groups: their numbers, int64 [n].
        classes: the class of each, int64 [n]; one of every class is removed at a time, so that the
            parts that an operation needs equal stay equal. All 0: there are no such parts.
    """

    name: str
    layers: tuple[str, ...]
    groups: Tensor
    classes: Tensor

    @property
    def size(self) -> int:
        """How many units can be removed one by one: of the smallest class, all."""
        return int(torch.bincount(self.classes).min()) if self.classes.numel() else 0


@dataclass(frozen=True, eq=False)
class Assigned:
    """The group of each row and column of a weight; -1 where there is none.

    Attributes:
        layer: name of the layer, empty where the parameter is no layer of the topology.
        parameter: full name of the parameter.
        shape: (rows, columns of a group of rows).
        groups: how many groups the rows are in.
        rows: int64 [rows].
        cols: int64 [groups, columns].
        transposed: whether rows are inputs.
    """

    layer: str
    parameter: str
    shape: tuple[int, int]
    groups: int
    rows: Tensor
    cols: Tensor
    transposed: bool = False

    def kept(self, removed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which rows and columns are kept, bool [rows] and [groups, cols]."""
        gone = torch.cat([removed, removed.new_zeros(1)])  # the last one: index -1
        return ~gone[self.rows], ~gone[self.cols]


@dataclass(frozen=True, eq=False)
class AssignedVector:
    """The group of each entry of a bias, a norm or another parameter; -1 where there is none."""

    name: str
    shape: tuple[int, ...]
    entries: Tensor  # int64 [n], flat
    zeroed: bool  # whether a mask sets it to 0
    buffer: bool


@dataclass(frozen=True, eq=False)
class CoupledGroup:
    """Everything that goes when one unit goes: a channel, a head, an expert or an FFN unit.

    Attributes:
        number: in `CoupledGroups`.
        family: the name of its family.
        channels: how many output channels of layers it has.
    """

    number: int
    family: str
    channels: int
    _of: CoupledGroups = field(repr=False)

    @property
    def members(self) -> tuple[Member, ...]:
        """What it has of each parameter: rows of producers, columns of consumers, biases, norms."""
        return tuple(self._of.members(self.number))

    def __str__(self) -> str:
        lines = [f"group {self.number} of {self.family}"]
        for x in self.members:
            sides = [] if x.rows is None else [f"{'rows' if x.cols is None else 'of rows'} "
                                               f"{_listed(x.rows)}"]  # fmt: skip
            if x.cols is not None:
                sides.insert(0, f"columns {_listed(x.cols)}")
            lines.append(f"  {x.parameter}: {', '.join(sides) or 'all'}")
        return "\n".join(lines)


class CoupledGroups(Sequence[CoupledGroup]):
    """The groups of a model for one structure, as `lap_ext.structures.groups` returns them.

    Attributes:
        structure: "channel", "head", "expert" or "unit".
        families: the groups by the layers that make their channels.
        fixed: output channels that cannot be removed, and why.
        weights: the groups of the rows and columns of each weight.
        vectors: the groups of the entries of biases, norms and the like.
    """

    def __init__(
        self,
        structure: str,
        families: Sequence[Family],
        fixed: Sequence[Fixed],
        weights: Sequence[Assigned],
        vectors: Sequence[AssignedVector],
        shapes: Mapping[str, tuple[int, ...]],
        ids: Tensor | None = None,
    ) -> None:
        self.structure = structure
        self.families = tuple(families)
        self.fixed = tuple(fixed)
        self.weights = tuple(weights)
        self.vectors = tuple(vectors)
        self._shapes = dict(shapes)
        self.ids = ids  # the group of each channel id of the graph; None: groups are no channels

    def __len__(self) -> int:
        return sum(x.groups.numel() for x in self.families)

    @overload
    def __getitem__(self, index: int) -> CoupledGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[CoupledGroup]: ...
    def __getitem__(self, index: int | slice) -> CoupledGroup | list[CoupledGroup]:
        """Returns a group, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        family = self.families[int(self.family_of[number])]
        return CoupledGroup(number, family.name, int(self.channels[number]), self)

    def __iter__(self) -> Iterator[CoupledGroup]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"CoupledGroups({self.structure}, {len(self)} in {len(self.families)} families, "
            f"{sum(x.channels for x in self.fixed)} channels fixed)"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        lines += [f"  {x.groups.numel():>6}  {x.name}" for x in self.families]
        lines += [f"  {x.channels:>6}  fixed in {x.layer}: {x.reason}" for x in self.fixed]
        return "\n".join(lines)

    @cached_property
    def family_of(self) -> Tensor:
        """The index of each group's family, int64."""
        result = torch.zeros(len(self), dtype=torch.int64)
        for index, family in enumerate(self.families):
            result[family.groups] = index
        return result

    @cached_property
    def channels(self) -> Tensor:
        """How many output channels of layers each group has, int64."""
        counts = torch.zeros(len(self) + 1, dtype=torch.int64)
        for x in self.weights:
            side = x.cols.flatten() if x.transposed else x.rows
            counts += torch.bincount(side + 1, minlength=len(self) + 1)
        return counts[1:]

    def only(self, layers: Container[str]) -> CoupledGroups:
        """Returns these groups without the families that another layer makes channels of."""
        kept = [x for x in self.families if all(name in layers for name in x.layers)]
        if len(kept) == len(self.families):
            return self
        number = torch.full((len(self) + 1,), -1)  # the last one: index -1
        count, families = 0, []
        for x in kept:
            numbers = torch.arange(count, count + x.groups.numel())
            number[x.groups] = numbers
            count += x.groups.numel()
            families.append(replace(x, groups=numbers))
        left = [x for x in self.families if x not in kept]
        names = [name for x in left for name in x.layers]
        weights = [replace(x, rows=number[x.rows], cols=number[x.cols]) for x in self.weights]
        fixed = list(self.fixed)
        for name in dict.fromkeys(names):
            views = zip(self.weights, weights, strict=True)
            lost = (_lost(a, b) for a, b in views if a.layer == name)
            fixed.append(Fixed(name, max(lost, default=0), _LEFT_OUT))
        vectors = [replace(x, entries=number[x.entries]) for x in self.vectors]
        ids = None if self.ids is None else number[self.ids]
        return CoupledGroups(self.structure, families, fixed, weights, vectors, self._shapes, ids)

    def layers(self) -> set[str]:
        """Names the layers of which groups have rows or columns."""
        return {
            x.layer for x in self.weights if bool((x.rows >= 0).any()) or bool((x.cols >= 0).any())
        }

    @cached_property
    def _views(self) -> dict[str, tuple[Assigned, ...]]:
        views: dict[str, tuple[Assigned, ...]] = {}
        for x in self.weights:
            views[x.parameter] = (*views.get(x.parameter, ()), x)
        return views

    def views(self, parameter: str) -> tuple[Assigned, ...]:
        """Returns the groups of a weight as its uses see it; none for what no layer uses."""
        return self._views.get(parameter, ())

    def numel(self, parameter: str) -> int:
        """Counts the weights of a parameter that groups have some of."""
        return torch.Size(self._shapes[parameter]).numel()

    def packed(self, x: Assigned) -> bool:
        """Whether a weight has the matrices of several experts, [experts, rows, columns]."""
        shape = self._shapes[x.parameter]
        if len(shape) < 3 or shape[1] == 1:  # a depthwise convolution has groups of one row
            return False
        return (x.groups, *x.shape) == (shape[0], shape[0] * shape[1], shape[2])

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lists what groups have, sorted by group: (first entry of each, slot, index).

        Slots 2 n and 2 n + 1 are the rows and columns of weight n; vectors follow.
        """
        sides = [side for x in self.weights for side in (x.rows, x.cols.flatten())]
        sides += [x.entries for x in self.vectors]
        none = torch.zeros(0, dtype=torch.int64)
        group = torch.cat([none, *sides])
        slot = torch.cat([none, *(torch.full_like(x, n) for n, x in enumerate(sides))])
        index = torch.cat([none, *(torch.arange(x.numel()) for x in sides)])
        order = torch.argsort(group, stable=True)
        starts = torch.searchsorted(group[order], torch.arange(len(self) + 1))
        return starts, slot[order], index[order]

    def members(self, number: int) -> Iterator[Member]:
        """Gives what a group has of each parameter."""
        starts, slot, index = self._entries
        own = slice(int(starts[number]), int(starts[number + 1]))
        slots, counts = slot[own].unique_consecutive(return_counts=True)
        for at, mine in zip(slots.tolist(), index[own].split(counts.tolist()), strict=True):
            if at >= 2 * len(self.weights):
                vector = self.vectors[at - 2 * len(self.weights)]
                if not vector.buffer:
                    yield Member(vector.name, (vector.entries.numel(),), mine, None)
                continue
            x = self.weights[at // 2]
            if at % 2 == 0:
                every = mine.numel() == x.shape[0]
                yield Member(x.parameter, x.shape, None if every else mine, None)
                continue
            height, blocks = x.shape[0] // max(x.groups, 1), mine // x.shape[1]
            for block in blocks.unique().tolist():
                rows = torch.arange(block * height, (block + 1) * height)
                cols = mine[blocks == block] % x.shape[1]
                yield Member(x.parameter, x.shape, None if x.groups == 1 else rows, cols)

    def masks(self, removed: Tensor) -> dict[str, Tensor]:
        """Masks everything that groups have: True marks what is kept.

        Args:
            removed: bool [number of groups].

        Returns:
            Parameter name -> bool tensor of its shape, for each parameter of which some is removed.

        Raises:
            TypeError: removed is not a bool tensor.
            ValueError: it has another length.
        """
        if not isinstance(removed, Tensor) or removed.dtype != torch.bool:
            got = removed.dtype if isinstance(removed, Tensor) else type(removed).__name__
            raise LapTypeError(
                "{argument} to be a bool tensor, True for each group that goes",
                str(got),
                argument="removed",
            )
        if removed.shape != (len(self),):
            raise LapValueError(
                f"{{argument}} with one entry for each of {len(self)} groups",
                f"shape {tuple(removed.shape)}",
                argument="removed",
            )
        result: dict[str, Tensor] = {}
        for x in self.weights:
            rows, cols = x.kept(removed)
            if bool(rows.all()) and bool(cols.all()):
                continue
            kept = rows.reshape(x.groups, -1, 1) & cols.unsqueeze(1)
            full = self._shapes[x.parameter]
            window = torch.Size(full).numel() // max(1, kept.numel())
            mask = kept.reshape(-1, 1).expand(-1, window).reshape(full)
            known = result.get(x.parameter)
            result[x.parameter] = mask if known is None else known & mask
        for name, mask in self.vector_masks(removed).items():
            result[name] = mask
        return result

    def vector_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the biases, norms and the like that masks may set to 0 in part."""
        return {
            x.name: x.shape
            for x in self.vectors
            if x.zeroed and not x.buffer and bool((x.entries >= 0).any())
        }

    def vector_masks(self, removed: Tensor) -> dict[str, Tensor]:
        """Masks the entries of biases, norms and the like, where some is removed."""
        gone = torch.cat([removed, removed.new_zeros(1)])
        result: dict[str, Tensor] = {}
        for x in self.vectors:
            kept = ~gone[x.entries]
            if x.zeroed and not x.buffer and not bool(kept.all()):
                mask = kept.reshape(x.shape)
                result[x.name] = result[x.name] & mask if x.name in result else mask
        return result


def _lost(before: Assigned, after: Assigned) -> int:
    """Counts the output channels that are in no group any more."""
    a, b = (x.cols if x.transposed else x.rows for x in (before, after))
    return int(((a >= 0) & (b < 0)).count_nonzero())


def _listed(index: Tensor) -> str:
    """Spells indices.

    Example:
        >>> _listed(torch.tensor([3])), _listed(torch.arange(4, 8)), _listed(torch.tensor([1, 5]))
        ('3', '4 to 7', '1, 5')
    """
    first, last = int(index[0]), int(index[-1])
    if index.numel() > 2 and last - first + 1 == index.numel():
        return f"{first} to {last}"
    return some(map(str, index.tolist()), 8)
