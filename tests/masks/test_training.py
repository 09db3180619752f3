# SPDX-License-Identifier: MIT
"""Pruned weights stay +0.0 through training, and kept ones train as if the others were not there.

The oracle is the same model with weight * mask in each forward pass: the kept weights agree to the
last bit. What an optimizer may do to break it (decay, moments built up before, noise, NaN) comes
below.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lap_ext.masks import Masks
from tests.helpers import masked_network as cases
from tests.helpers.optimizers import Noisy

each_optimizer = pytest.mark.parametrize("name", list(cases.OPTIMIZERS))


@each_optimizer
def test_trains_as_weight_times_mask(name: str) -> None:
    model, data = cases.net(), cases.batches(8)
    masks = cases.random_masks(model)
    masks.apply(model)
    other = cases.multiplied(copy.deepcopy(model), masks)
    make = cases.OPTIMIZERS[name]
    optimizer, plain = make(model.parameters()), make(cases.in_order(other))
    with masks.keep(model, optimizer):
        cases.train(model, optimizer, data)
    cases.train(other, plain, data)
    cases.check_zero(model, masks)
    cases.check_agree(model, other, masks)
    if not name.startswith("lbfgs"):
        check_moments(model, optimizer, masks, rest={"rprop": 0.01, "adamax": 1e-8}.get(name, 0.0))


def check_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks, rest: float = 0.0
) -> None:
    """What the optimizer remembers of pruned weights is 0.

    Or where it rests: Rprop's step size at lr, Adamax's largest gradient at eps; both meet a 0.
    """
    for name, mask in masks.items():
        state = optimizer.state[model.get_parameter(f"{name}.weight")]
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                assert value[~mask].abs().max() <= rest and value[mask].any()


@pytest.mark.parametrize("name", [n for n in cases.OPTIMIZERS if not n.startswith("lbfgs")])
def test_moments_built_up_before(name: str) -> None:
    """Dense training first: the pruned weights' moments do not move them afterwards."""
    model, data = cases.net(), cases.batches(10)
    make = cases.OPTIMIZERS[name]
    optimizer = make(model.parameters())
    cases.train(model, optimizer, data[:5])
    masks = cases.random_masks(model)
    other = copy.deepcopy(model)
    plain = make(other.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cases.multiplied(other, masks)
    with masks.keep(model, optimizer):
        cases.check_zero(model, masks)
        check_moments(model, optimizer, masks)
        cases.train(model, optimizer, data[5:])
    cases.check_zero(model, masks)
    if name != "adafactor":  # it sees norms of the full weight, the others do not
        cases.train(other, plain, data[5:])
        cases.check_agree(model, other, masks)


@pytest.mark.parametrize("name", ["noise", "muon", "decay past zero", "0 / 0"])
def test_what_moves_weights_without_a_gradient(name: str) -> None:
    model = cases.net()
    masks = cases.random_masks(model)
    if name == "0 / 0":  # no kept weight whose gradient is 0
        masks = Masks({"fc1": torch.arange(8 * 64).reshape(8, 64) % 2 == 0})
    make = {
        "noise": lambda: Noisy(model.parameters(), 0.1),
        "muon": lambda: torch.optim.Muon([model.fc1.weight, model.fc2.weight], 0.1),
        "decay past zero": lambda: torch.optim.AdamW(model.parameters(), 1.0, weight_decay=1.5),
        "0 / 0": lambda: torch.optim.Adam(model.parameters(), 0.01, eps=0.0),
    }
    optimizer = make[name]()
    masks.keep(model, optimizer)
    for batch in cases.batches(3):
        cases.train(model, optimizer, [batch])
        cases.check_zero(model, masks)
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_of_pruned_weights_may_be_anything(value: float) -> None:
    model = cases.net()
    masks = cases.random_masks(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    masks.keep(model, optimizer)
    for batch in cases.batches(3):
        cases.loss_of(model, batch).backward()
        model.fc1.weight.grad[~masks["fc1"]] = value
        optimizer.step()
    cases.check_zero(model, masks)
    assert model.fc1.weight.isfinite().all()
    assert optimizer.state[model.fc1.weight]["exp_avg_sq"].isfinite().all()


def test_nan_weights_are_pruned_to_zero() -> None:
    model = cases.net()
    masks = cases.random_masks(model)
    with torch.no_grad():
        model.fc1.weight[~masks["fc1"]] = float("nan")
    masks.keep(model, torch.optim.SGD(model.parameters(), 0.1))
    cases.check_zero(model, masks)


@pytest.mark.parametrize("position", ["positional", "keyword"])
def test_closure_of_any_optimizer(position: str) -> None:
    """Gradients that a closure makes within the step are masked too."""
    model, data = cases.net(), cases.batches(4)
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masks.keep(model, optimizer)
    losses = []
    for batch in data:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = cases.loss_of(model, batch)
            loss.backward()
            return loss

        loss = (
            optimizer.step(closure) if position == "positional" else optimizer.step(closure=closure)
        )
        losses.append(loss.item())
        momentum = optimizer.state[model.fc1.weight]["momentum_buffer"]
        assert not momentum[~masks["fc1"]].any() and momentum.any()
    assert len(set(losses)) == 4
    cases.check_zero(model, masks)


@pytest.mark.parametrize("name", ["lbfgs", "lbfgs-wolfe"])
def test_lbfgs_never_moves_a_pruned_weight(name: str) -> None:
    """At every evaluation within a step too."""
    model, batch = cases.net(), cases.batches(1)[0]
    masks = cases.random_masks(model)
    optimizer = cases.OPTIMIZERS[name](model.parameters())
    cases.train(model, optimizer, [batch] * 2)  # a history of the dense model
    masks.keep(model, optimizer)
    assert not optimizer.state, "a history that moves pruned weights is dropped"
    evaluations = []

    def closure() -> Tensor:
        cases.check_zero(model, masks)
        optimizer.zero_grad()
        loss = cases.loss_of(model, batch)
        loss.backward()
        evaluations.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    cases.check_zero(model, masks)
    assert len(evaluations) > 3 and evaluations[-1] < evaluations[0]


def test_lbfgs_resumes() -> None:
    """A history collected under the masks survives load_state_dict: the run goes on bit for bit."""
    model, data = cases.net(), cases.batches(6)
    masks = cases.random_masks(model)
    make = cases.OPTIMIZERS["lbfgs"]
    optimizer = make(model.parameters())
    masks.keep(model, optimizer)
    cases.train(model, optimizer, data[:3])
    other = copy.deepcopy(model)
    resumed = make(other.parameters())
    masks.keep(other, resumed)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state[next(other.parameters())]["n_iter"] > 1
    cases.train(model, optimizer, data[3:])
    cases.train(other, resumed, data[3:])
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_resumes_from_a_dense_checkpoint() -> None:
    """load_state_dict brings back moments of pruned weights: they are cleared again."""
    model, data = cases.net(), cases.batches(3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    cases.train(model, optimizer, data)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    masks = cases.random_masks(model)
    masks.keep(model, optimizer)
    optimizer.load_state_dict(checkpoint)
    check_moments(model, optimizer, masks)
    moment = optimizer.state[model.fc1.weight]["exp_avg"]
    assert moment[masks["fc1"]].all() and int(optimizer.state[model.fc1.weight]["step"]) == 3
    assert all(s["exp_avg"].all() for s in checkpoint["state"].values()), "the caller's is complete"


def test_accumulation_and_missing_gradients() -> None:
    """Gradients that add up over batches; layers that are frozen or had none."""
    model, data = cases.net(), cases.batches(8)
    masks = cases.random_masks(model)
    masks.apply(model)
    model.conv.weight.requires_grad_(False)
    other = cases.multiplied(copy.deepcopy(model), masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    plain = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    frozen = model.conv.weight.clone()
    masks.keep(model, optimizer)
    for step, batch in enumerate(data, 1):
        for each in (model, other):
            (cases.loss_of(each, batch) / 4).backward()
        if step % 4 == 0:
            for each in (optimizer, plain):
                each.step()
                each.zero_grad()
    optimizer.step()  # no gradient anywhere
    cases.check_zero(model, masks)
    cases.check_agree(model, other, masks)
    assert torch.equal(model.conv.weight, frozen)


def test_param_groups_and_several_optimizers() -> None:
    """Each optimizer is watched for the layers it has at that moment."""
    model, data = cases.net(), cases.batches(4)
    masks = cases.random_masks(model)
    first = torch.optim.SGD([{"params": model.conv.parameters(), "lr": 0.5}], 0.1, momentum=0.9)
    second = Noisy(model.fc1.parameters(), 0.1)
    with masks.keep(model, first), masks.keep(model, second):
        for batch in data:
            cases.loss_of(model, batch).backward()
            before = model.fc2.weight.grad.clone()
            first.step()
            second.step()
            assert torch.equal(model.fc2.weight.grad, before), "of neither optimizer"
            cases.check_zero(model, masks)
        first.add_param_group({"params": model.fc2.parameters(), "weight_decay": 0.1})
        for batch in data:
            cases.train(model, first, [batch])
            cases.check_zero(model, masks)


def test_clipping_sees_only_kept_weights() -> None:
    model, batch = cases.net(), cases.batches(1)[0]
    masks = cases.random_masks(model)
    masks.apply(model)
    other = cases.multiplied(copy.deepcopy(model), masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.keep(model, optimizer)
    for each in (model, other):
        cases.loss_of(each, batch).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    theirs = nn.utils.get_total_norm([p.grad for p in other.parameters()])
    assert torch.allclose(norm, theirs, rtol=1e-6)  # added in another order


def test_remove_ends_it() -> None:
    model, data = cases.net(), cases.batches(2)
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hooks = [
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        optimizer._optimizer_load_state_dict_post_hooks,
    ]
    handle = masks.keep(model, optimizer)
    assert all(len(h) == 1 for h in hooks)
    with pytest.raises(KeyError, match="from within"), handle:
        raise KeyError("from within")
    handle.remove()  # a second time: nothing
    assert not any(hooks)
    cases.train(model, optimizer, data)
    assert model.fc1.weight[~masks["fc1"]].all()


def test_masks_on_top_of_each_other() -> None:
    """What one of them prunes stays zero; the first may then be removed."""
    model, data = cases.net(), cases.batches(3)
    some = cases.random_masks(model)
    fewer = Masks({name: mask & (torch.rand(mask.shape) < 0.7) for name, mask in some.items()})
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    first = some.keep(model, optimizer)
    cases.train(model, optimizer, data)
    fewer.keep(model, optimizer)
    first.remove()
    cases.train(model, optimizer, data)
    cases.check_zero(model, fewer)


def test_the_model_stays_the_users() -> None:
    """Same keys, same parameters, no hooks on modules; copies and pickles work and are free."""
    model, data = cases.net(), cases.batches(2)
    masks = cases.random_masks(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    masks.keep(model, optimizer)
    cases.train(model, optimizer, data)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        cases.check_zero(twin, masks)
        assert not any(p._backward_hooks for p in twin.parameters())
        cases.train(twin, torch.optim.SGD(twin.parameters(), 0.1), data)
        assert twin.fc1.weight[~masks["fc1"]].all(), "the copy has another optimizer"
    twin = copy.deepcopy(optimizer)  # without hooks, as torch copies it
    assert not twin._optimizer_step_pre_hooks
    assert not twin._optimizer_step_post_hooks
    assert pickle.loads(pickle.dumps(masks)) == masks == copy.deepcopy(masks)


# --- a parameter that is no longer the model's, or no longer the optimizer's ----------------------


def new_weight(layer: nn.Module) -> nn.Parameter:
    """A copy that the optimizer could train in place of the old one."""
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    return layer.weight


def new_module(model: nn.Sequential) -> None:
    model.fc1 = nn.Linear(64, 8)


def new_inner_module(model: nn.Sequential) -> None:
    model.fc1.weight = nn.Parameter(torch.randn(8, 64))


def assigned(model: nn.Sequential) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def gone(model: nn.Sequential) -> None:
    model.fc1 = nn.Identity()


REPLACEMENTS = [new_module, new_inner_module, assigned, gone]


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_a_replaced_parameter_is_told_at_the_next_step(replace: Any, wrapped: bool) -> None:
    model, data = cases.net(), cases.batches(2)
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = masks.keep(nn.DataParallel(model) if wrapped else model, optimizer)
    cases.train(model, optimizer, data[:1])
    replace(model)
    new = [p for p in model.parameters() if p not in set(optimizer.param_groups[0]["params"])]
    if new:
        optimizer.add_param_group({"params": new})
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    name = "conv" if replace is assigned else "fc1"
    text = "none" if replace is gone else "another one"
    assert str(caught.value) == (
        f"Masks.keep, layer '{name}': expected the model to have the parameter that is kept, got "
        f"{text} of that name. Call keep again with the optimizer of the model as it is now. A "
        "Pruner: make a new one and load this one's state_dict()."
    )
    with pytest.raises(RuntimeError, match="expected the model to have the parameter"):
        handle.mask_gradients()
    handle.remove()
    optimizer.step()
    if replace is not gone:
        with masks.keep(model, optimizer):
            cases.train(model, optimizer, data[1:])
        cases.check_zero(model, masks)


def test_a_parameter_that_only_changes_its_name_is_kept() -> None:
    """torch.nn.utils.prune and parametrizations move the same parameter to another name."""
    model, data = cases.net(), cases.batches(3)
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.keep(model, optimizer)
    Masks({"fc1": masks["fc1"]}).to_torch_prune(model)
    nn.utils.parametrize.register_parametrization(model.fc2, "weight", nn.Identity())
    cases.train(model, optimizer, data)
    assert torch.equal(model.fc1.weight_orig != 0, masks["fc1"])
    assert torch.equal(model.fc2.parametrizations.weight.original != 0, masks["fc2"])
    model.renamed = model.conv
    del model.conv
    optimizer.step()


def test_the_model_may_be_gone() -> None:
    model, data = cases.net(), cases.batches(1)
    masks = cases.random_masks(model)
    weight = model.fc1.weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.keep(model, optimizer)
    cases.train(model, optimizer, data)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None, "keeping holds parameters, not the model"
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight != 0, masks["fc1"])


def test_an_optimizer_that_loses_a_parameter_is_told() -> None:
    model, data = cases.net(), cases.batches(1)
    masks = cases.random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.keep(model, optimizer)
    cases.train(model, optimizer, data)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not model.fc1.weight]
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "Masks.keep, layer 'fc1': expected the optimizer to train the layers that it has trained, "
        "got one without this. Call keep again after its groups have changed, once for each "
        "optimizer. A Pruner: make a new one and load this one's state_dict()."
    )
    model.fc1.weight.requires_grad_(False)  # a layer that is frozen needs no optimizer
    optimizer.step()
    cases.check_zero(model, masks)
