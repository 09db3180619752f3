# SPDX-License-Identifier: MIT
"""Pruner: mistakes are told when it is made, a failure changes nothing, remove ends it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import criteria
from lap_ext.criteria.context import Network
from lap_ext.errors import LapValueError
from lap_ext.pruning.pruner import Pruner
from lap_ext.schedule import iterative, linear, one_shot
from tests.helpers import masked_network as cases
from tests.helpers.pruner_training import EXAMPLE, train, two_layers

# --- data -----------------------------------------------------------------------------------------


class Counted(criteria.Criterion):
    """A criterion that looks at data; it remembers how often."""

    seen: list[list[int]]

    def prepare(self, network: Network, data: Any) -> None:
        if data is None:
            raise LapValueError("data", "none")
        self.seen.append(list(data))


def test_data_is_read_at_every_pruning_and_only_then() -> None:
    criterion = Counted()
    object.__setattr__(criterion, "seen", [])
    pruner = Pruner(
        two_layers(), torch.ones(1, 2), linear(0.5, start=1, end=3), criterion=criterion, data=[7]
    )
    assert criterion.seen == []
    for _ in range(5):
        pruner.step()
    assert criterion.seen == [[7]] * 3
    with pytest.raises(ValueError, match="expected data, got none"):
        Pruner(two_layers(), torch.ones(1, 2), one_shot(0.5), criterion=criterion)


def endless() -> Iterator[int]:
    yield 7


def test_data_that_ends_is_refused() -> None:
    with pytest.raises(TypeError, match=r"at every pruning, got generator, .* Pass a list"):
        Pruner(two_layers(), torch.ones(1, 2), one_shot(0.5), criterion=Counted(), data=endless())
    with pytest.raises(ValueError, match="expected no data for criterion 'lookahead'"):
        Pruner(two_layers(), torch.ones(1, 2), one_shot(0.5), data=[7])


# --- mistakes are told when the pruner is made ----------------------------------------------------

MISTAKES: dict[str, tuple[Callable[[nn.Sequential], Any], type[Exception], str]] = {
    "a number": (lambda m: Pruner(m, EXAMPLE, 0.9), TypeError, "step -> sparsity or None, got 0.9"),
    "a class": (
        lambda m: Pruner(m, EXAMPLE, one_shot),
        TypeError,
        r"got the class one_shot. Call it: one_shot\(\.\.\.\)",
    ),
    "masks": (
        lambda m: Pruner(m, EXAMPLE, one_shot(0.5), masks={}),
        TypeError,
        "unexpected keyword argument 'masks'",
    ),
    "criterion": (
        lambda m: Pruner(m, EXAMPLE, one_shot(0.5), criterion="lookahed"),
        ValueError,
        "Did you mean 'lookahead'",
    ),
    "scope": (
        lambda m: Pruner(m, EXAMPLE, one_shot(0.5), scope="all"),
        ValueError,
        "expected scope",
    ),
    "scope and order": (
        lambda m: Pruner(m, EXAMPLE, one_shot(0.5), scope="global", order="forward"),
        ValueError,
        'expected order="parallel"',
    ),
    "exclude": (
        lambda m: Pruner(m, EXAMPLE, one_shot(0.5), exclude=["fc3"]),
        ValueError,
        "got 'fc3'",
    ),
    "unknown option": (
        lambda m: Pruner(m, EXAMPLE, one_shot(0.5), sacrifice=1),
        TypeError,
        "sacrifice",
    ),
    "rounds": (lambda m: Pruner(m, EXAMPLE, one_shot(0.5), rounds=0), ValueError, "rounds >= 1"),
    "no module": (
        lambda m: Pruner(m.forward, EXAMPLE, one_shot(0.5)),
        TypeError,
        "torch.nn.Module",
    ),
    "another's topology": (
        lambda m: Pruner(
            m, None, one_shot(0.5), topology=lap_ext.trace(nn.Sequential(cases.net()), EXAMPLE)
        ),
        ValueError,
        "topology traced from this model",
    ),
    "another's optimizer": (
        lambda m: Pruner(
            m, EXAMPLE, one_shot(0.5), optimizer=torch.optim.SGD(cases.net().parameters())
        ),
        ValueError,
        "SGD with none of conv, fc1, fc2",
    ),
    "optimizer of the excluded": (
        lambda m: Pruner(
            m,
            EXAMPLE,
            one_shot(0.5),
            optimizer=torch.optim.SGD(m.fc2.parameters()),
            exclude="fc2",
        ),
        ValueError,
        "none of conv, fc1. Make it",
    ),
    "no optimizer": (
        lambda m: Pruner(m, EXAMPLE, one_shot(0.5), optimizer="sgd"),
        TypeError,
        "torch.optim.Optimizer",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes(name: str) -> None:
    model = cases.net()
    before = copy.deepcopy(model.state_dict())
    make, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        make(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_pruning_that_fails_changes_nothing() -> None:
    """A weight that is not finite: as before the step, which can then be repeated."""
    model = cases.net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = Pruner(model, EXAMPLE, iterative(0.5, rounds=4), optimizer=optimizer)
    train(model, optimizer, 2, pruner)
    masks, result = pruner.masks, pruner.result
    bad = tuple(pruner.masks["fc1"].nonzero()[0])
    model.fc1.weight.data[bad] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="fc1"):
        pruner.step()
    assert pruner.masks is masks and pruner.result is result
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.fc1.weight.data[bad] = 1.0
    assert pruner.step().layers[1].kept == 512 // 8
    train(model, optimizer, 1, pruner)


@pytest.mark.parametrize("sparsity", [1.5, "half", torch.tensor(0.5), {"fc9": 0.5}, True])
def test_what_a_schedule_may_not_return(sparsity: Any) -> None:
    pruner = Pruner(cases.net(), EXAMPLE, {1: sparsity}.get)
    pruner.step()
    with pytest.raises((TypeError, ValueError), match=r"Pruner|per_layer"):
        pruner.step()


def test_remove() -> None:
    model = cases.net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, EXAMPLE, iterative(0.5, rounds=9), optimizer=optimizer)
    train(model, optimizer, 3, pruner)
    hooks = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    assert all(len(h) == 1 for h in hooks), "one handle, however often it has pruned"
    pruner.remove()
    pruner.remove()
    assert not any(hooks) and not optimizer._optimizer_load_state_dict_post_hooks
    cases.check_zero(model, pruner.masks)
    with pytest.raises(RuntimeError, match=r"Pruner\.step: .* after remove\(\)"):
        pruner.step()
    with pytest.raises(RuntimeError, match=r"Pruner\.load_state_dict"):
        pruner.load_state_dict(pruner.state_dict())
    cases.train(model, optimizer, cases.batches(2))
    assert model.fc1.weight[~pruner.masks["fc1"]].any()
    again = Pruner(
        model, None, iterative(0.5, rounds=9), optimizer=optimizer, topology=pruner.topology
    )
    again.load_state_dict(pruner.state_dict())
    cases.check_zero(model, pruner.masks)
    train(model, optimizer, 1, again)
    assert again.result.layers[1].kept == 512 // 16


# --- what is reported is true ---------------------------------------------------------------------


def true_sparsity(model: nn.Module, pruner: Pruner) -> float:
    weights = [model.get_parameter(f"{name}.weight") for name in pruner.masks]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return zeros / sum(w.numel() for w in weights)


def test_a_replaced_parameter_is_told_by_the_next_step() -> None:
    """The old optimizer's, or the pruner's where another optimizer trains the new parameter."""
    model = cases.net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, EXAMPLE, one_shot(0.589), optimizer=optimizer)
    pruner.step()
    model.fc1.weight = nn.Parameter(torch.randn(8, 64))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Masks.keep, layer 'fc1': .* make a new one and load"):
        optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"^Pruner.step, layer 'fc1': expected the model to have"
    ):
        pruner.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    new = torch.optim.SGD(model.parameters(), 0.1)
    again = Pruner(model, None, one_shot(0.589), optimizer=new, topology=pruner.topology)
    again.load_state_dict(pruner.state_dict())
    train(model, new, 2, again)
    assert true_sparsity(model, again) == pytest.approx(again.sparsity, abs=1e-9)


def test_without_an_optimizer_it_follows_the_model() -> None:
    model = cases.net()
    pruner = Pruner(model, EXAMPLE, one_shot(0.5))
    pruner.step()
    model.fc1.weight = nn.Parameter(torch.randn(8, 64))
    model.conv = nn.Conv2d(1, 4, 3)
    pruner.step()
    assert true_sparsity(model, pruner) == pruner.sparsity == 0.5


def test_an_optimizer_that_the_pruner_does_not_know() -> None:
    """A new one of the same parameters, or weights that are loaded: zero again after each step."""
    model = cases.net()
    dense = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, EXAMPLE, one_shot(0.5), optimizer=optimizer)
    pruner.step()
    other = torch.optim.AdamW(model.parameters(), 0.1)
    for batch in cases.batches(3):
        cases.train(model, other, [batch])
        pruner.step()
        assert true_sparsity(model, pruner) == pruner.sparsity == 0.5
    model.load_state_dict(dense)
    with pytest.warns(UserWarning, match="expected pruned weights to stay zero, got 18 in layer"):
        pruner.step()
    cases.check_zero(model, pruner.masks)
