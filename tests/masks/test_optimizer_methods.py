# SPDX-License-Identifier: MIT
"""Pruned weights stay zero whatever an optimizer's methods are called and whoever writes a weight.

SAM (first_step, second_step) runs none of torch's step hooks; what else writes weights between two
steps is found at the next one, and told once by name.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.masks import Masks
from tests.helpers import masked_network as cases
from tests.helpers.optimizers import Noisy, Sam, SamAlone
from tests.helpers.pruner_training import EXAMPLE

INNER = {
    "momentum": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, weight_decay=0.1),
    "noisy": lambda groups: Noisy(groups, 0.01),
}
SAMS = {
    **{f"sam of {name}": lambda p, inner=inner: Sam(p, inner) for name, inner in INNER.items()},
    "sam alone": SamAlone,
}


def two_steps(model: nn.Module, optimizer: Any, batch: Any) -> None:
    cases.loss_of(model, batch).backward()
    optimizer.first_step()
    cases.loss_of(model, batch).backward()
    optimizer.second_step()


def by_closure(model: nn.Module, optimizer: Any, batch: Any) -> None:
    def closure() -> Tensor:
        loss = cases.loss_of(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("step", [two_steps, by_closure], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", SAMS)
def test_sam(kind: str, step: Any) -> None:
    """Moments from before the pruning, decay and e(w) move no pruned weight: as weight * mask."""
    model, data = cases.net(), cases.batches(5)
    make = SAMS[kind]
    optimizer = make(model.parameters())
    step(model, optimizer, data[0])  # dense: moments of all weights
    masks = cases.random_masks(model)
    seen: list[int] = []
    masks.keep(model, optimizer)
    model.register_forward_pre_hook(lambda *_: seen.append(sum(masks.check(model).values())))
    for batch in data[1:]:
        step(model, optimizer, batch)
        cases.check_zero(model, masks)
    assert len(seen) == 8 and not any(seen), "at w + e(w) too"


def test_sam_trains_as_weight_times_mask() -> None:
    model, data = cases.net(), cases.batches(4)
    masks = cases.random_masks(model)
    masks.apply(model)
    other = cases.multiplied(copy.deepcopy(model), masks)
    optimizer = Sam(model.parameters(), INNER["momentum"])
    plain = Sam(cases.in_order(other), INNER["momentum"])
    masks.keep(model, optimizer)
    for batch in data:
        two_steps(model, optimizer, batch)
        two_steps(other, plain, batch)
    for name, mask in masks.items():  # norms are added in another order
        mine, theirs = model.get_submodule(name).weight, other.get_submodule(name).weight
        assert torch.allclose(mine[mask], theirs[mask], rtol=1e-5, atol=1e-7), name


def test_a_pruner_of_sam() -> None:
    model = cases.net()
    optimizer = SamAlone(model.parameters())
    schedule = lap_ext.schedule.cubic(0.8, start=0, end=4, every=2)
    pruner = lap_ext.Pruner(model, EXAMPLE, schedule, optimizer=optimizer)
    for batch in cases.batches(8):
        two_steps(model, optimizer, batch)
        pruner.step()
        cases.check_zero(model, pruner.masks)
    assert lap_ext.sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_gradients_are_masked_where_they_arise() -> None:
    """So clipping, GradScaler and methods without hooks never see one of a pruned weight."""
    model, data = cases.net(), cases.batches(2)
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cases.loss_of(model, data[0]).backward()
    with masks.keep(model, optimizer):
        assert_masked(model, masks)  # one that was there already
        cases.loss_of(model, data[1]).backward()
        assert_masked(model, masks)
    cases.loss_of(model, data[1]).backward()
    assert model.fc1.weight.grad[~masks["fc1"]].any(), "removed"


def assert_masked(model: nn.Module, masks: Masks) -> None:
    for name, mask in masks.items():
        gradient = model.get_submodule(name).weight.grad
        assert gradient[mask].any() and not gradient[~mask].any(), name


def test_a_layer_unfrozen_later_and_a_group_added_later() -> None:
    model, data = cases.net(), cases.batches(3)
    masks = cases.random_masks(model)
    model.fc1.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.conv.parameters(), *model.fc1.parameters()], 0.1)
    masks.keep(model, optimizer)
    cases.train(model, optimizer, data[:1])
    model.fc1.requires_grad_(True)
    optimizer.add_param_group({"params": model.fc2.parameters()})
    cases.train(model, optimizer, data[1:2])
    optimizer.zero_grad()
    cases.loss_of(model, data[2]).backward()
    assert_masked(model, masks)


# --- what writes weights between two steps --------------------------------------------------------


def load_dense(model: nn.Module, dense: dict[str, Tensor]) -> None:
    model.load_state_dict(dense)


def other_optimizer(model: nn.Module, dense: dict[str, Tensor]) -> None:
    other = torch.optim.SGD(model.fc1.parameters(), 0.1)
    model.fc1.weight.grad = torch.ones_like(model.fc1.weight)
    other.step()


@pytest.mark.parametrize("write", [load_dense, other_optimizer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("keeper", ["Masks.keep", "Pruner"])
def test_revived_weights_are_told_once_by_name(keeper: str, write: Any) -> None:
    model, data = cases.net(), cases.batches(4)
    dense = copy.deepcopy(model.state_dict())
    masks = cases.random_masks(model, ("fc1",))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    pruner: Any = None
    if keeper == "Pruner":
        schedule = lap_ext.schedule.one_shot(0.5)
        pruner = lap_ext.Pruner(model, EXAMPLE, schedule, optimizer=optimizer, layers="fc1")
        pruner.step()
        masks = pruner.masks
    else:
        masks.keep(model, optimizer)
    pruned = masks.total - masks.kept
    caught: list[Any] = []
    for _ in range(2):
        write(model, dense)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            if pruner is not None:
                pruner.step()
            cases.train(model, optimizer, data)
        caught += found
        cases.check_zero(model, masks)
    assert [str(x.message) for x in caught] == [
        f"expected pruned weights to stay zero, got {pruned} in layer 'fc1' that something else "
        "than the kept optimizers has written. They are zero again. Call masks.apply(model) after "
        "what writes weights (load_state_dict, an average), and keep every optimizer of the model."
    ]


def test_a_pruner_finds_what_no_hook_and_no_version_tells() -> None:
    """A method of the optimizer's own that writes to .data."""
    model = cases.net()
    optimizer = Noisy(model.parameters(), 0.1)
    pruner = lap_ext.Pruner(model, EXAMPLE, lap_ext.schedule.one_shot(0.5), optimizer=optimizer)
    pruner.step()
    optimizer.shake()
    with pytest.warns(UserWarning, match="18 in layer 'conv', 256 in layer 'fc1', 12 in"):
        pruner.step()
    cases.check_zero(model, pruner.masks)


