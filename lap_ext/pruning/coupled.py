# SPDX-License-Identifier: MIT
"""Prunes units across layers: measures their worth, chooses which go, and masks their members.

What is masked are rows and columns of weights, and entries of biases and norms. A removed channel
is then exactly zero, up to what turns 0 into something else (a sigmoid, a constant that is added):
the columns that read it are zero too. Nothing here knows where weights live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lap_ext import allocation
from lap_ext._text import layer_name, matches, some
from lap_ext.allocation import Allocation, Sparsity, Target
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.ops.check import Number, keep_count
from lap_ext.pruning import pools
from lap_ext.pruning.families import FamilyResult, families_of
from lap_ext.pruning.kept_axes import KeptAxes
from lap_ext.pruning.noted import of_text, text_of
from lap_ext.pruning.patterns import by_name
from lap_ext.pruning.plan import Plan
from lap_ext.pruning.pools import Choice, Pool
from lap_ext.pruning.scoring import Scoring
from lap_ext.pruning.unit_worth import member_counts, vector_counts, worth_of
from lap_ext.topology.counting import Counter
from lap_ext.topology.coupling import CoupledGroups

_ZERO = "zero layers"  # under which the place notes them


@dataclass
class Units:
    """What is pruned in units across layers.

    Attributes:
        groups: of the model.
        sparsity: a fraction of units, of each pool by its name, or a target for the model.
        removed: the groups that go, bool, once they are chosen.
        zero: layers all of whose weights are zero: these zeros are weights.
        zeros: whether all zeros that the masks of the place keep are weights.
    """

    groups: CoupledGroups
    sparsity: Number | Mapping[str, Number] | Target
    removed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    zero: Sequence[str] = ()
    zeros: bool = False

    def families(self) -> list[FamilyResult]:
        """Counts the groups of each family that takes part."""
        return families_of(self.groups, self.removed)

    def vector_masks(self) -> dict[str, Tensor]:
        """Masks the biases, norms and the like that groups have entries of, by layer name."""
        masks = self.groups.vector_masks(self.removed)
        return {
            layer_name(name): masks.get(name, torch.ones(shape, dtype=torch.bool))
            for name, shape in self.groups.vector_shapes().items()
        }


def units_of(plan: Plan, sparsity: Sparsity | None) -> Units:
    """Checks what is asked for, before anything is measured."""
    options, groups = plan.options, plan.groups
    assert groups is not None
    if not len(groups):
        reasons = dict.fromkeys(x.reason for x in groups.fixed)
        raise LapValueError(
            f"a model with units for {{structure={groups.structure!r}}}",
            f"none: {some(reasons, 5)}",
            "See lap_ext.structures.groups(topology, structure).fixed.",
        )
    if isinstance(sparsity, Target):
        if sparsity.counted == "flops" and groups.structure == "expert":
            raise LapValueError(
                "params(...) for experts: a token uses as many of them as before",
                "flops(...)",
                argument="sparsity",
            )
        return Units(groups, sparsity)
    if isinstance(sparsity, Allocation):
        raise LapTypeError(
            "{argument} to be a number, a dict pattern -> number, allocation.flops(...) or "
            f"allocation.params(...) for {{structure={groups.structure!r}}}",
            str(sparsity),
            argument="sparsity",
        )
    if isinstance(sparsity, Mapping):
        if options.scope == "global" or options.uniform:
            other = '{scope="global"}' if options.scope == "global" else "{uniform=True}"
            raise LapTypeError(
                f"one number as {{argument}} with {other}", "a dict", argument="sparsity"
            )
        named = by_name(plan.topology, sparsity)
        allocation.of(named)  # checks it
        assert isinstance(named, Mapping)
        return Units(groups, named)
    keep_count(sparsity, None, 0)  # checks it
    assert sparsity is not None
    return Units(groups, sparsity)


def select(scoring: Scoring, units: Units, store: Any) -> dict[str, KeptAxes]:
    """Chooses in all rounds, and says how each layer is masked in the last one.

    store: sets the masks of all layers in the place, after a round that is not the last.
    """
    rounds, place = scoring.plan.options.rounds, scoring.place
    for number in range(1, rounds):
        place.round(number, partial(_round, scoring, units, number, store))
    scoring.measure(f"round {rounds}")
    text = place.noted(f"round {rounds} units", partial(_found, scoring, units, rounds))
    units.removed = of_text(text, len(units.groups))
    units.zero = place.noted(_ZERO, lambda: units.zero)
    return _selections(scoring, units, units.zero)


def _round(scoring: Scoring, units: Units, number: int, store: Any) -> None:
    """Chooses in one round and gives the place the masks."""
    scoring.measure(f"round {number}")
    text = scoring.place.noted(f"round {number} units", partial(_found, scoring, units, number))
    units.removed = of_text(text, len(units.groups))
    store(_selections(scoring, units))
    scoring.forget(scoring.plan.layers)


def _found(scoring: Scoring, units: Units, number: int) -> str:
    """Chooses the groups that are gone after a round."""
    step = scoring.step("rank", scoring.plan.layers)
    measured = worth_of(scoring, units.groups, step, units.zeros)
    if number == 1:
        units.zero = scoring.place.noted(_ZERO, lambda: measured.zero)
    options = scoring.plan.options
    cost = None if options.cost is None else cost_of(scoring, units.groups)
    choice = Choice.of(pools.pools_of(units.groups, measured, options, cost))
    _choose(scoring, units, choice, number, cost)
    if number == options.rounds:
        choice.round()
    return text_of(choice.removed(len(units.groups)))


def _choose(
    scoring: Scoring, units: Units, choice: Choice, number: int, cost: Tensor | None
) -> None:
    """Chooses as many units as the sparsity, or the target, says for a round."""
    options, sparsity = scoring.plan.options, units.sparsity
    together = options.scope == "global"
    if isinstance(sparsity, Target):
        counter = _Counted(scoring, units.groups, sparsity)
        gone = choice.removed(len(units.groups)).nonzero().flatten()
        dense, limit = counter.dense, sparsity.limit(counter.dense)
        limit = dense - (dense - limit) * number // options.rounds
        key = _worth if together else pools.by_rank
        if cost is not None and together:
            key = partial(pools.density, cost=cost)
        what = "FLOPs" if sparsity.counted == "flops" else "parameters"
        pools.choose_count(choice, limit, key, partial(counter.without, gone), what)
        return
    share = Fraction(number, options.rounds)
    if isinstance(sparsity, Mapping):
        _check_used(choice.pools, sparsity)
        given = {pool.name: _of_pool(pool, sparsity) for pool in choice.pools}
    else:
        given = dict.fromkeys((pool.name for pool in choice.pools), sparsity)
    own = {name: share * exactly(x, digits=cost is not None) for name, x in given.items()}
    if cost is None:
        pools.choose_fraction(choice, own, together)
    else:
        pools.choose_cost(choice, own, cost, together)


def exactly(sparsity: Number, *, digits: bool) -> Fraction:
    """Returns a sparsity as a fraction: a float for the double that it is, or what its digits say.

    Example:
        >>> exactly(0.3, digits=True), exactly(0.25, digits=False)
        (Fraction(3, 10), Fraction(1, 4))
    """
    if digits and isinstance(sparsity, float):
        return Fraction(repr(float(sparsity)))
    return Fraction(*sparsity.as_integer_ratio())


def _worth(pool: Pool) -> Tensor:
    return pool.worth


def _of_pool(pool: Pool, sparsity: Mapping[str, Number]) -> Number:
    """Returns the fraction of the first pattern that names one of a pool's layers."""
    return next((x for name, x in sparsity.items() if _names(pool, name)), 0.0)


