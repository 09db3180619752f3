# SPDX-License-Identifier: MIT
"""Pruner with structures: patterns reached in part, whole units, states of both.

The oracle is the definition: of every M weights floor(sparsity * M) are gone; a unit is kept as a
whole or not at all.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.pruning.pruner import Pruner
from lap_ext.schedule import cubic, linear, one_shot
from lap_ext.structures import Groups
from tests.helpers import masked_network as cases
from tests.helpers.pruner_training import EXAMPLE, train

GROUPS = {"fc2": torch.arange(24).reshape(3, 8) % 5, "fc1": torch.arange(512).reshape(8, 64) // 7}


def moments_are_zero(model: nn.Module, optimizer: Any, masks: lap_ext.Masks) -> None:
    for layer, mask in masks.items():
        state = optimizer.state[model.get_parameter(f"{layer}.weight")]
        moments = [v for v in state.values() if isinstance(v, Tensor) and v.dim()]
        assert moments and all(not m[~mask].any() and m[mask].any() for m in moments)


def test_a_pattern_is_reached_step_by_step_and_kept_in_training() -> None:
    model = cases.net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = cubic(0.5, start=1, end=5, every=1)
    pruner = Pruner(model, EXAMPLE, schedule, optimizer=optimizer, structure="2:4", exclude="conv")
    before = {name: torch.ones(8, 64, dtype=torch.bool) for name in ("fc1",)}
    found = []
    for step in range(7):
        train(model, optimizer, 1, pruner)
        sparsity = schedule(step)
        if sparsity is not None:
            keep = 4 - math.floor(sparsity * 4)
            for mask in pruner.masks.values():
                assert (mask.reshape(-1, 4).sum(1) == keep).all()
            assert pruner.masks.structure == f"{keep}:4"
            assert pruner.result is not None and pruner.result.structure == f"{keep}:4"
            found.append(keep)
        if pruner.masks:
            assert not (pruner.masks["fc1"] & ~before["fc1"]).any(), "a weight came back"
            before = dict(pruner.masks)
            moments_are_zero(model, optimizer, pruner.masks)
    assert found[-1] == 2 and 3 in found


@pytest.mark.parametrize("structure", ["row", "column", "4x4", Groups(GROUPS)], ids=str)
def test_units_go_as_a_whole_and_stay_away(structure: Any) -> None:
    model = cases.net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = linear(0.6, start=0, end=4, every=2)
    pruner = Pruner(
        model, EXAMPLE, schedule, optimizer=optimizer, structure=structure, exclude="conv"
    )
    for step in range(6):
        train(model, optimizer, 1, pruner)
        sparsity = schedule(step)
        if sparsity is None:
            continue
        assert pruner.result is not None
        for row in pruner.result.layers:
            units = whole_units(str(structure), row.name, pruner.masks[row.name])
            assert row.units == (sum(map(bool, units)), len(units))
            assert row.kept <= math.floor((1 - sparsity) * row.total + 0.5) or row.units[0] == 1
        moments_are_zero(model, optimizer, pruner.masks)
    assert pruner.masks.structure == str(structure)
    table = str(pruner.result).splitlines()
    fc1 = pruner.result.layers[0].units
    assert fc1 is not None and table[2].endswith(f"{fc1[0]} of {fc1[1]}")


def whole_units(structure: str, name: str, mask: Tensor) -> list[bool]:
    """Whether each unit is kept; none is kept in part."""
    rows, cols = mask.shape
    parts = {
        "row": lambda: [mask[i] for i in range(rows)],
        "column": lambda: [mask[:, i] for i in range(cols)],
        "4x4": lambda: [
            mask[i : i + 4, j : j + 4] for i in range(0, rows, 4) for j in range(0, cols, 4)
        ],
        "groups": lambda: [mask[GROUPS[name] == n] for n in range(int(GROUPS[name].max()) + 1)],
    }[structure]()
    assert all(bool(part.all()) or not bool(part.any()) for part in parts)
    return [bool(part.any()) for part in parts]


# --- states ---------------------------------------------------------------------------------------


SCHEDULE = linear(0.5, start=0, end=3)


def pruner_of(model: nn.Module, schedule: Any = SCHEDULE, **options: Any) -> Pruner:
    return Pruner(model, EXAMPLE, schedule, exclude="conv", **options)


@pytest.mark.parametrize("structure", [None, "2:4", "row", Groups(GROUPS)], ids=str)
@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_loaded_state_goes_on(structure: Any, steps: int) -> None:
    model, other = cases.net(), cases.net()
    pruner = pruner_of(model, structure=structure)
    for _ in range(steps):
        pruner.step()
    other.load_state_dict(model.state_dict())
    again = pruner_of(other, structure=structure)
    again.load_state_dict(pruner.state_dict())
    assert again.masks == pruner.masks and again.masks.structure == pruner.masks.structure
    for one in (pruner, again):
        one.step()
    assert again.masks == pruner.masks and again.masks.structure == pruner.masks.structure
    counts = [x and x.to_json() for x in (pruner.result, again.result)]
    assert counts[0] == counts[1] is not None


CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "structure": ({"structure": "row"}, {}, "structure: row in the state, none here"),
    "pattern": ({}, {"structure": "2:4"}, "structure: none in the state, 2:4 here"),
    "aggregate": (
        {"structure": "row", "aggregate": "mean"},
        {"structure": "row"},
        "aggregate: mean in the state, energy here",
    ),
    "multiple_of": (
        {"structure": "row"},
        {"structure": "row", "multiple_of": 2},
        "multiple_of: 1 in the state, 2 here",
    ),
    "groups": (
        {"structure": Groups(GROUPS)},
        {"structure": Groups(GROUPS | {"fc2": torch.zeros(3, 8, dtype=torch.int64)})},
        "structure: groups ",
    ),
}


@pytest.mark.parametrize("name", list(CHANGED))
def test_the_state_of_another_structure(name: str) -> None:
    then, now, difference = CHANGED[name]
    first = pruner_of(cases.net(), one_shot(0.5), **then)
    first.step()
    pruner = pruner_of(cases.net(), one_shot(0.5), **now)
    with pytest.raises(ValueError, match="differs in 1") as caught:
        pruner.load_state_dict(first.state_dict())
    assert difference in str(caught.value) and not pruner.masks
    state = first.state_dict()
    del state["options"]
    pruner.load_state_dict(state)
    assert pruner.masks == first.masks and pruner.masks.structure == first.masks.structure


def test_a_state_from_before_there_were_structures() -> None:
    first = pruner_of(cases.net())
    first.step()
    old = first.state_dict()
    for name in ("structure", "aggregate", "multiple_of"):
        del old["options"][name]
    del old["structure"]
    pruner = pruner_of(cases.net())
    pruner.load_state_dict(old)
    assert pruner.masks == first.masks
    with pytest.raises(ValueError, match="structure: none in the state, row here"):
        pruner_of(cases.net(), structure="row").load_state_dict(old)


@pytest.mark.parametrize("structure", ["2:4:8", 3])
def test_a_state_of_no_structure_changes_nothing(structure: Any) -> None:
    first = pruner_of(cases.net())
    first.step()
    pruner = pruner_of(cases.net())
    with pytest.raises((ValueError, TypeError), match="expected structure to be"):
        pruner.load_state_dict(first.state_dict() | {"structure": structure})
    assert not pruner.masks and pruner.result is None


@pytest.mark.parametrize(
    ("sparsity", "got"), [(0.75, "got 0.75"), ({"fc1": 0.5}, "got one for each layer")]
)
def test_more_than_a_pattern_removes_is_refused(sparsity: Any, got: str) -> None:
    model = cases.net()
    before = model.fc1.weight.clone()
    pruner = pruner_of(model, lambda step: sparsity, structure="2:4")
    with pytest.raises(ValueError, match=r"a sparsity of at most 0\.5, which 2:4") as caught:
        pruner.step()
    assert got in str(caught.value)
    assert torch.equal(model.fc1.weight, before) and not pruner.masks


def test_layers_that_a_pattern_does_not_fit_stay_dense() -> None:
    with pytest.warns(UserWarning, match="2:4 does not fit some layers, which stay dense: 'conv'"):
        pruner = Pruner(cases.net(), EXAMPLE, one_shot(0.5), structure="2:4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pruner.step()
    assert result is not None and list(result.masks) == ["fc1", "fc2"]
    assert result.notes()[0] == (
        "The structure does not fit: 'conv' (2:4: 4 does not divide its 1 inputs)."
    )
    assert "units" not in str(result) and "units" not in result._repr_html_()
