# SPDX-License-Identifier: MIT
"""Structures in `prune`: every one with every option, against the definition unit by unit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext import structures
from lap_ext.criteria import Wanda
from tests.helpers import structure_oracle as oracle
from tests.helpers.checkpoints import bits
from tests.helpers.pairwise import covering
from tests.helpers.structure_nets import NETS, VIEWS, built


def fives(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers groups of five weights that are not next to each other; the last one is smaller."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7 % count if count % 7 else torch.arange(count)).view(shape) // 5


def own(layer: Any) -> Tensor:
    """Scores that are not powers of the weights' scores of any other criterion."""
    return layer.weight.abs().exp() - 0.9


WAYS: dict[str, dict[str, Any]] = {
    "layer": {},
    "forward": {"order": "forward"},
    "backward": {"order": "backward", "rounds": 2},
    "rounds": {"rounds": 3},
}
GLOBAL: dict[str, dict[str, Any]] = {
    "lamp": {"scope": "global"},
    "norm": {"scope": "global", "normalize": "norm", "rounds": 2},
    "raw": {"scope": "global", "normalize": "none"},
}
CRITERIA: dict[str, Any] = {
    "lookahead": "lookahead",
    "magnitude": "magnitude",
    "wanda": "wanda",
    "random": lap_ext.criteria.Random(3),
    "function": own,
}
PARTITIONS = covering(
    {
        "structure": ["row", "column", "3x5", "2x2", "16x16", fives],
        "net": list(NETS),
        "criterion": list(CRITERIA),
        "way": [*WAYS, *GLOBAL],
        "sparsity": [0.5, 0.85, "dict"],
        "aggregate": ["energy", "mean"],
        "multiple_of": [1, 2, 3],
        "min_keep": [None, 0, 9, 0.1],
        "masks": ["zeros", "none", "given"],
    }
)
PATTERNS = covering(
    {
        "structure": ["2:4", "1:4/flat", "2:4/out", "2:4/transposable", "1:2/transposable"],
        "net": list(NETS),
        "criterion": list(CRITERIA),
        "way": list(WAYS),
        "aggregate": ["energy", "mean"],
        "masks": ["zeros", "none", "given"],
    }
)


def given(topology: lap_ext.Topology, how: str) -> dict[str, Tensor] | None:
    """The masks of an earlier pruning: None, no masks, or random ones that drop full rows too."""
    if how == "zeros":
        return None
    if how == "none":
        return {}
    found = {}
    for name, layer in topology.layers.items():
        mask = torch.rand(layer.shape) < 0.7
        mask[:: 3] = False
        found[name] = mask
    return found


def check(topology: lap_ext.Topology, want: oracle.Pruning, data: Any) -> lap_ext.PruneResult:
    """Prunes as described, and compares masks and counts with the definition."""
    scored = {} if data is None else {"data": data}
    options = {x.name: getattr(want, x.name) for x in fields(want)}
    options |= scored
    del options["views"], options["scored"]
    if callable(want.structure):
        options["structure"] = structures.Groups(want.structure)
    got = lap_ext.prune(topology.model, None, topology=topology, apply=False, **options)
    wanted = oracle.masks(topology, oracle.Pruning(**{**vars(want), "scored": scored}))
    assert list(got.masks) == list(wanted)
    for name, mask in wanted.items():
        assert torch.equal(got.masks[name], mask), name
    assert {row.name: row.kept for row in got.layers} == {k: int(x.sum()) for k, x in wanted.items()}
    return got


def drawn(case: Mapping[str, Any], **more: Any) -> tuple[lap_ext.Topology, oracle.Pruning, Any]:
    """Builds the model of a case and its options."""
    model, inputs = built(case["net"])
    topology = lap_ext.trace(model, inputs)
    criterion = CRITERIA[case["criterion"]]
    options = (WAYS | GLOBAL)[case["way"]] | {"aggregate": case["aggregate"]} | more
    if case["structure"] == "2:4/transposable":
        options["rounds"] = 1  # 3:4 in between is nearly the best only
    options["masks"] = given(topology, case["masks"])
    pruning = oracle.Pruning(case["structure"], criterion=criterion, views=VIEWS, **options)
    return topology, pruning, [inputs] if criterion == "wanda" else None


def spelled(case: Mapping[str, Any]) -> str:
    return "-".join(getattr(x, "__name__", str(x)) for x in case.values())


@pytest.mark.filterwarnings("ignore:.* does not fit some layers:UserWarning")
@pytest.mark.parametrize("case", PATTERNS, ids=spelled)
def test_patterns(case: Mapping[str, Any]) -> None:
    topology, want, data = drawn(case)
    got = check(topology, want, data)
    assert all(row.units is None for row in got.layers)


@pytest.mark.filterwarnings("ignore:.*no weight:UserWarning")
@pytest.mark.parametrize("case", PARTITIONS, ids=spelled)
def test_partitions(case: Mapping[str, Any]) -> None:
    more = {name: case[name] for name in ("sparsity", "multiple_of", "min_keep")}
    topology, want, data = drawn(case, **more)
    if case["sparsity"] == "dict":
        names = list(topology.layers)
        sparsity = dict(zip(names[::2], [0.3, 0.6, 0.8] * 2, strict=False))
        want = oracle.Pruning(**{**vars(want), "sparsity": sparsity})
    try:
        got = check(topology, want, data)
    except ValueError as error:
        assert "min_keep" in str(error) and case["way"] in GLOBAL, error
        return
    for row in got.layers:
        assert row.units is not None
        kept, count = row.units
        assert 0 <= kept <= count and (kept > 0) == (row.kept > 0)
