# SPDX-License-Identifier: MIT
"""Masks of weights that a module computes: applied, kept through training, saved, handed on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lap_ext import Masks
from tests.helpers.computed_weights import ATTRIBUTES, Kind, network

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
KINDS = ["weight_norm", "old_spectral_norm"]  # a parametrization and a hook


def random_masks(seed: int = 2) -> Masks:
    shapes = {"0": (6, 6), "2": (6, 6), "4": (2, 6)}
    generator = torch.Generator().manual_seed(seed)
    return Masks({name: torch.rand(s, generator=generator) > 0.4 for name, s in shapes.items()})


def effective(model: nn.Sequential, kind: Kind) -> dict[str, Tensor]:
    return {"0": model[0].weight, "2": kind.effective(model[2]), "4": model[4].weight}


@pytest.mark.parametrize("name", KINDS)
def test_applied_saved_and_loaded(name: str, tmp_path: Path) -> None:
    kind, masks = ATTRIBUTES[name], random_masks()
    model = network(kind)
    fresh = copy.deepcopy(model)
    dense = kind.effective(model[2])
    masks.apply(model)
    for layer, weight in effective(model, kind).items():
        assert torch.equal(weight != 0, masks[layer]), layer
    assert torch.equal(kind.effective(model[2]), torch.where(masks["2"], dense, 0.0))
    masks.apply(model)  # once more changes nothing
    assert len(model.state_dict()) == len(fresh.state_dict()) + 1
    masks.save(tmp_path / "masks")
    loaded = Masks.load(tmp_path / "masks", fresh)
    assert loaded == masks
    loaded.apply(fresh)
    assert torch.equal(fresh.eval()(X), model.eval()(X))


@pytest.mark.parametrize("name", KINDS)
def test_kept_through_training(name: str) -> None:
    """The module keeps the mask, whatever trains; an optimizer of other layers will do."""
    kind, masks = ATTRIBUTES[name], random_masks()
    model = network(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = kind.effective(model[2])
    with masks.keep(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(X).square().sum().backward()
            optimizer.step()
    for layer, weight in effective(model, kind).items():
        assert torch.equal(weight != 0, masks[layer]), layer
    assert not torch.equal(kind.effective(model[2]), torch.where(masks["2"], before, 0.0))
    Masks({"2": masks["2"]}).keep(model, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))


def test_refused_and_nothing_changed() -> None:
    model = network(ATTRIBUTES["weight_norm"])
    masks, keys = random_masks(), list(model.state_dict())
    with pytest.raises(ValueError, match=r"'2': mask \[1\], parameter \[6, 6\]"):
        Masks({**masks, "2": torch.ones(1, dtype=torch.bool)}).apply(model)
    with pytest.raises(ValueError, match=r"'2': mask on meta, parameter on cpu|meta tensor"):
        Masks({**masks, "2": masks["2"].to("meta")}).apply(model)
    with pytest.raises(ValueError) as caught:
        masks.to_torch_prune(model)
    assert str(caught.value) == (
        "Masks.to_torch_prune: expected layers whose weight is a parameter, got '2', which "
        "ParametrizedLinear computes. Use Masks.apply, which registers the mask where it is "
        "computed."
    )
    assert list(model.state_dict()) == keys
    masks.apply(model)  # the way out
    assert torch.equal(model[2].weight != 0, masks["2"])
