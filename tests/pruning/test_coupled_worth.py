# SPDX-License-Identifier: MIT
"""The worth of units across layers, against sets of single weights in plain Python.

The scores come from `lap_ext.scores`, and which weights a unit has from `groups[i].members`. Each
weight of a unit counts once, also where the unit has both its row and its column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lap_ext
from lap_ext.places import Memory
from lap_ext.pruning import pipeline
from lap_ext.pruning.plan import checked_masks, options_of, plan_of
from lap_ext.pruning.unit_worth import member_counts, worth_of
from tests.helpers import unit_oracle as oracle
from tests.helpers.cut_place import Cut, Cuts, every_row, ragged
from tests.helpers.unit_nets import KINDS, NETS, bound, mlp

DATA_FREE = ("lookahead", "lookforward", "lookback", "magnitude", "magnitude_bn", "random")
CASES = [(name, kind) for name in NETS for kind in KINDS.get(name, ("channel",))]


def measured(
    topology: lap_ext.Topology,
    kind: str,
    criterion: Any = "lookahead",
    aggregate: Any = "energy",
    masks: Mapping[str, Tensor] | None = None,
    cuts: Cuts | None = None,
) -> Any:
    """The worth of all groups as pruning measures it, and which of them are alive.

    cuts: where chunks of weights begin; None: the model is in memory.
    """
    options = options_of(criterion, structure=kind, aggregate=aggregate)
    plan = plan_of(topology, options)
    kept = checked_masks(topology, masks)
    place = Memory(topology, kept) if cuts is None else Cut(topology, cuts, masks=kept)
    scoring = pipeline.scoring_of(plan, place, None, None, raw=True)
    scoring.measure("round 1")
    return worth_of(scoring, plan.groups, scoring.step("rank", plan.layers))


def expected(
    topology: lap_ext.Topology,
    kind: str,
    criterion: Any = "lookahead",
    aggregate: str = "energy",
    masks: Mapping[str, Tensor] | None = None,
) -> list[float]:
    """The same by the definition."""
    how: Any = {"topology": topology, "layers": "*", "by": "parameter", "masks": masks}
    scores = lap_ext.scores(topology.model, None, criterion, **how)
    names = {x.parameter: x.name for x in topology.layers.values()}
    live = {}
    for parameter, name in names.items():
        live[parameter] = topology.layers[name].weight.detach() != 0
        if masks and name in masks:
            live[parameter] &= masks[name]
    groups = topology.groups(kind)
    return [oracle.worth(x, topology.model, scores, aggregate, live) for x in groups]


def agree(got: Tensor, wanted: list[float], rtol: float = 1e-6) -> None:
    """Two lists of worths, relative to each and to the largest."""
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=rtol, atol=0)


@pytest.mark.parametrize("aggregate", ["energy", "mean"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_worth_is_that_of_the_single_weights(name: str, kind: str, aggregate: str) -> None:
    topology = bound(name)
    worth = measured(topology, kind, aggregate=aggregate)
    assert bool(worth.alive.all())
    agree(worth.worth, expected(topology, kind, aggregate=aggregate))


@pytest.mark.parametrize("criterion", [x for x in DATA_FREE if x != "lookahead"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_criterion_without_data(name: str, kind: str, criterion: str) -> None:
    topology = bound(name, zeros=0.3)
    agree(
        measured(topology, kind, criterion, "mean").worth,
        expected(topology, kind, criterion, "mean"),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_dtypes(name: str, kind: str, dtype: torch.dtype) -> None:
    topology = bound(name, zeros=0.2, dtype=dtype)
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    agree(measured(topology, kind).worth, expected(topology, kind), rtol)


@pytest.mark.parametrize("aggregate", ["energy", "mean"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_weights_of_an_earlier_pruning_do_not_count(name: str, kind: str, aggregate: str) -> None:
    topology = bound(name, zeros=0.2)
    masks = {x.name: torch.rand(x.shape) < 0.6 for x in topology.layers.values()}
    for layer in list(masks)[::2]:
        del masks[layer]
    agree(
        measured(topology, kind, aggregate=aggregate, masks=masks).worth,
        expected(topology, kind, aggregate=aggregate, masks=masks),
    )


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_counts_of_members(name: str, kind: str) -> None:
    topology = bound(name)
    layers = {x.parameter: Tensor() for x in topology.layers.values()}
    groups = topology.groups(kind)
    wanted = [len(oracle.scored(x, topology.model, layers)) for x in groups]
    assert member_counts(groups).tolist() == wanted


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_masks_remove_the_members_and_nothing_else(name: str, kind: str) -> None:
    topology = bound(name)
    groups = topology.groups(kind)
    removed = torch.rand(len(groups)) < 0.5
    wanted = set[oracle.Weight]()
    for group in groups:
        if removed[group.number]:
            wanted |= oracle.weights_of(group, topology.model)
    assert oracle.covered(groups.masks(removed)) == wanted


@pytest.mark.parametrize("cuts", [every_row, ragged])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_same_bits_in_chunks(name: str, kind: str, cuts: Cuts) -> None:
    topology = bound(name, zeros=0.2)
    for aggregate in ("energy", "mean"):
        whole = measured(topology, kind, aggregate=aggregate)
        cut = measured(topology, kind, aggregate=aggregate, cuts=cuts)
        assert whole.worth.tolist() == cut.worth.tolist()
        assert whole.alive.tolist() == cut.alive.tolist()


def test_a_group_is_dead_only_without_a_weight_that_may_be_kept() -> None:
    topology = bound("mlp")
    first, second = (topology.layers[name].weight.data for name in ("0", "2"))
    first[2] = 0
    second[:, 2] = 0
    first[3] = 0
    second[1:, 3] = 0  # one weight is left
    alive = measured(topology, "channel").alive
    assert (~alive).nonzero().flatten().tolist() == [2]


def test_a_function_of_a_layer_scores_units() -> None:
    topology = bound("residual")

    def own(layer: Any) -> Tensor:
        return layer.weight.abs().exp()

    agree(measured(topology, "channel", own).worth, expected(topology, "channel", own))


@settings(max_examples=12)  # each traces a model
@given(
    widths=st.lists(st.integers(1, 12), min_size=3, max_size=5),
    zeros=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_any_widths(widths: list[int], zeros: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = mlp(*widths)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(torch.rand_like(x) >= zeros)
    topology = lap_ext.trace(model, torch.randn(2, widths[0]))
    groups = topology.groups("channel")
    if min(widths[1:-1]) > 1:
        assert len(groups) == sum(widths[1:-1])
    if len(groups):
        for aggregate in ("energy", "mean"):
            agree(
                measured(topology, "channel", aggregate=aggregate).worth,
                expected(topology, "channel", aggregate=aggregate),
            )
