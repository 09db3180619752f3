# SPDX-License-Identifier: MIT
"""Pruner with units across layers: whole channels go, stay away through training, and resume.

The oracle is the definition: a channel that is gone has no row, no bias, no norm and no column.
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext import allocation
from lap_ext.pruning.pruner import Pruner
from lap_ext.schedule import linear

EXAMPLE = torch.ones(2, 3, 6, 6)
SCHEDULE = linear(0.5, start=1, end=5, every=2)


class Net(nn.Module):
    """Two branches of 12 channels that are added after batch norms; 8 channels before the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.two, self.bn2 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.three, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 4)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.bias, 0.1, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.one(x)) + self.bn2(self.two(x)))
        return self.head(torch.relu(self.three(y)).mean((2, 3)))  # type: ignore[no-any-return]


MADE = ("one.weight", "one.bias", "two.weight", "two.bias",
        "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")  # fmt: skip
NAMES = {"one", "one.bias", "two", "two.bias", "bn1", "bn1.bias", "bn2", "bn2.bias", "three",
         "three.bias", "head"}  # fmt: skip


def channels(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Which of the 12 and of the 8 channels are left; every one is whole or gone."""
    state = dict(model.named_parameters())
    rows = [state[name].detach().reshape(12, -1) for name in MADE]
    rows.append(state["three.weight"].detach().reshape(8, 12).T)
    inner = [state[name].detach().reshape(8, -1) for name in ("three.weight", "three.bias")]
    inner.append(state["head.weight"].detach().T)
    found = []
    for every in (rows, inner):
        alive = torch.stack([x.any(1) for x in every])
        assert torch.equal(alive.all(0), alive.any(0))
        found.append(alive.all(0))
    return found[0], found[1]


def train(model: nn.Module, optimizers: list[Any], pruner: Pruner, steps: int, seed: int) -> None:
    """Steps of training in train mode, each followed by the pruner's."""
    model.train()
    torch.manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 6)
        model.zero_grad()
        (model(x) - 1).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step()


@pytest.mark.parametrize("kept_by", ["AdamW", "SGD", "step"])
def test_whole_channels_go_and_stay_away(kept_by: str) -> None:
    model = Net()
    kinds: dict[str, Any] = {
        "AdamW": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
        "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "step": lambda p: torch.optim.SGD(p, 0.1),
    }
    optimizer = kinds[kept_by](model.parameters())
    given = None if kept_by == "step" else optimizer
    pruner = Pruner(model, EXAMPLE, SCHEDULE, optimizer=given, structure="channel")
    before = torch.ones(12, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    for step in range(8):
        train(model, [optimizer], pruner, 1, step)
        now = channels(model)
        for a, b, size in zip(before, now, (12, 8), strict=True):
            assert not (b & ~a).any(), "a channel came back"
            sparsity = SCHEDULE(min(step - (step % 2 == 0), 5)) if step else 0.0
            assert int(b.sum()) == int((1 - (sparsity or 0.0)) * size + 0.5)
        before = now
    assert pruner.result is not None and set(pruner.masks) == NAMES
    assert [(x.kept, x.total) for x in pruner.result.families] == [(6, 12), (4, 8)]
    assert [x.reason for x in pruner.result.fixed] == ["an output of the model"]
    assert "channels of" in str(pruner.result) and pruner.masks.structure == "channel"
    assert [row.name for row in pruner.result.layers] == ["one", "two", "three", "head"]
    assert pruner.masks.check(model) == {}
    if kept_by == "AdamW":
        for name in MADE:
            state = optimizer.state[model.get_parameter(name)]
            gone = ~pruner.masks[name.removesuffix(".weight")]
            assert not state["exp_avg"][gone].any() and state["exp_avg"][~gone].any()


def test_each_pruning_is_that_of_prune_with_the_masks_so_far() -> None:
    model = Net()
    pruner = Pruner(model, EXAMPLE, SCHEDULE, structure="channel", scope="global")
    masks: Any = None
    for step in range(6):
        twin = copy.deepcopy(model)
        result = pruner.step()
        if result is None:
            continue
        given = {"structure": "channel", "scope": "global", "masks": masks}
        want = lap_ext.prune(twin, EXAMPLE, SCHEDULE(step), **given)
        assert result.masks == want.masks and list(result.families) == list(want.families)
        masks = want.masks
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.rand_like(parameter) + 0.5)


