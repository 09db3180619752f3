# SPDX-License-Identifier: MIT
"""torch.ao.pruning with lookahead masks; the oracle is lap_ext.prune of a plain copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import CubicSL, LambdaSL
from torch.nn.utils import parametrize

import lap_ext
from lap_ext.adapters.torch_ao import LookaheadSparsifier
from tests.helpers import masked_network as cases

EXAMPLE = torch.zeros(1, 1, 6, 6)
FC1, FC2 = {"tensor_fqn": "fc1.weight"}, {"tensor_fqn": "fc2.weight"}


def prepared(
    model: nn.Module, config: Any = None, level: float = 0.75, **options: Any
) -> LookaheadSparsifier:
    sparsifier = LookaheadSparsifier(EXAMPLE, level, **options)
    sparsifier.prepare(model, config)
    return sparsifier


def check_masks(model: nn.Module, masks: lap_ext.Masks) -> None:
    """torch's masks are these, where torch has them."""
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.parametrizations.weight[0].mask, mask.float()), name
        assert torch.equal(layer.weight, layer.parametrizations.weight.original * mask), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "global"},
        {"scope": "global", "normalize": "lamp"},
        {"criterion": "magnitude", "rounds": 2},
        {"order": "forward"},
    ],
    ids=str,
)
def test_one_step(options: dict[str, Any]) -> None:
    """All masks of a step are of the same weights: those of lap_ext.prune."""
    model = cases.net()
    plain = copy.deepcopy(model)
    sparsifier = prepared(model, **options)
    assert sparsifier.masks.sparsity == 0.0
    sparsifier.step()
    levels = dict.fromkeys(("conv", "fc1", "fc2"), 0.75)
    expected = lap_ext.prune(plain, EXAMPLE, levels, **options).masks
    assert sparsifier.masks == expected
    check_masks(model, expected)
    sparsifier.squash_mask()
    assert set(model.state_dict()) == set(plain.state_dict())  # torch changes the order
    for name, mine in model.named_parameters():
        assert torch.equal(mine, plain.get_parameter(name)), name
    cases.check_zero(model, expected)


def test_a_ready_trace_and_named_inputs() -> None:
    model = cases.net()
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    sparsifier = LookaheadSparsifier(None, 0.75, topology=lap_ext.trace(model, EXAMPLE))
    named = LookaheadSparsifier({"input": EXAMPLE}, 0.75)
    for each, net in ((sparsifier, model), (named, other)):
        each.prepare(net, None)
        each.step()
    assert sparsifier.masks == named.masks == lap_ext.prune(plain, EXAMPLE, 0.75).masks


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_only_the_tensors_of_config(scope: str) -> None:
    """Each to its own level; what is not named is a neighbor and no more."""
    model = cases.net()
    plain = copy.deepcopy(model)
    sparsifier = prepared(model, [FC1 | {"sparsity_level": 0.5}, dict(FC2)], scope=scope)
    sparsifier.step()
    levels = {"fc1": 0.5, "fc2": 0.75}
    expected = lap_ext.prune(plain, EXAMPLE, levels, scope=scope, exclude="conv").masks
    assert sparsifier.masks == expected and expected.kept == 256 + 6
    assert not parametrize.is_parametrized(model.conv)
    assert scope == "global" or expected.counts() == {"fc1": (256, 512), "fc2": (6, 24)}


def test_schedulers_and_training() -> None:
    """Steps of training between steps of CubicSL; the oracle is the loop with prune."""
    model = cases.net()
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    sparsifier = prepared(model, level=0.8)
    scheduler = CubicSL(sparsifier, delta_t=1, total_t=4)
    masks, theirs = lap_ext.Masks({}), torch.optim.AdamW(other.parameters(), 0.01)
    data = cases.batches(6)
    for epoch, batch in enumerate(data):
        cases.train(model, optimizer, [batch])
        cases.train(cases.multiplied(other, masks), theirs, [batch])
        for name in masks:
            parametrize.remove_parametrizations(
                other.get_submodule(name), "weight", leave_parametrized=False
            )
        level = min(0.8 - 0.8 * (1 - epoch / 4) ** 3, 0.8) if epoch < 4 else 0.8
        masks = lap_ext.prune(other, EXAMPLE, level, masks=masks, apply=False).masks
        sparsifier.step()
        scheduler.step()
        assert sparsifier.masks == masks, epoch
    assert masks.counts()["fc1"] == (102, 512)
    sparsifier.squash_mask()
    cases.check_zero(model, masks)


