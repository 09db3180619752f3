# SPDX-License-Identifier: MIT
"""A copy of a pruner belongs to the copy of its model, or is an error that says how to make one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext.pruning.pruner import Pruner
from tests.helpers import masked_network as cases
from tests.helpers.pruner_training import EXAMPLE, train

SCHEDULE = lap_ext.schedule.cubic(0.8, start=0, end=6, every=2)


def pruner_of(model: nn.Module) -> tuple[Any, Pruner]:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    return optimizer, Pruner(model, EXAMPLE, SCHEDULE, optimizer=optimizer)


@pytest.mark.parametrize("steps", [0, 3], ids=["before", "between prunings"])
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_copy_with_its_model_trains_on_as_the_original(first: str, steps: int) -> None:
    model = cases.net()
    optimizer, pruner = pruner_of(model)
    train(model, optimizer, steps, pruner)
    if first == "model":
        twin, other, again = copy.deepcopy((model, optimizer, pruner))
    else:
        other, twin, again = copy.deepcopy((optimizer, model, pruner))
    assert again.topology.model is twin and again.masks == pruner.masks
    assert repr(again) == repr(pruner) and again.sparsity == pruner.sparsity
    before = copy.deepcopy(model.state_dict())
    for trained, steps_of, keeping in ((twin, other, again), (model, optimizer, pruner)):
        torch.manual_seed(0)
        train(trained, steps_of, 5, keeping)
        if trained is twin:
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name]), "the original is another one"
    assert again.masks == pruner.masks
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    again.remove()
    cases.loss_of(model, cases.batches(1)[0]).backward()
    assert pruner.masks.check(model) == {}


def test_a_copy_without_its_optimizer_keeps_the_copied_model() -> None:
    """By gradients and by its own step, whichever optimizer is made for the copy."""
    model = cases.net()
    optimizer, pruner = pruner_of(model)
    train(model, optimizer, 3, pruner)
    twin, again = copy.deepcopy((model, pruner))
    train(twin, torch.optim.SGD(twin.parameters(), 0.1, weight_decay=0.1), 5, again)
    assert lap_ext.sparsity(twin) == again.sparsity == pytest.approx(0.8, abs=0.01)


WITH_THE_MODEL = (
    "Pruner: expected a copy of the pruner with its model, got one of the pruner alone. Call "
    "model, optimizer, pruner = copy.deepcopy((model, optimizer, pruner)); to save a pruner, save "
    "its state_dict()."
)
STATE = (
    "Pruner: expected the pruner's state_dict() to be saved or sent (a pruner belongs to its model "
    "and optimizers), got the pruner itself. Make a new Pruner of the other model and load the "
    "state_dict() there."
)
REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (copy.deepcopy, WITH_THE_MODEL),
    (copy.copy, STATE),
    (pickle.dumps, STATE),
]


@pytest.mark.parametrize(("way", "text"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_alone_it_is_refused(way: Callable[[Any], Any], text: str) -> None:
    _, pruner = pruner_of(cases.net())
    with pytest.raises(TypeError) as caught:
        way(pruner)
    assert str(caught.value) == text


def test_a_model_that_holds_its_pruner() -> None:
    """It is not there yet when its pruner is copied."""
    model = cases.net()
    _, pruner = pruner_of(model)
    model.held = [pruner]
    with pytest.raises(TypeError) as caught:
        copy.deepcopy(model)
    assert str(caught.value) == WITH_THE_MODEL.replace(
        "one of the pruner alone", "one within the copy of its model"
    )
