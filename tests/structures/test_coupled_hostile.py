# SPDX-License-Identifier: MIT
"""Structures across layers where it gets hard: an exact result, or an error that says why."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import lap_ext
from lap_ext import allocation
from lap_ext.errors import LapError, LapTypeError, LapValueError
from lap_ext.structures import Coupled
from tests.helpers.networks import Net
from tests.helpers.unit_nets import mlp

ROW = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def test_a_group_of_one_stays() -> None:
    for how in ({}, {"scope": "global"}, {"cost": "weights"}, {"rounds": 2}, {"uniform": True}):
        model = mlp(4, 1, 3)
        result = lap_ext.prune(model, ROW, 0.9, structure="channel", **how)
        assert [(x.kept, x.total) for x in result.families] == [(1, 1)]
        assert bool(model[0].weight.all())


def test_of_two_units_one_stays() -> None:
    model = mlp(4, 2, 3)
    result = lap_ext.prune(model, ROW, 1.0, structure="channel")
    assert [x.kept for x in result.families] == [1]
    result = lap_ext.prune(mlp(4, 2, 3), ROW, 1.0, structure="channel", min_keep=0)
    assert [x.kept for x in result.families] == [0]


def test_everything_that_is_coupled_to_the_output_is_named() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return y + m.b(F.relu(y))

    model = Net(rule, a=nn.Linear(4, 6), b=nn.Linear(6, 6))
    with pytest.raises(LapValueError, match="an output of the model"):
        lap_ext.prune(model, ROW, 0.5, structure="channel")
    fixed = lap_ext.structures.groups(lap_ext.trace(model, ROW)).fixed
    assert {(x.layer, x.channels, x.reason) for x in fixed} == {
        ("a", 6, "an output of the model"),
        ("b", 6, "an output of the model"),
    }


def test_a_norm_over_channels_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    with pytest.raises(LapValueError, match="reads all channels at once"):
        lap_ext.prune(model, ROW, 0.5, structure="channel")


def test_a_channel_that_is_read_twice_goes_once() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(torch.cat([y, y], 1)) + m.c(y)

    model = Net(rule, a=nn.Linear(4, 6), b=nn.Linear(12, 3), c=nn.Linear(6, 3)).double()
    result = lap_ext.prune(model, ROW.double(), 0.5, structure="channel")
    assert [(x.kept, x.total) for x in result.families] == [(3, 6)]
    gone = ~result.masks["a"].any(1)
    assert torch.equal(~result.masks["b"].any(0), gone.repeat(2))
    assert torch.equal(~result.masks["c"].any(0), gone)
    expected = model(ROW.double())
    with torch.no_grad():
        model.a.weight[gone] = 3.0
        model.a.bias[gone] = -1.0
    torch.testing.assert_close(model(ROW.double()), expected, rtol=0, atol=1e-12)


def test_a_weight_that_two_families_share() -> None:
    """Both ends of one weight: its rows in one group, its columns in another."""

    def rule(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.b(F.relu(m.a(x))))
        z = F.relu(m.d(F.relu(m.c(x))))
        return m.out(y) + m.out(z)

    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 5), "c": nn.Linear(4, 6)}
    model = Net(rule, **layers, d=nn.Linear(6, 5), out=nn.Linear(5, 2))
    model.d.weight = model.b.weight
    model = model.double()
    result = lap_ext.prune(model, ROW.double(), 0.5, structure="channel")
    gone = ~result.masks["a"].any(1)
    assert torch.equal(gone, ~result.masks["c"].any(1))
    assert torch.equal(gone, ~result.masks["b"].any(0))
    ends = ~result.masks["b"].any(1)
    assert torch.equal(ends, ~result.masks["out"].any(0))
    assert torch.equal(model.b.bias == 0, ends)
    assert torch.equal(model.d.bias == 0, ends)
    expected = model(ROW.double())
    with torch.no_grad():
        for layer, rows in ((model.a, gone), (model.c, gone)):
            layer.weight[rows] = 3.0
            layer.bias[rows] = -1.0
    torch.testing.assert_close(model(ROW.double()), expected, rtol=0, atol=1e-12)


def test_shapes_that_the_trace_did_not_see() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    ).eval()
    result = lap_ext.prune(model, torch.randn(2, 3, 8, 8), 0.5, structure="channel")
    gone = ~result.masks["0"].flatten(1).any(1)
    x = torch.randn(5, 3, 13, 9)
    expected = model(x)
    with torch.no_grad():
        model[0].weight[gone] = 2.0
        model[1].bias[gone] = 2.0
    torch.testing.assert_close(model(x), expected)


def test_an_empty_batch_can_be_traced() -> None:
    result = lap_ext.prune(mlp(4, 6, 3), torch.zeros(0, 4), 0.5, structure="channel")
    assert [x.kept for x in result.families] == [3]


@pytest.mark.parametrize(("structure", "match"), [
    ("head", "it is in no head of an attention"), ("expert", "it belongs to no expert"),
])  # fmt: skip
def test_a_model_without_such_units(structure: str, match: str) -> None:
    with pytest.raises(LapValueError, match=match) as error:
        lap_ext.prune(mlp(4, 6, 3), ROW, 0.5, structure=structure)
    assert "an output of the model" in str(error.value) or structure == "expert"
    assert f"structure='{structure}'" in str(error.value)


def test_a_model_without_layers() -> None:
    with pytest.raises(LapError):
        lap_ext.prune(nn.Sequential(nn.ReLU()), ROW, 0.5, structure="channel")


def test_weights_that_a_parametrization_computes() -> None:
    model = mlp(4, 6, 5, 3)
    model[2] = parametrizations.weight_norm(model[2])
    model = model.double()
    result = lap_ext.prune(model, ROW.double(), 0.5, structure="channel")
    assert [x.kept for x in result.families] == [3, 3]
    first, second = ~result.masks["0"].any(1), ~model[2].weight.any(1)
    assert int(first.sum()) == 3
    assert int(second.sum()) == 2
    assert not bool(model[2].weight[:, first].any())
    assert not bool(model[2].bias[second].any())
    assert not result.masks.check(model)
    y = F.relu(model[2](F.relu(model[0](ROW.double()))))
    assert not bool(y[:, second].any())


def test_weights_that_torch_prune_masks_stay_pruned() -> None:
    model = mlp(4, 6, 5, 3)
    torch_prune.ln_structured(model[2], "weight", 2, 2, dim=0)
    dead = ~model[2].weight.any(1)
    assert int(dead.sum()) == 2
    result = lap_ext.prune(model, ROW, 0.5, structure="channel")
    assert [x.kept for x in result.families] == [3, 3]
    model(ROW)
    assert not bool(model[2].weight[dead].any())
    assert not result.masks.check(model)


def test_layers_of_size_zero() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mlp(4, 6, 0, 3)
    result = lap_ext.prune(model, ROW, 0.5, structure="channel", criterion="magnitude")
    assert [(x.kept, x.total) for x in result.families] == [(3, 6)]


def test_a_weight_that_is_not_a_number_is_an_error_and_nothing_changes() -> None:
    for value in (float("nan"), float("inf")):
        model = mlp(4, 6, 5, 3)
        with torch.no_grad():
            model[2].weight[1, 2] = value
        before = copy.deepcopy(model.state_dict())
        for how in ({}, {"criterion": "magnitude"}, {"aggregate": "exact"}):
            with pytest.raises(LapValueError, match="finite"):
                lap_ext.prune(model, ROW, 0.5, structure="channel", **how)
        for name, x in model.state_dict().items():
            torch.testing.assert_close(x, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_bias_that_is_not_a_number_does_not_matter() -> None:
    model = mlp(4, 6, 5, 3)
    with torch.no_grad():
        model[0].bias[:] = float("nan")
    result = lap_ext.prune(model, ROW, 0.5, structure="channel")
    gone = ~result.masks["0"].any(1)
    assert not bool(model[0].bias[gone].any())  # masked, not multiplied


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = mlp(4, 6, 3)
    with pytest.raises(LapValueError, match="meta"):
        lap_ext.prune(model, torch.randn(2, 4, device="meta"), 0.5, structure="channel")


@pytest.mark.parametrize("wrong", ["chanel", "heads", "Channel", "channels", "", "experts"])
def test_no_such_structure(wrong: str) -> None:
    with pytest.raises(LapValueError, match="'channel'"):
        lap_ext.prune(mlp(4, 6, 3), ROW, 0.5, structure=wrong)
    with pytest.raises(LapValueError, match="'channel'"):
        Coupled(wrong)  # type: ignore[arg-type]
    with pytest.raises(LapValueError, match="channel"):
        lap_ext.structures.groups(lap_ext.trace(mlp(4, 6, 3), ROW), wrong)  # type: ignore[arg-type]
    with pytest.raises(LapTypeError, match="trace"):
        lap_ext.structures.groups(mlp(4, 6, 3), "channel")  # type: ignore[type-var]


@pytest.mark.parametrize(("how", "match"), [
    ({"order": "forward"}, "order='parallel'"),
    ({"order": "backward"}, "order='parallel'"),
    ({"aggregate": "median"}, "aggregate"),
    ({"multiple_of": 0}, "multiple_of"),
    ({"cost": "time"}, "cost"),
    ({"uniform": 1}, "uniform"),
    ({"strict": "yes"}, "strict"),
    ({"min_keep": -1}, "min_keep"),
    ({"min_keep": 1.5}, "min_keep"),
    ({"rounds": 0}, "rounds"),
    ({"criterion": "reap"}, "structure='expert'"),
    ({"criterion": "minitron"}, "structure='head'"),
    ({"aggregate": "exact", "criterion": "random"}, "exact"),
    ({"neighbors": {"x": None}}, "x"),
])  # fmt: skip
def test_options_that_do_not_fit(how: dict[str, Any], match: str) -> None:
    model = mlp(4, 6, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LapError, match=match):
        lap_ext.prune(model, ROW, 0.5, structure="channel", **how)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("how", [{"cost": "weights"}, {"uniform": True}])
@pytest.mark.parametrize("structure", [None, "row", "2:4", "4x4"])
def test_options_of_structures_across_layers_alone(structure: Any, how: dict[str, Any]) -> None:
    sparsity = None if structure == "2:4" else 0.5
    with pytest.raises(LapValueError, match="a structure across layers"):
        lap_ext.prune(mlp(4, 6, 3), ROW, sparsity, structure=structure, **how)


def test_experts_and_flops() -> None:
    for how in ({"cost": "flops"}, {}):
        with pytest.raises(LapValueError):
            lap_ext.prune(mlp(4, 6, 3), ROW, allocation.flops(0.5), structure="expert", **how)


def test_exact_worth_is_what_the_neighborhood_loses() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    worth = model[1].weight.norm(dim=0) * model[0].weight.norm(dim=1)
    result = lap_ext.prune(model, ROW.double(), 0.5, structure="channel", aggregate="exact")
    assert torch.equal(result.masks["0"].any(1), worth >= worth.sort().values[3])


def test_a_target_of_more_than_there_is() -> None:
    for make in (allocation.params, allocation.flops):
        with pytest.raises(LapValueError, match="dense model"):
            lap_ext.prune(mlp(4, 6, 3), ROW, make(10**6), structure="channel")