def resumed(state: Any, structure: str = "channel", **options: Any) -> tuple[Net, Any, Pruner]:
    """A run, built from nothing, and loaded."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = Pruner(model, EXAMPLE, SCHEDULE, optimizer=optimizer, structure=structure, **options)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
    return model, optimizer, pruner


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_a_resumed_run_is_the_same_bit_for_bit(steps: int) -> None:
    options = {"cost": "weights", "uniform": True}
    model, optimizer, pruner = resumed(None, **options)
    for seed in range(steps):
        train(model, [optimizer], pruner, 1, seed)
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "pruner": pruner.state_dict(),
    }
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    again, other, second = resumed(torch.load(file, weights_only=True), **options)
    assert second.masks == pruner.masks
    assert (second.result is None) == (pruner.result is None)
    if second.result is not None and pruner.result is not None:
        assert list(second.result.families) == list(pruner.result.families)
        assert list(second.result.fixed) == list(pruner.result.fixed)
    for seed in range(steps, 9):
        train(model, [optimizer], pruner, 1, seed)
        train(again, [other], second, 1, seed)
    for (name, mine), theirs in zip(model.state_dict().items(), again.state_dict().values(),
                                    strict=True):  # fmt: skip
        assert torch.equal(mine, theirs), name
    assert second.masks == pruner.masks and second.masks["one.bias"].sum() == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"structure": "unit"}, "structure: channel in the state, unit here"),
        ({"cost": "flops"}, "cost: none in the state, flops here"),
        ({"uniform": True}, "uniform: False in the state, True here"),
    ],
    ids=["structure", "cost", "uniform"],
)
def test_a_state_of_other_options(options: dict[str, Any], said: str) -> None:
    state = Pruner(Net(), EXAMPLE, SCHEDULE, structure="channel").state_dict()
    if options.get("structure") == "unit":
        state["layers"] = {name: x for name, x in state["layers"].items() if "b" not in name}
    with pytest.raises(ValueError, match=said):
        other = Pruner(Net(), EXAMPLE, SCHEDULE, **{"structure": "channel"} | options)
        if "structure" in options:
            state["layers"] = other.state_dict()["layers"]
        other.load_state_dict(state)


def test_states_of_older_versions_have_neither_cost_nor_uniform() -> None:
    pruner = Pruner(Net(), EXAMPLE, SCHEDULE, structure="row")
    state = pruner.state_dict()
    del state["options"]["cost"], state["options"]["uniform"]
    pruner.load_state_dict(state)


def test_a_target_and_a_copy() -> None:
    """A schedule may say what remains of the model; a copied pruner goes on by itself."""
    model = Net()
    total = sum(x.numel() for x in model.parameters())
    pruner = Pruner(model, EXAMPLE, lambda step: allocation.params(0.6), structure="channel")
    result = pruner.step()
    assert result is not None
    alive = channels(model)
    twelve, eight = (int(x.sum()) for x in alive)
    left = twelve * 2 * (27 + 3) + eight * (twelve + 1) + eight * 4 + 4
    assert left <= 0.6 * total
    assert pruner.state_dict()["prunings"] == [[0, "params:0.6"]]
    twin, second = copy.deepcopy((model, pruner))
    assert second.masks == pruner.masks
    with torch.no_grad():
        twin.one.bias.fill_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second.step()
    assert torch.equal(twin.one.bias != 0, second.masks["one.bias"])
