# SPDX-License-Identifier: MIT
"""Masks.to_torch_prune and remove: torch.nn.utils.prune takes over, and gives back a plain model.

torch recomputes a pruned weight when its module is called: a tied weight is handed over everywhere,
and a module that is never called is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from lap_ext.masks import Masks
from tests.helpers import masked_network as cases


def test_there_and_back() -> None:
    model = cases.net()
    masks = cases.random_masks(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    parameters = list(model.parameters())
    masks.to_torch_prune(model)
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight_orig, before[f"{name}.weight"])
        assert torch.equal(layer.weight_mask, mask.float())
        assert torch.equal(layer.weight, before[f"{name}.weight"] * mask)
    assert prune.is_pruned(model)
    order = [name.replace("_orig", "") for name, _ in model.named_parameters()]
    assert order == list(before), "where they were"
    masks.remove(model)
    assert not prune.is_pruned(model) and not dict(model.named_buffers())
    cases.check_zero(model, masks)
    assert list(model.state_dict()) == list(before)
    for old, (name, new) in zip(parameters, model.named_parameters(), strict=True):
        mask = masks.get(name.removesuffix(".weight"), torch.ones_like(new, dtype=torch.bool))
        assert old is new and torch.equal(new, torch.where(mask, before[name], 0.0))


def test_training_agrees_with_keep() -> None:
    """Two ways, one result: an optimizer made before goes on in both."""
    model, data = cases.net(), cases.batches(6)
    masks = cases.random_masks(model)
    masks.apply(model)
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    theirs = torch.optim.AdamW(other.parameters(), 0.01)
    masks.to_torch_prune(other)
    with masks.keep(model, optimizer):
        cases.train(model, optimizer, data)
    cases.train(other, theirs, data)
    masks.remove(other)
    cases.check_zero(other, masks)
    cases.check_agree(model, other, masks)
    theirs.load_state_dict(optimizer.state_dict())  # parameters are in the same order
    fresh = torch.optim.AdamW(other.parameters(), 0.01)
    fresh.load_state_dict(optimizer.state_dict())
    for parameter in other.parameters():
        assert fresh.state[parameter]["exp_avg"].shape == parameter.shape


def test_pruned_nan_becomes_zero() -> None:
    """Torch multiplies, which keeps NaN: remove does not."""
    layer = nn.Linear(3, 1)
    masks = Masks({"weight": torch.tensor([[True, False, True]])})
    masks.to_torch_prune(layer)
    layer.weight_orig.data[0, 1] = float("nan")
    masks.remove(layer)
    assert layer.weight[0, 1].item() == 0.0 and layer.weight[0, [0, 2]].all()


def test_parameters_not_called_weight() -> None:
    lstm, attention = nn.LSTM(3, 4, 2), nn.MultiheadAttention(4, 2)
    model = nn.ModuleDict({"lstm": lstm, "attn": attention})
    names = ["lstm.weight_hh_l0", "lstm.weight_ih_l1", "attn.in_proj_weight"]
    masks = Masks({name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in names})
    order = [name for name, _ in model.named_parameters()]
    masks.to_torch_prune(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x, _ = lstm(torch.randn(5, 2, 3))
        attention(x, x, x)[0].square().sum().backward()
        optimizer.step()
    masks.remove(model)
    assert [name for name, _ in model.named_parameters()] == order
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name
    assert lstm._flat_weights[1] is lstm.weight_hh_l0


class Tied(nn.Module):
    """Embedding and head are one tensor; frozen is trained by no one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(self.embed(x)))


@pytest.mark.parametrize("name", ["embed", "head"])
def test_tied_weights_are_masked_wherever_they_are_used(name: str) -> None:
    model = Tied()
    masks = Masks({name: torch.rand(6, 4) < 0.5, "frozen": torch.rand(4, 4) < 0.5})
    masks.to_torch_prune(model)
    assert model.embed.weight_orig is model.head.weight_orig
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    model(torch.arange(6))  # torch computes the weights in the call
    for layer in (model.embed, model.head):
        assert torch.equal(layer.weight != 0, masks[name])
    masks.remove(model)
    assert model.embed.weight is model.head.weight and len(list(model.parameters())) == 3
    assert torch.equal(model.head.weight != 0, masks[name])
    assert not model.frozen.weight.requires_grad


