# SPDX-License-Identifier: MIT
"""Computes from layer shapes the number of weights that each layer keeps (layer-wise sparsity).

    uniform        density d in every layer
    uniform_plus   first convolution dense, last layer max(d, 1/5), other layers d; d is chosen to
                   meet the total
    er, erk        density ~ sum(dims) / prod(dims), at most 1, scaled to meet the total;
                   the dims of a convolution are its channels in er, also its kernel size in erk
    per_layer      a sparsity for each pattern of names; layers that match nothing stay dense
    compounded     sparsity 1 - (1 - ratio)^times, with a ratio for each layer

Let n be the number of all weights. uniform_plus, er and erk keep exactly
floor((1 - sparsity) * n + 1/2) weights in total. Each layer gets its share rounded down; the
weights that remain go, one each, to the layers with the largest remainders, and the earlier layer
wins a tie. The other allocations round each layer by itself: floor((1 - sparsity) * size + 1/2).
All of this is computed in integers and fractions, without rounding errors.

Sources: uniform_plus is from Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning",
ICLR 2021; ERK from Evci et al., "Rigging the lottery", ICML 2020; the ratios from Park et al.,
ICLR 2020.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

from lap_ext._text import matches, meant_layers
from lap_ext.allocation.targets import Target
from lap_ext.errors import LapTypeError, LapValueError, calling
from lap_ext.ops import check
from lap_ext.ops.check import Number
from lap_ext.structures import NM, Structure

Shapes = Mapping[str, Sequence[int]]  # layer name -> shape of its weight, in the model's order

LAST_LAYER = Fraction(1, 5)  # uniform_plus: the last layer keeps at least this


@runtime_checkable
class Allocation(Protocol):
    """Says how many weights each layer keeps; a class of your own needs only the method keeps.

    Example:
        >>> class HalfOfTheFirst:
        ...     def keeps(self, shapes):
        ...         sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        ...         return sizes | {name: sizes[name] // 2 for name in list(sizes)[:1]}
        >>> of(HalfOfTheFirst()).keeps({"a": (2, 4), "b": (3, 2)})
        {'a': 4, 'b': 6}
    """

    def keeps(self, shapes: Shapes, /) -> dict[str, int]:
        """Returns how many weights to keep in each layer in shapes, never more than it has."""
        ...


Sparsity = Number | Mapping[Any, Number] | Allocation | Target  # what prune takes


def of(sparsity: Sparsity) -> Allocation:
    """Converts a sparsity to an allocation: a number to uniform, a dict to per_layer.

    Args:
        sparsity: a number, a dict from patterns to numbers, or an allocation, which is returned
            unchanged.

    Example:
        >>> of(0.5), of({"fc*": 0.9})
        (uniform(sparsity=0.5), per_layer(sparsity={'fc*': 0.9}))
    """
    if isinstance(sparsity, Mapping):
        return per_layer(sparsity)
    if isinstance(sparsity, Allocation) and not isinstance(sparsity, type):
        return sparsity
    if isinstance(sparsity, Target):
        raise LapTypeError(
            "a structure across layers ('channel', 'head', 'expert' or 'unit') with a {argument} "
            "that is a target for the model",
            f"{sparsity.counted}({sparsity.target})",
            argument="sparsity",
        )
    if isinstance(sparsity, (bool, type)) or not hasattr(sparsity, "as_integer_ratio"):
        given = sparsity if isinstance(sparsity, type) else type(sparsity)
        raise LapTypeError(
            "{argument} to be a number (the fraction removed), a dict pattern -> number or an "
            "allocation such as lap_ext.erk(0.9)",
            given.__name__,
            argument="sparsity",
        )
    check.keep_count(sparsity, None, 0)
    return uniform(sparsity)


def total(allocation: Allocation, shapes: Shapes) -> int:
    """Counts the weights to keep in total when all layers are ranked together.

    A uniform sparsity gives floor((1 - sparsity) * n + 1/2), where n is the number of all weights;
    any other allocation gives the sum of the weights that it keeps in each layer.

    Example:
        >>> shapes = {"a": (1, 5), "b": (1, 5)}
        >>> total(uniform(0.5), shapes), total(per_layer({"*": 0.5}), shapes)  # 5; 3 + 3
        (5, 6)
    """
    if isinstance(allocation, uniform):
        n = sum(_sizes(shapes).values())
        return check.keep_count(allocation.sparsity, None, n)
    return sum(allocation.keeps(shapes).values())


@dataclass(frozen=True)
class uniform:  # noqa: N801 (reads as the function that it is used as; so do the others)
    """Removes the same fraction of every layer.

    Example:
        >>> uniform(0.75).keeps({"a": (4, 4), "b": (2, 5)})  # floor(10 / 4 + 1/2)
        {'a': 4, 'b': 3}
    """

    sparsity: Number

    @calling("uniform")
    def __post_init__(self) -> None:
        check.keep_count(self.sparsity, None, 0)

    def keeps(self, shapes: Shapes, /) -> dict[str, int]:
        """Counts the weights to keep in each layer."""
        return {
            name: check.keep_count(self.sparsity, None, n) for name, n in _sizes(shapes).items()
        }


@dataclass(frozen=True)
class uniform_plus:  # noqa: N801
    """Keeps the first convolution dense, at least a fifth of the last layer, and the rest uniform.

    Args:
        sparsity: the fraction to remove of all weights together.
        first: name of the layer that stays dense. None means the first layer whose weight has 3 or
            more dimensions, or no layer if there is none.
        last: name of the layer that keeps at least a fifth. None means the last layer.

    Example:
        >>> uniform_plus(0.75).keeps({"conv": (2, 1, 1, 1), "fc": (4, 4), "out": (2, 5)})
        {'conv': 2, 'fc': 3, 'out': 2}

        Of 28 weights, 7 are kept. The dense layer takes 2 of them. With density 5/26 in the others,
        out would keep less than its minimum of 2, so that out keeps 2 and fc keeps 3.
    """

    sparsity: Number
    first: str | None = None
    last: str | None = None

    @calling("uniform_plus")
    def __post_init__(self) -> None:
        check.keep_count(self.sparsity, None, 0)

    @calling("uniform_plus")
    def keeps(self, shapes: Shapes, /) -> dict[str, int]:
        """Counts the weights to keep in each layer.

        Raises:
            ValueError: the dense layer and a fifth of the last layer together exceed the total.
        """
        for argument, name in (("first", self.first), ("last", self.last)):
            if name is not None and name not in shapes:
                raise _no_layer("{argument}", name, shapes, argument)
        sizes = _sizes(shapes)
        first = self.first or next((x for x, dims in shapes.items() if len(dims) > 2), None)
        last = self.last or next(reversed(sizes), None)
        least = dict.fromkeys(sizes, 0)
        if last is not None:
            least[last] = math.ceil(LAST_LAYER * sizes[last])
        if first is not None:
            least[first] = sizes[first]
        n, needed = sum(sizes.values()), sum(least.values())
        total = check.keep_count(self.sparsity, None, n)
        if needed > total:
            raise LapValueError(
                f"a {{argument}} that leaves {needed} of {n} weights (the first convolution stays "
                "dense, the last layer keeps a fifth)",
                f"{self.sparsity}, which leaves {total}",
                "Use erk, uniform or {scope='global'}.",
                argument="sparsity",
            )
        return _rounded(_solved(sizes, sizes, least, total), total)


@dataclass(frozen=True)
class er:  # noqa: N801
    """Prunes wide layers more: density ~ (out + in) / (out * in), for any convolution kernel size.

    Example:
        >>> er(0.75).keeps({"a": (8, 8), "b": (8, 2)})  # 20 of 80, split 16 : 10
        {'a': 12, 'b': 8}
    """

    sparsity: Number

    def __post_init__(self) -> None:
        with calling(type(self).__name__):
            check.keep_count(self.sparsity, None, 0)

    def keeps(self, shapes: Shapes, /) -> dict[str, int]:
        """Counts the weights to keep in each layer."""
        sizes = _sizes(shapes)
        n = sum(sizes.values())
        total = check.keep_count(self.sparsity, None, n)
        weights = {name: max(1, self._weight(dims)) for name, dims in shapes.items()}
        return _rounded(_solved(sizes, weights, dict.fromkeys(sizes, 0), total), total)

    def _weight(self, dims: Sequence[int]) -> int:
        """Returns density * size: the product cancels, but for the window."""
        return sum(dims[:2]) * math.prod(dims[2:])


@dataclass(frozen=True)
class erk(er):  # noqa: N801
    """Prunes like er, but with density ~ (out + in + height + width) / (out * in * height * width).

    A linear layer has no height and no width, neither in the sum nor in the product.

    Example:
        >>> erk(0.75).keeps({"conv": (4, 2, 3, 3), "fc": (3, 4)})  # 21 of 84, split 12 : 7
        {'conv': 13, 'fc': 8}
    """

    def _weight(self, dims: Sequence[int]) -> int:
        return sum(dims)


@dataclass(frozen=True)
class per_layer:  # noqa: N801
    """Uses one sparsity for each fnmatch pattern of layer names; the first matching pattern counts.

    Example:
        >>> shapes = {"body.0": (4, 4), "body.1": (4, 4), "head": (2, 4)}
        >>> per_layer({"body.0": 0.25, "body.*": 0.5}).keeps(shapes)
        {'body.0': 12, 'body.1': 8, 'head': 8}
    """

    sparsity: Mapping[str, Number]

    @calling("per_layer")
    def __post_init__(self) -> None:
        _check_patterns(self.sparsity)
        for pattern, sparsity in self.sparsity.items():
            check.keep_count(sparsity, None, 0, argument=f"sparsity[{pattern!r}]")

    @calling("per_layer")
    def keeps(self, shapes: Shapes, /) -> dict[str, int]:
        """Counts the weights to keep in each layer; a layer that no pattern matches keeps all.

        Raises:
            ValueError: a pattern matches no layer, or only layers that earlier patterns match.
        """
        given = _by_layer(self.sparsity, shapes)
        return {name: check.keep_count(given[name], None, n) for name, n in _sizes(shapes).items()}


@dataclass(frozen=True)
class compounded:  # noqa: N801
    """Removes 1 - (1 - ratio)^times of a layer at once, the one-shot levels of the lookahead paper.

    Args:
        ratios: a sequence with one ratio for each layer, in order, or a dict from patterns to
            ratios; layers that match no pattern stay dense.
        times: how many times the ratios are applied; 0 gives the dense net.

    Example:
        >>> compounded([0.5, 0.25], 2).keeps({"fc": (4, 4), "out": (2, 8)})  # 16 / 4, 16 * 9 / 16
        {'fc': 4, 'out': 9}
    """

    ratios: Sequence[Number] | Mapping[str, Number]
    times: int

    @calling("compounded")
    def __post_init__(self) -> None:
        if isinstance(self.times, bool) or not isinstance(self.times, int) or self.times < 0:
            raise LapValueError(
                "{argument} to be a whole number >= 0 (how often the ratios are applied)",
                repr(self.times),
                argument="times",
            )
        ratios = self.ratios
        if isinstance(ratios, Mapping):
            _check_patterns(ratios)
            ratios = list(ratios.values())
        for ratio in ratios:
            check.keep_count(ratio, None, 0, argument="ratio")

    @calling("compounded")
    def keeps(self, shapes: Shapes, /) -> dict[str, int]:
        """Counts the weights to keep in each layer."""
        if isinstance(self.ratios, Mapping):
            ratios = _by_layer(self.ratios, shapes)
        elif len(self.ratios) != len(shapes):
            raise LapValueError(
                f"one ratio for each of the {len(shapes)} layers ({', '.join(shapes)})",
                len(self.ratios),
                "Name them: a dict pattern -> ratio.",
            )
        else:
            ratios = dict(zip(shapes, self.ratios, strict=True))
        kept = {name: 1 - Fraction(*ratio.as_integer_ratio()) for name, ratio in ratios.items()}
        return {
            name: check.keep_count(1 - kept[name] ** self.times, None, n)
            for name, n in _sizes(shapes).items()
        }


def _check_patterns(by_pattern: Mapping[str, Number]) -> None:
    """Raises unless all keys are texts: an allocation sees names and shapes, and no model."""
    for key in by_pattern:
        if not isinstance(key, str):
            raise LapTypeError(
                "keys to be patterns of layer names",
                key.__name__ if isinstance(key, type) else type(key).__name__,
                "Modules and types of modules may be keys of a dict that prune gets as sparsity.",
            )


def _by_layer(by_pattern: Mapping[str, Number], shapes: Shapes) -> dict[str, Number]:
    """Returns each layer's number, 0 where no pattern matches; the first that matches counts."""
    pattern_of: dict[str, str] = {}
    for pattern in by_pattern:
        fitting = [name for name in shapes if matches(name, pattern)]
        if not fitting:
            raise _no_layer("a pattern", pattern, shapes)
        free = [name for name in fitting if name not in pattern_of]
        if not free:
            raise LapValueError(
                "each pattern to be the first match of some layer",
                f"{pattern!r}, whose layers all match {pattern_of[fitting[0]]!r} before it",
                "Put it first.",
            )
        pattern_of.update(dict.fromkeys(free, pattern))
    return {name: by_pattern[pattern_of[name]] if name in pattern_of else 0 for name in shapes}


def _no_layer(what: str, given: str, shapes: Shapes, argument: str | None = None) -> LapValueError:
    """Makes the error about a name or pattern that fits no layer, with what may have been meant."""
    cure = meant_layers(given, list(shapes))
    return LapValueError(f"{what} that names a layer", repr(given), cure, argument=argument)


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(dims) for name, dims in shapes.items()}


