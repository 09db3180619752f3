# SPDX-License-Identifier: MIT
"""The state of a pruner as plain data, and the check that a pruner could have reached it.

    step       how often Pruner.step was called
    masks      layer name -> one bit per weight
    structure  of the masks, or None
    layers     name of every layer of the model -> its shape
    options    what decides a pruning besides the schedule
    prunings   [step, sparsity] of every pruning so far

A schedule is any function of the step, so there is no name to compare. It is asked about the steps
so far instead: it must prune at those of the state, to the same sparsities, and at no other. What
it says of later steps does not matter to the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lap_ext._text import lines, some
from lap_ext.allocation import Allocation, Sparsity, Target, notation
from lap_ext.criteria import Criterion
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.masks import unpack
from lap_ext.pruning.plan import Plan
from lap_ext.structures import Groups

Schedule: TypeAlias = Callable[[int], Sparsity | None]
Pruning: TypeAlias = list[Any]  # [step, sparsity as described]

SCANNED = 10_000_000  # steps that a schedule is asked about at most: seconds
LISTED = 10  # of many differences, errors list the first ones
_LATER = {  # options of older states
    "structure": None,
    "aggregate": "energy",
    "multiple_of": 1,
    "cost": None,
    "uniform": False,
}
_CLOSE = 1e-9  # of two sparsities: a power may differ in its last bit on another machine


def options_of(plan: Plan) -> dict[str, Any]:
    """Describes the options of a plan, and its layers, by plain values."""
    names = ("scope", "normalize", "order", "rounds", "batch_norm", "residual", "min_keep")
    return {
        "criterion": _described_criterion(plan.criterion),
        **{name: getattr(plan.options, name) for name in names},
        "structure": _described_structure(plan),
        "aggregate": plan.options.aggregate,
        "multiple_of": plan.options.multiple_of,
        "cost": plan.options.cost,
        "uniform": plan.options.uniform,
        "layers": [layer.name for layer in plan.layers],
    }


def _described_structure(plan: Plan) -> str | None:
    """Describes a structure by its text, and the groups that a user gives by a checksum."""
    structure = plan.options.structure
    if not isinstance(structure, Groups):
        return None if structure is None else structure.spelled
    digest = blake2b(digest_size=16)
    for layer in plan.layers:
        numbers = structure.numbers(layer.name, layer.shape)
        data = bytearray(numbers.nbytes)
        if data:
            torch.frombuffer(data, dtype=numbers.dtype).copy_(numbers)
        digest.update(data)
    return f"{structure.spelled} {digest.hexdigest()}"


def _described_criterion(criterion: Criterion) -> str:
    """Describes a criterion by its name and its plain fields: random(seed=1)."""
    values = ((field.name, getattr(criterion, field.name)) for field in fields(criterion))
    plain = [f"{name}={x!r}" for name, x in values if isinstance(x, bool | int | float | str)]
    return f"{criterion.name}({', '.join(plain)})" if plain else criterion.name


def described(sparsity: Sparsity) -> float | str:
    """Describes a sparsity: a number as it is, a dict or an allocation by its text.

    Example:
        >>> described(0.5), described({"fc*": 0.5}), described(notation.of_texts(["erk:0.9"]))
        (0.5, 'fc*=0.5', 'erk:0.9')
    """
    if not isinstance(sparsity, Mapping | Allocation | Target):
        return float(sparsity)
    # the repr of every object tells where it lies in memory
    anonymous = type(sparsity).__repr__ is object.__repr__
    return type(sparsity).__name__ if anonymous else notation.text_of(sparsity)


def prunings_of(schedule: Schedule, step: int, known: Sequence[Pruning]) -> list[Pruning]:
    """Asks a schedule what it would have pruned before a step.

    Args:
        schedule: of the pruner.
        step: the steps from 0 to the one before it are asked about; if there are very many, the
            last of them.
        known: prunings whose steps are asked about in any case.
    """
    first = max(0, step - SCANNED)
    steps = [*(at for at, _ in known if at < first), *range(first, step)]
    asked = ((at, schedule(at)) for at in steps)
    return [[at, described(sparsity)] for at, sparsity in asked if sparsity is not None]


def unpacked(
    state: Mapping[str, Any], layers: Mapping[str, list[int]]
) -> tuple[int, dict[str, Tensor], list[Pruning] | None]:
    """Checks the parts of a state, and that it is of these layers: (step, masks, prunings)."""
    _check_parts(state)
    saved = {
        name: list(shape) if isinstance(shape, Sequence) else shape
        for name, shape in state["layers"].items()
    }
    differing = [
        f"{name!r}: {saved.get(name, 'none')} in the state, {layers.get(name, 'none')} here"
        for name in {**layers, **saved}
        if saved.get(name) != layers.get(name)
    ]
    if differing:
        raise LapValueError(
            "the state of a pruner of the same layers",
            f"one that differs in {len(differing)}",
            f"Build the model as it was then.{lines(differing, LISTED)}",
        )
    step, bits = state.get("step"), state["masks"]
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 63:
        huge = isinstance(step, int) and step > 0  # not its digits: there may be too many to print
        raise LapValueError(
            "step to be a whole number >= 0", "a larger one" if huge else repr(step)
        )
    for name, packed in bits.items():
        if name not in layers or not _is_packed(packed, math.prod(layers[name])):
            plain = not isinstance(packed, Tensor)
            kind = type(packed).__name__ if plain else f"{packed.dtype} {list(packed.shape)}"
            raise LapValueError(
                "one bit per weight of layers of the model",
                f"{kind} for {name!r}",
                "The state is damaged.",
            )
    masks = {name: unpack(x, tuple(layers[name])) for name, x in bits.items()}
    return step, masks, _prunings(state.get("prunings"), step)


def _check_parts(state: Mapping[str, Any]) -> None:
    """Raises unless a state has parts of the right kinds."""
    if not (
        isinstance(state, Mapping)
        and all(isinstance(state.get(name), Mapping) for name in ("masks", "layers"))
        and isinstance(state.get("options", {}), Mapping)
        and isinstance(state.get("prunings", []), list)
    ):
        got: object = type(state).__name__
        if isinstance(state, Mapping):
            got = {name: type(x).__name__ for name, x in list(state.items())[:LISTED]}
        raise LapTypeError("what Pruner.state_dict returned (step, masks and layers)", got)


def _is_packed(x: object, count: int) -> bool:
    """Tells whether x can be the bits of a mask of count weights."""
    return isinstance(x, Tensor) and x.dtype == torch.uint8 and list(x.shape) == [(count + 7) // 8]


def _prunings(given: list[Any] | None, step: int) -> list[Pruning] | None:
    """Checks that prunings are pairs of a step before this one and a sparsity, in order."""
    if given is None:
        return None
    last = -1
    for pair in given:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and type(pair[0]) is int
            and last < pair[0] < step
            and isinstance(pair[1], float | str)
        ):
            raise LapValueError(
                f"prunings to be pairs of a step before {step} and a sparsity, in order",
                repr(pair)[:100],
                "The state is damaged.",
            )
        last = pair[0]
    return [list(pair) for pair in given]


def check_options(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises unless a state has the options of this pruner."""
    theirs = {**_LATER, **theirs}
    differing = [
        f"{name}: {_shown(theirs.get(name))} in the state, {_shown(mine.get(name))} here"
        for name in {**mine, **theirs}
        if theirs.get(name) != mine.get(name)
    ]
    if differing:
        raise LapValueError(
            "the state of a pruner with the same options",
            f"one that differs in {len(differing)}",
            "Make the pruner with the options of then; or, to continue with others on purpose, "
            f"remove 'options' from the state.{lines(differing, LISTED)}",
        )


def check_prunings(theirs: Sequence[Pruning], mine: Sequence[Pruning], step: int) -> None:
    """Raises unless two schedules, a state's and this pruner's, agree on the steps so far."""
    then, now = dict(map(tuple, theirs)), dict(map(tuple, mine))
    differing = [
        f"step {at}: {_shown(then.get(at))} in the state, {_shown(now.get(at))} by this schedule"
        for at in sorted({*then, *now})
        if not _are_same(then.get(at), now.get(at))
    ]
    if differing:
        raise LapValueError(
            "the state of a pruner with the same schedule (the same sparsity at each of the "
            f"{step} steps so far)",
            f"one that differs at {len(differing)}",
            "Make the pruner with the schedule of then; or, to continue by another one on purpose, "
            f"remove 'prunings' from the state.{lines(differing, LISTED)}",
        )


def _are_same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_CLOSE, abs_tol=_CLOSE)
    return one == other


def _shown(value: object) -> str:
    if isinstance(value, list):
        return some(map(str, value), LISTED)
    return "none" if value is None else str(value)[:100]