def test_through_wrappers_and_devices(device: str) -> None:
    model = cases.net()
    masks = cases.random_masks(model)
    average = AveragedModel(torch.compile(model, backend="eager"))
    masks.to_torch_prune(average)
    average.to(device)
    masks.remove(average)
    cases.check_zero(average.cpu().module._orig_mod, masks)


def uncalled(model: nn.Module) -> tuple[str, Tensor]:
    """MultiheadAttention reads out_proj's weight and never calls it."""
    model.attn = nn.MultiheadAttention(4, 2)
    return "attn.out_proj", torch.eye(4) == 1


def listed(model: nn.Module) -> tuple[str, Tensor]:
    model.experts = nn.ParameterList([torch.ones(2, 2)])
    return "experts.0", torch.eye(2) == 1


def misshapen(model: nn.Module) -> tuple[str, Tensor]:
    model.last = nn.Linear(2, 2)
    return "last", torch.eye(3) == 1


def pruned_already(model: nn.Module) -> tuple[str, Tensor]:
    model.last = nn.Linear(2, 2)
    prune.identity(model.last, "weight")
    return "last", torch.eye(2) == 1


def normed(model: nn.Module) -> tuple[str, Tensor]:
    model.last = nn.utils.spectral_norm(nn.Linear(2, 2))
    return "last", torch.eye(2) == 1


REFUSED: list[tuple[Callable[[nn.Module], tuple[str, Tensor]], str]] = [
    (
        uncalled,
        "expected layers whose module is called in the forward pass (there torch recomputes the "
        "weight), got 'attn.out_proj', in NonDynamicallyQuantizableLinear. Leave it out, or use "
        "Masks.keep.",
    ),
    (listed, "got 'experts.0', in ParameterList. Leave it out"),
    (misshapen, "'last': mask [3, 3], parameter [2, 2]."),
    (pruned_already, "'last': pruned with torch.nn.utils.prune, which keeps its own mask."),
    (normed, "got 'last', which Linear computes. Use Masks.apply"),
]


@pytest.mark.parametrize(("add", "text"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_refused_and_nothing_changed(
    add: Callable[[nn.Module], tuple[str, Tensor]], text: str
) -> None:
    model = cases.net()
    masks = Masks({**cases.random_masks(model), **dict([add(model)])})
    keys = list(model.state_dict())
    with pytest.raises(ValueError) as caught:
        masks.to_torch_prune(model)
    assert str(caught.value).startswith("Masks.to_torch_prune: expected ")
    assert text in str(caught.value)
    assert list(model.state_dict()) == keys and not prune.is_pruned(model.conv)


def test_remove_refuses() -> None:
    model = cases.net()
    masks = cases.random_masks(model)
    masks.to_torch_prune(model)
    prune.remove(model.fc1, "weight")
    nn.utils.spectral_norm(model.fc1)  # it has a weight_orig too
    wrong = Masks({**masks, "conv": masks["conv"][:1], "nowhere": masks["fc1"]})
    with pytest.raises(ValueError) as caught:
        wrong.remove(model)
    assert str(caught.value) == (
        "Masks.remove: expected masks that fit the model, got 3 that do not. They are:\n"
        "  'conv': mask [1, 1, 3, 3], parameter [4, 1, 3, 3].\n"
        "  'fc1': not pruned with torch.nn.utils.prune.\n"
        "  'nowhere': not pruned with torch.nn.utils.prune."
    )
    assert prune.is_pruned(model.conv) and prune.is_pruned(model.fc2)
    tied = Tied()
    Masks({"embed": torch.ones(6, 4) == 1}).to_torch_prune(tied)
    with pytest.raises(ValueError, match="'head': the same parameter as 'embed'"):
        Masks({"embed": torch.ones(6, 4) == 1, "head": torch.ones(6, 4) == 1}).remove(tied)
    assert prune.is_pruned(tied.embed)


def test_pruned_further_by_torch() -> None:
    """Pruned by both: remove makes both permanent."""
    model = cases.net()
    masks = cases.random_masks(model)
    masks.to_torch_prune(model)
    prune.l1_unstructured(model.fc1, "weight", 0.5)
    masks.remove(model)
    weight = model.fc1.weight
    assert not weight[~masks["fc1"]].any() and weight.count_nonzero() < masks["fc1"].sum()