def _solved(
    sizes: Mapping[str, int], weights: Mapping[str, int], least: Mapping[str, int], total: int
) -> dict[str, Fraction]:
    """Solves for the x with which the shares min(size, max(least, x * weight)) add up to the total.

    Needs sum(least) <= total <= sum(sizes). The sum grows with x, and is linear between the values
    of x at which a layer leaves its least or reaches its size. Two neighbors of these enclose the
    total.
    """

    def shares(x: Fraction) -> dict[str, Fraction]:
        return {
            name: min(Fraction(n), max(Fraction(least[name]), x * weights[name]))
            for name, n in sizes.items()
        }

    def kept(x: Fraction) -> Fraction:
        return sum(shares(x).values(), Fraction(0))

    ends = [(end[name], weight) for end in (least, sizes) for name, weight in weights.items()]
    bends = sorted({Fraction(0), *(Fraction(end, weight) for end, weight in ends if weight)})
    right = bisect_left(bends, Fraction(total), key=kept)  # the first that keeps total or more
    if right == 0:
        return shares(bends[0])
    low, high = bends[right - 1], bends[right]
    fraction = (total - kept(low)) / (kept(high) - kept(low))
    return shares(low + fraction * (high - low))


def _rounded(shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Rounds shares to integers with this total: down, the rest to the largest remainders."""
    keeps = {name: math.floor(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: keeps[name] - shares[name])  # stable: earlier
    for name in by_remainder[: total - sum(keeps.values())]:
        keeps[name] += 1
    return keeps


def check_given(sparsity: Sparsity | None, structure: Structure | None) -> None:
    """Raises unless there is a sparsity, or a structure that has its own."""
    if isinstance(structure, NM) and sparsity is not None:
        raise LapValueError(
            f"no {{argument}} with {{structure={structure.spelled!r}}}, which itself says how many "
            "weights are kept",
            sparsity if isinstance(sparsity, (int, float)) else type(sparsity).__name__,
            argument="sparsity",
        )
    if not isinstance(structure, NM) and sparsity is None:
        raise LapTypeError(
            "{argument}, the fraction to remove",
            "none",
            "Only an N:M structure has its own.",
            argument="sparsity",
        )