def _names(pool: Pool, pattern: str) -> bool:
    return any(matches(layer, pattern) for layer in pool.layers)


def _check_used(every: Sequence[Pool], sparsity: Mapping[str, Number]) -> None:
    """Raises for a pattern that names no layer that makes units."""
    for pattern in sparsity:
        if not any(_names(pool, pattern) for pool in every):
            raise LapValueError(
                "patterns of layers that make the channels of units",
                repr(pattern),
                argument="sparsity",
            )


def cost_of(scoring: Scoring, groups: CoupledGroups) -> Tensor:
    """Returns what the model saves if one group alone goes, float64 [n]."""
    if scoring.plan.options.cost == "weights":
        return member_counts(groups).double()
    counter, ids = Counter(scoring.plan.topology), _ids_by_group(groups)
    kinds, kind = torch.unique(_alike(groups), return_inverse=True)
    first = torch.full(kinds.shape, len(groups)).scatter_reduce(
        0, kind, torch.arange(len(groups)), "amin"
    )
    costs = [counter.flops - counter.flops_without(ids[number]) for number in first.tolist()]
    return torch.tensor(costs, dtype=torch.float64)[kind]


def _alike(groups: CoupledGroups) -> Tensor:
    """Gives groups of a family with as much of every weight the same number, int64 [n]."""
    kind, count = groups.family_of.clone(), len(groups.families)
    for x in groups.weights:
        for side in (x.rows, x.cols.flatten()):
            own = torch.bincount(side + 1, minlength=len(groups) + 1)[1:]
            some = own.nonzero().flatten()
            keys = kind[some] * (side.numel() + 1) + own[some]
            values, inverse = torch.unique(keys, return_inverse=True)
            kind[some] = count + inverse
            count += values.numel()
    return kind


def _ids_by_group(groups: CoupledGroups) -> list[Tensor]:
    """Lists the channel ids of each group."""
    assert groups.ids is not None
    order = torch.argsort(groups.ids, stable=True)
    counts = torch.bincount(groups.ids + 1, minlength=len(groups) + 1).tolist()
    return list(order.split(counts))[1:]


class _Counted:
    """A count of the model without some groups.

    Attributes:
        dense: of the model with all of them.
    """

    def __init__(self, scoring: Scoring, groups: CoupledGroups, target: Target) -> None:
        self._of_flops = target.counted == "flops"
        self._ids: list[Tensor] | None = None
        if groups.ids is None:  # experts: their parameters do not overlap
            self._own = member_counts(groups) + vector_counts(groups)
            self.dense = sum(x.numel() for x in scoring.plan.topology.model.parameters())
        else:
            self._counter, self._ids = Counter(scoring.plan.topology), _ids_by_group(groups)
            self.dense = self._counter.flops if self._of_flops else self._counter.params

    def without(self, gone: Tensor, numbers: Tensor) -> int:
        """Counts what is left when groups go beside those that are gone."""
        numbers = torch.cat([gone, numbers])
        if self._ids is None:
            return self.dense - int(self._own[numbers].sum())
        if not numbers.numel():
            return self.dense
        ids = torch.cat([self._ids[i] for i in numbers.tolist()])
        counter = self._counter
        return counter.flops_without(ids) if self._of_flops else counter.params_without(ids)


def _selections(scoring: Scoring, units: Units, zero: Sequence[str] = ()) -> dict[str, KeptAxes]:
    """Says how each layer is masked; zero: layers whose zeros are weights."""
    result = {}
    for layer in scoring.plan.layers:
        zeros = units.zeros or layer.name in zero
        result[layer.name] = KeptAxes(units.groups.views(layer.parameter), units.removed, zeros)
    return result
