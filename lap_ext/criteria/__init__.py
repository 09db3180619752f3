# SPDX-License-Identifier: MIT
"""Criteria: an algorithm is only its score.

    score = |w| * in[i] * out[o], summed in squares over the roles of the weight

Each class says what w, in and out are. What they are computed from (lookahead factors, statistics
of activations, gradients) is elsewhere. A criterion of your own is a function of a layer that
returns scores of its weight's shape, larger: kept first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lap_ext._text import did_you_mean
from lap_ext.criteria.base import Criterion as Criterion
from lap_ext.criteria.base import Factors as Factors
from lap_ext.criteria.data import OBD as OBD
from lap_ext.criteria.data import LookaheadAct as LookaheadAct
from lap_ext.criteria.data import OBDLookahead as OBDLookahead
from lap_ext.criteria.data import Wanda as Wanda
from lap_ext.criteria.data import WeightGradient as WeightGradient
from lap_ext.criteria.weights import Custom as Custom
from lap_ext.criteria.weights import Lookahead as Lookahead
from lap_ext.criteria.weights import Lookback as Lookback
from lap_ext.criteria.weights import Lookforward as Lookforward
from lap_ext.criteria.weights import MagnitudeBN as MagnitudeBN
from lap_ext.criteria.weights import Random as Random

REGISTRY: dict[str, Callable[[], Criterion]] = {
    kind.name: kind
    for kind in (
        Criterion,
        MagnitudeBN,
        Random,
        Lookahead,
        Lookforward,
        Lookback,
        LookaheadAct,
        Wanda,
        WeightGradient,
        OBD,
        OBDLookahead,
    )
}


def of(criterion: Any, function: str) -> Criterion:
    """The criterion of a name, an instance or a user's function."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        if criterion not in REGISTRY:
            text = (
                f"{function}: expected criterion to be one of {', '.join(sorted(REGISTRY))}, a "
                f"Criterion or a function, got {criterion!r}. {did_you_mean(criterion, REGISTRY)}"
            )
            raise ValueError(text.rstrip())
        return REGISTRY[criterion]()
    if callable(criterion):
        return Custom(criterion)
    raise TypeError(
        f"{function}: expected criterion to be a name, a Criterion or a function of a layer, got "
        f"{type(criterion).__name__}."
    )
