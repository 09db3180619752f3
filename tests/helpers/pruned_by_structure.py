# SPDX-License-Identifier: MIT
"""Pruning by structures from its definition, unit by unit in plain Python.

Only scores come from `lap_ext.scores`. Here each weight has an output, an input, a group of a
convolution and a kernel position; from these it has a unit. Sums are exact (math.fsum), so that two
worths that differ by rounding alone would be a tie that only one side sees: that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, pairwise, permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lap_ext

GAP = 1e-9  # relative, between two worths that are not equal
Numbers = Callable[[str, tuple[int, ...]], Tensor]  # of the group of each weight


class NoRoomError(Exception):
    """The layers together need more for min_keep than the sparsity leaves."""


class Place(NamedTuple):
    """Where a weight is: the group of its convolution, its output, its input, its position."""

    group: int
    output: int
    input: int
    position: int


class View(NamedTuple):
    """A weight as [rows, columns, positions], with groups of rows; rows are outputs or inputs."""

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @lru_cache  # noqa: B019 (a view is a tuple)
    def places(self) -> list[Place]:
        """Places every weight, in flat order; outputs and inputs count within their group."""
        rows, cols = self.shape[:2]
        found = []
        for row, col, x in product(range(rows), range(cols), range(math.prod(self.shape[2:]))):
            group, inside = divmod(row, rows // self.groups)
            ends = (col, inside) if self.transposed else (inside, col)
            found.append(Place(group, *ends, x))
        return found


def view_of(module: nn.Module | None, shape: Sequence[int]) -> View:
    """Sees the weight of a module."""
    kind = type(module).__name__
    if kind == "Conv1D":  # of transformers
        return View(tuple(shape), transposed=True)
    groups = getattr(module, "groups", 1)
    return View(tuple(shape), groups, kind.startswith("ConvTranspose"))


@dataclass(frozen=True)
class Pruning:
    """The options, as `lap_ext.prune` has them.

    structure is its text or, for Groups, the numbers of the groups. views: of layers whose module
    does not say how they are used. scored: further options of `lap_ext.scores`.
    """

    structure: str | Numbers
    sparsity: float | Mapping[str, float] | None = None
    criterion: Any = "lookahead"
    scope: str = "layer"
    normalize: str = "lamp"
    order: str = "parallel"
    rounds: int = 1
    aggregate: str = "energy"
    multiple_of: int = 1
    min_keep: int | float | None = None
    masks: Mapping[str, Tensor] | None = None
    views: Mapping[str, View] = field(default_factory=dict)
    scored: Mapping[str, Any] = field(default_factory=dict)


def masks(topology: lap_ext.Topology, options: Pruning) -> dict[str, Tensor]:
    """Layer name -> mask, for all layers that the structure fits."""
    return _Run(topology, options).masks()


class _Run:
    def __init__(self, topology: lap_ext.Topology, options: Pruning) -> None:
        self.topology, self.options = topology, options
        self.pattern = _pattern(options.structure)
        names = [x for x in self._scores({}) if not self.pattern or self._fits(x)]
        self.weights = {name: topology.layers[name].weight.detach() for name in names}
        if options.masks is None:
            self.weights = {name: w for name, w in self.weights.items() if w.any()}
        ones = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self.may = {name: (options.masks or {}).get(name, x) for name, x in ones.items()}
        self.live = {name: x & (self.weights[name] != 0) for name, x in self.may.items()}
        self.units = {} if self.pattern else {x: self._units(x) for x in self.weights}
        self.start = {name: self._weighs(name, self.live[name]) for name in self.units}

    def _scores(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores all layers; what has been pruned does not count in norms, misfits included."""
        options, masks = self.options, {**(self.options.masks or {}), **masks}
        given = {"topology": self.topology, "masks": masks, **options.scored}
        return lap_ext.scores(self.topology.model, None, options.criterion, **given)

    def view(self, name: str) -> View:
        """Sees a layer's weight as rows and columns."""
        if name in self.options.views:
            return self.options.views[name]
        modules = dict(self.topology.model.named_modules())
        return view_of(modules.get(name), self.topology.layers[name].shape)

    def masks(self) -> dict[str, Tensor]:
        """Prunes in all rounds."""
        options, names = self.options, list(self.weights)
        together = options.scope == "global"
        for number in range(1, options.rounds + 1):
            before = self._scores(self.live) if options.order == "parallel" else None
            for group in [names] if together else _ordered(names, options.order):
                scores = before or self._scores(self.live)
                for name, kept in self._round(number, group, scores).items():
                    self.live[name] = self.live[name] & kept
        if options.masks is None:
            return self.live
        groups = [names] if together else [[name] for name in names]
        return {name: x for group in groups for name, x in self._filled(group).items()}

    def _round(
        self, number: int, names: Sequence[str], scores: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        options = self.options
        if self.pattern:
            keep, of, how = self.pattern
            keep = of - (of - keep) * number // options.rounds
            return {x: self._patterned(x, scores[x], (keep, of, how)) for x in names}
        start, budget = sum(self.start[x] for x in names), self._budget(names)
        keep = start - max(start - budget, 0) * number // options.rounds
        ranked = [self._ranked(x, scores[x]) for x in names]
        if options.scope == "global" and options.min_keep is not None:
            needs = [x.weighs(x.needed(options.multiple_of)) for x in ranked]
            if sum(needs) > keep:
                raise NoRoomError
        return self._joined(names, _best(ranked, keep, options.multiple_of))

    def _joined(self, names: Sequence[str], kept: Sequence[set[int]]) -> dict[str, Tensor]:
        """Makes masks of the units that are kept."""
        result = {}
        for name, numbers in zip(names, kept, strict=True):
            mask = torch.zeros(self.weights[name].numel(), dtype=torch.bool)
            for number in numbers:
                mask[self.units[name][number]] = True
            result[name] = mask.reshape(self.weights[name].shape)
        return result

    # --- patterns ---------------------------------------------------------------------------------

    def _fits(self, name: str) -> bool:
        """Whether every group of weights has as many as the pattern says."""
        assert self.pattern
        sizes = {len(x) for x in self._lines(name, self.pattern[1], self.pattern[2])}
        if self.pattern[2] == "transposable":
            others = {len(x) for x in self._lines(name, self.pattern[1], "out")}
            return sizes == others == {self.pattern[1]}
        return sizes == {self.pattern[1]}

    def _lines(self, name: str, of: int, how: str) -> list[list[int]]:
        """Lists the flat indices of the weights of which some are kept."""

        def key(flat: int, x: Place) -> tuple[int, ...]:
            if how == "flat":
                return (flat // of,)
            if how == "out":
                return (x.group, x.input, x.position, x.output // of)
            return (x.group, x.output, x.position, x.input // of)

        return _gathered([key(*x) for x in enumerate(self.view(name).places())])

    def _patterned(self, name: str, scores: Tensor, pattern: tuple[int, int, str]) -> Tensor:
        keep, of, how = pattern
        flat, live = scores.flatten().tolist(), self.live[name].flatten().tolist()
        kept = torch.zeros(len(flat), dtype=torch.bool)
        if how == "transposable":
            for tile in self._tiles(name, of):
                values = [flat[x] * live[x] for x in tile]
                if self.options.aggregate == "energy":
                    values = [x * x for x in values]
                best = _best_tile(values, [live[x] for x in tile], keep, of)
                kept[[tile[x] for x in best]] = True
            return kept.reshape(scores.shape)
        for line in self._lines(name, of, how):
            able = sorted((x for x in line if live[x]), key=lambda x: (-flat[x], x))
            kept[able[:keep]] = True
        return kept.reshape(scores.shape)

    def _tiles(self, name: str, of: int) -> list[list[int]]:
        """Lists the flat indices of tiles, the rows of the stored weight first."""
        view = self.view(name)

        def key(x: Place) -> tuple[int, ...]:
            return (x.group, x.output // of, x.input // of, x.position)

        tiles, places = _gathered([key(x) for x in view.places()]), view.places()
        for tile in tiles:
            tile.sort(
                key=lambda x: (
                    (places[x].input, places[x].output)
                    if view.transposed
                    else (places[x].output, places[x].input)
                )
            )
        return tiles

    # --- units ------------------------------------------------------------------------------------

    def _units(self, name: str) -> list[list[int]]:
        """Lists the flat indices of the weights of each unit."""
        structure, view = self.options.structure, self.view(name)
        if callable(structure):
            shape = tuple(self.weights[name].shape)
            numbers = structure(name, shape).flatten().tolist()
            return [
                [x for x, number in enumerate(numbers) if number == wanted]
                for wanted in range(max(numbers, default=-1) + 1)
            ]
        if structure == "row":
            return _gathered([(x.group, x.output) for x in view.places()])
        if structure == "column":
            return _gathered([(x.group, x.input) for x in view.places()])
        down, across = map(int, structure.split("x"))
        return _gathered([(x.group, x.output // down, x.input // across) for x in view.places()])

    def _weighs(self, name: str, live: Tensor) -> int:
        """Counts the weights of the units that have a live one."""
        flat = live.flatten().tolist()
        return sum(len(unit) for unit in self.units[name] if any(flat[x] for x in unit))

    def _budget(self, names: Sequence[str]) -> int:
        """Counts the weights to keep: of a layer, or of all together."""
        given = self.options.sparsity

        def count(name: str) -> Fraction:
            fraction = given.get(name, 0.0) if isinstance(given, Mapping) else given
            return (1 - Fraction(repr(fraction))) * self.weights[name].numel()

        half = Fraction(1, 2)
        if self.options.scope == "global":
            if isinstance(given, Mapping):
                return sum(math.floor(count(name) + half) for name in names)
            return math.floor(sum(map(count, names)) + half)
        return max(math.floor(count(names[0]) + half), self._floor(names[0]))

    def _floor(self, name: str) -> int:
        least, size = self.options.min_keep, self.weights[name].numel()
        if isinstance(least, float):
            return math.ceil(Fraction(repr(least)) * size)
        return min(least or 0, size)

    def _ranked(self, name: str, scores: Tensor) -> _Ranked:
        options, units = self.options, self.units[name]
        flat, live = scores.double().flatten().tolist(), self.live[name].flatten().tolist()
        worth = {}
        for number, unit in enumerate(units):
            values = [flat[x] for x in unit if live[x]]
            if not values:
                continue
            if options.aggregate == "mean":
                worth[number] = math.fsum(values) / len(unit)
            else:
                worth[number] = math.sqrt(math.fsum(x * x for x in values))
        order = sorted(worth, key=lambda x: (-worth[x], x))
        ordered = [worth[x] for x in order]
        if options.scope == "global" and options.normalize == "norm":
            size = math.sqrt(math.fsum(x * x for x in ordered))
            ordered = [x / size for x in ordered]
        if options.scope == "global" and options.normalize == "lamp":
            sums = [math.fsum(y * y for y in ordered[: n + 1]) for n in range(len(ordered))]
            ordered = [x * x / total for x, total in zip(ordered, sums, strict=True)]
        least = self._floor(name) if options.min_keep is not None else 1
        return _Ranked(order, ordered, [len(x) for x in units], least)

    # --- zeros ------------------------------------------------------------------------------------

    def _filled(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Keeps zero weights too, where all others that may be kept are.

        Only for masks that are given: without, zeros are pruned weights.
        """
        if self.pattern:
            return {name: self._filled_lines(name) for name in names}
        live = {name: self.may[name] & (self.weights[name] != 0) for name in names}
        keep = self._budget(names)
        fits = sum(self._weighs(x, live[x]) for x in names) <= keep
        ranked = []
        for name in names:
            may, own = self.may[name].flatten().tolist(), live[name].flatten().tolist()
            able = [n for n, unit in enumerate(self.units[name]) if any(may[x] for x in unit)]
            worth = [float(any(own[x] for x in self.units[name][n])) for n in able]
            order = sorted(range(len(able)), key=lambda n: (-worth[n], n))
            least = self._floor(name) if self.options.min_keep is not None else 1
            sizes = [len(x) for x in self.units[name]]
            ranked.append(
                _Ranked([able[n] for n in order], [worth[n] for n in order], sizes, least)
            )
        kept = self._joined(names, _best(ranked, keep if fits else 0, self.options.multiple_of))
        filled = {name: x & self.may[name] for name, x in kept.items()}
        if fits:
            return filled
        # zeros of kept units are kept; a layer that has nothing else keeps its least
        extended = {x: self._extended(x, self.live[x]) & self.may[x] for x in names}
        return {x: extended[x] if self.live[x].any() else filled[x] for x in names}

    def _extended(self, name: str, kept: Tensor) -> Tensor:
        """Marks all weights of the units that have a kept one."""
        flat, full = kept.flatten(), torch.zeros(kept.numel(), dtype=torch.bool)
        for unit in self.units[name]:
            full[unit] = bool(flat[unit].any())
        return full.reshape(kept.shape)

    def _filled_lines(self, name: str) -> Tensor:
        assert self.pattern
        keep, of, how = self.pattern
        kept = self.live[name].flatten().clone()
        may = self.may[name].flatten().tolist()
        if how == "transposable":
            for tile in self._tiles(name, of):
                held = [float(kept[x]) for x in tile]
                for x in _best_tile(held, [True] * len(tile), keep, of):
                    kept[tile[x]] |= may[tile[x]]
            return kept.reshape(self.weights[name].shape)
        for line in self._lines(name, of, how):
            room = keep - int(kept[line].sum())
            free = [x for x in line if may[x] and not kept[x]]
            kept[free[:room]] = True
        return kept.reshape(self.weights[name].shape)


class _Ranked(NamedTuple):
    """Units of a layer, the best first, with their worths; sizes of all by their numbers."""

    order: list[int]
    worth: list[float]
    sizes: list[int]
    least: int

    def weighs(self, count: int) -> int:
        """Counts the weights of the best units."""
        return sum(self.sizes[x] for x in self.order[:count])

    def allowed(self, multiple_of: int) -> list[int]:
        """Lists how many units may be kept: multiples, or all; or all live ones, if too few."""
        live = len(self.order)
        every = {len(self.sizes), live} if live < multiple_of else {len(self.sizes)}
        return [n for n in range(live + 1) if n % multiple_of == 0 or n in every]

    def needed(self, multiple_of: int) -> int:
        """Finds how many units have the least number of weights, or are all that may be kept."""
        allowed = self.allowed(multiple_of)
        enough = [n for n in allowed if self.weighs(n) >= self.least]
        return min(enough, default=max(allowed))


def _best(every: Sequence[_Ranked], keep: int, multiple_of: int) -> list[set[int]]:
    """Keeps what each layer needs, then the best others as long as they fit.

    With multiple_of, so many units of a layer come together, and have the least worth of them.
    """
    counts = [x.needed(multiple_of) for x in every]
    left = keep - sum(x.weighs(n) for x, n in zip(every, counts, strict=True))
    steps = []
    for index, x in enumerate(every):
        allowed = x.allowed(multiple_of)
        for before, after in pairwise(allowed):
            if before >= counts[index]:
                size = x.weighs(after) - x.weighs(before)
                steps.append((x.worth[after - 1], index, after, size))
    steps.sort(key=lambda x: (-x[0], x[1], x[2]))
    for worth, following in pairwise(x[0] for x in steps):
        assert worth == following or worth - following > GAP * worth, "a tie by rounding"
    for _, index, after, size in steps:
        if size > left:
            break
        left -= size
        counts[index] = after
    return [set(x.order[:n]) for x, n in zip(every, counts, strict=True)]


def _ordered(names: Sequence[str], order: str) -> list[list[str]]:
    return [[name] for name in (reversed(names) if order == "backward" else names)]


def _gathered(keys: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Gathers indices of equal keys; keys in the order in which they come first."""
    found: dict[tuple[int, ...], list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return list(found.values())


def _pattern(structure: str | Numbers) -> tuple[int, int, str] | None:
    """Reads "n:m/how"; None: no pattern."""
    if callable(structure) or ":" not in structure:
        return None
    numbers, _, how = structure.partition("/")
    keep, of = map(int, numbers.split(":"))
    return keep, of, how or "in"


def _best_tile(values: Sequence[float], live: Sequence[bool], keep: int, of: int) -> list[int]:
    """Finds the best of all patterns with keep in each row and column of a tile of rows.

    Of those that keep the most live weights, the one with the largest sum.
    """
    patterns = _tile_patterns(keep, of)
    counts = [sum(live[x] for x in pattern) for pattern in patterns]
    patterns = [x for x, count in zip(patterns, counts, strict=True) if count == max(counts)]
    sums = [math.fsum(values[x] for x in pattern) for pattern in patterns]
    best = max(sums)
    ties = [x for x in sums if x != best and best - x <= GAP * best]
    assert not ties, "a tie by rounding"
    return patterns[sums.index(best)]


@lru_cache
def _tile_patterns(keep: int, of: int) -> list[list[int]]:
    """Lists the patterns; those whose first rows keep lower columns come first."""
    if keep == 1:
        return [[row * of + x for row, x in enumerate(p)] for p in permutations(range(of))]
    found = []
    for choice in product(combinations(range(of), keep), repeat=of):
        if all(sum(col in row for row in choice) == keep for col in range(of)):
            found.append([row * of + col for row, cols in enumerate(choice) for col in cols])
    return found