def test_what_the_optimizer_itself_moves_is_no_news() -> None:
    """Decay past zero, noise, writes in place of kept weights, several keepers: no warning."""
    model, data = cases.net(), cases.batches(3)
    masks = cases.random_masks(model)
    first, second = Noisy(model.conv.parameters(), 0.1), Noisy(model.parameters(), 0.1)
    masks.keep(model, first)
    masks.keep(model, second)
    for batch in data:
        cases.train(model, first, [batch])
        cases.train(model, second, [batch])
        with torch.no_grad():
            model.fc1.weight.clamp_(-1, 1)
    cases.check_zero(model, masks)


# --- several optimizers ---------------------------------------------------------------------------


def test_several_optimizers_in_one_call() -> None:
    model, data = cases.net(), cases.batches(3)
    masks = cases.random_masks(model)
    optimizers = [Noisy(model.get_submodule(name).parameters(), 0.1) for name in masks]
    handle = masks.keep(model, optimizers)
    for batch in data:
        for optimizer in optimizers:
            cases.train(model, optimizer, [batch])
            cases.check_zero(model, masks)
    handle.remove()
    cases.train(model, optimizers[1], data)
    assert masks.check(model) == {"fc1": masks["fc1"].logical_not().sum()}


# --- Masks.check ----------------------------------------------------------------------------------


def test_check_counts_what_came_back() -> None:
    model = cases.net()
    masks = cases.random_masks(model)
    masks.apply(model)
    assert masks.check(model) == {}
    with torch.no_grad():
        model.fc2.weight[~masks["fc2"]] = torch.nan
        model.conv.weight.neg_()  # -0.0 is zero
    assert masks.check(model) == {"fc2": int((~masks["fc2"]).sum())}
    assert masks.check(nn.DataParallel(model)) == masks.check(model)
    with pytest.raises(ValueError, match=r"^Masks.check: expected masks that fit the model"):
        masks.check(model.fc1)
    with pytest.raises(ValueError, match="layer 'conv': expected weights with data"):
        masks.check(cases.net().to("meta"))