def test_pruned_weights_never_return() -> None:
    """LambdaSL may go down again, and weight decay moves what torch has masked."""
    model = cases.net()
    sparsifier = prepared(model, level=0.5)
    scheduler = LambdaSL(sparsifier, sl_lambda=[0.5, 1.0, 0.2, 1.5].__getitem__)
    kept = []
    for _ in range(4):
        before = sparsifier.masks
        sparsifier.step()
        for name, mask in sparsifier.masks.items():
            assert not (mask & ~before[name]).any()
        kept.append(sparsifier.masks.counts()["fc1"][0])
        model.fc1.parametrizations.weight.original.data.add_(1.0)
        if len(kept) < 4:
            scheduler.step()
    assert kept == [384, 256, 256, 128]


def test_masks_are_written_in_place_in_the_weights_dtype() -> None:
    model = cases.net(torch.bfloat16)
    sparsifier = LookaheadSparsifier(EXAMPLE.bfloat16())
    sparsifier.prepare(model, [dict(FC1)])
    mask = model.fc1.parametrizations.weight[0].mask
    original = model.fc1.parametrizations.weight.original
    sparsifier.step()
    assert mask is model.fc1.parametrizations.weight[0].mask and mask.dtype == torch.bfloat16
    assert sparsifier.state["fc1.weight"]["mask"] is mask and mask.sum() == 256
    assert model.fc1.parametrizations.weight.original is original
    model.double()  # torch makes new buffers
    sparsifier.groups[0]["sparsity_level"] = 0.75
    sparsifier.step()
    assert sparsifier.state["fc1.weight"]["mask"] is model.fc1.parametrizations.weight[0].mask
    assert sparsifier.state_dict()["state"]["fc1.weight"]["mask"].sum() == 128


def test_one_mask_by_itself_and_no_update() -> None:
    model = cases.net()
    sparsifier = prepared(model)
    sparsifier.enable_mask_update = False
    sparsifier.step()
    assert sparsifier.masks.sparsity == 0.0
    sparsifier.update_mask(**sparsifier.groups[1])
    counts = sparsifier.masks.counts()
    assert counts == {"conv": (36, 36), "fc1": (128, 512), "fc2": (24, 24)}


def test_state_dict_there_and_back() -> None:
    """The dict is not changed, and can be had again: torch's own loses the masks."""
    model = cases.net()
    other = copy.deepcopy(model)
    sparsifier = prepared(model, scope="global")
    sparsifier.step()
    saved = copy.deepcopy(sparsifier.state_dict())
    again = prepared(other, scope="global")
    again.load_state_dict(saved)
    assert again.masks == sparsifier.masks
    first = sparsifier.masks["fc1"].float()
    assert torch.equal(again.state_dict()["state"]["fc1.weight"]["mask"], first)
    for both in (sparsifier, again):
        for group in both.groups:
            group["sparsity_level"] = 0.9
        both.step()
    assert again.masks == sparsifier.masks and again.masks.sparsity > 0.89
    assert torch.equal(saved["state"]["fc1.weight"]["mask"], first)


def test_squash_leaves_positive_zeros() -> None:
    """torch multiplies: -1 * 0 is -0.0, and infinity * 0 is NaN."""
    model = cases.net()
    sparsifier = prepared(model, [dict(FC1)])
    sparsifier.step()
    masks = sparsifier.masks
    original = model.fc1.parametrizations.weight.original.data
    original[~masks["fc1"]] = -1.0
    original[0, (~masks["fc1"][0]).nonzero()[0]] = float("inf")
    sparsifier.squash_mask(params_to_keep=("sparsity_level",))
    cases.check_zero(model, masks)
    assert model.fc1.sparse_params == {"sparsity_level": 0.75}


def test_an_error_while_scoring_changes_nothing() -> None:
    model = cases.net()
    sparsifier = prepared(model)
    sparsifier.step()
    masks, weight = sparsifier.masks, model.fc1.weight.detach().clone()
    original = model.fc1.parametrizations.weight.original
    value = original.data[0, 0].clone()
    original.data[0, 0] = float("nan")
    sparsifier.groups[0]["sparsity_level"] = 0.9
    with pytest.raises(ValueError, match="fc1"):
        sparsifier.step()
    original.data[0, 0] = value
    assert sparsifier.masks == masks and torch.equal(model.fc1.weight, weight)
    assert parametrize.is_parametrized(model.fc1, "weight")
    names = [name for name, _ in model.named_parameters()]
    assert "fc1.weight" not in names and "fc1.parametrizations.weight.original" in names


def test_layers_of_other_kinds() -> None:
    """What is no module of its own: torch computes it wherever it is read."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6)
            self.attention = nn.MultiheadAttention(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.lstm(x)
            return self.attention(x, x, x)[0]

    model, x = Model(), torch.randn(3, 2, 4)
    plain = copy.deepcopy(model)
    sparsifier = LookaheadSparsifier(x, 0.5)
    sparsifier.prepare(model, None)
    sparsifier.step()
    masks = lap_ext.prune(plain, x, 0.5).masks
    assert sparsifier.masks == masks and "lstm.weight_hh_l0" in masks
    assert torch.equal(model(x), plain(x))
    sparsifier.squash_mask()
    assert torch.equal(model(x), plain(x))


def unknown_tensor(model: nn.Module) -> None:
    prepared(model, [{"tensor_fqn": "fc1"}])


def tensor_twice(model: nn.Module) -> None:
    prepared(model, [dict(FC1), dict(FC1)])


def tied(model: nn.Module) -> None:
    model.append(nn.Linear(3, 3)).append(nn.Linear(3, 3))
    model[-1].weight = model[-2].weight
    prepared(model)


def wrong_scope(model: nn.Module) -> None:
    prepared(model, scope="both")


def example_and_topology(model: nn.Module) -> None:
    prepared(model, topology=lap_ext.trace(model, EXAMPLE))


def others_topology(model: nn.Module) -> None:
    other = lap_ext.trace(nn.Linear(3, 2), torch.ones(1, 3))
    LookaheadSparsifier(None, topology=other).prepare(model, None)


REFUSED: list[tuple[Callable[[nn.Module], None], type[Exception], str]] = [
    (unknown_tensor, ValueError, "expected tensor_fqn to be the full name of a layer's parameter"),
    (tensor_twice, ValueError, "expected each tensor once, got 'fc1.weight' again."),
    (tied, ValueError, "got '6.weight', which is tied. Leave it out of config."),
    (wrong_scope, ValueError, "expected scope to be 'layer' or 'global', got 'both'."),
    (example_and_topology, TypeError, "LookaheadSparsifier.prepare: expected topology alone (the"),
    (others_topology, ValueError, "expected a topology traced from this model"),
]


@pytest.mark.parametrize(
    ("act", "error", "text"), REFUSED, ids=lambda x: getattr(x, "__name__", "")
)
def test_refused_and_nothing_changed(
    act: Callable[[nn.Module], None], error: type[Exception], text: str
) -> None:
    model = cases.net()
    with pytest.raises(error) as caught:
        act(model)
    assert text in str(caught.value)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_before_prepare() -> None:
    sparsifier = LookaheadSparsifier(EXAMPLE)
    for act in (sparsifier.step, sparsifier.squash_mask, lambda: sparsifier.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"expected prepare\(model, config\) first"):
            act()
