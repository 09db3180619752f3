# SPDX-License-Identifier: MIT
"""Tensors that modules compute themselves: read, replaced for a while, masked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lap_ext
from lap_ext.computed import as_parameters, keep_only, mask_of, references, sources, value
from tests.helpers.computed_weights import ATTRIBUTES, FACTORS, network

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_computed_weight(name: str) -> None:
    model = network(ATTRIBUTES[name])
    layer = model[2]
    assert list(references(model)) == ["2.weight"] and references(model)["2.weight"].module is layer
    named = dict(model.named_parameters())
    assert sources(model) == {x for x in named if x.startswith("2.") and x != "2.bias"}
    state = copy.deepcopy(model.state_dict())
    read = value(layer.train(), "weight")
    assert not read.requires_grad and layer.training
    assert torch.equal(read, ATTRIBUTES[name].effective(layer))
    y, kind, attributes = model.eval()(X), type(layer), dict(layer.__dict__)
    with pytest.raises(KeyboardInterrupt), as_parameters(model):
        assert isinstance(layer.weight, nn.Parameter) and not references(model)
        assert torch.equal(model(X), y)
        raise KeyboardInterrupt
    assert type(layer) is kind and layer.__dict__.keys() == attributes.keys()
    assert all(layer.__dict__[key] is x for key, x in attributes.items())
    assert {x: id(p) for x, p in named.items()} == {x: id(p) for x, p in model.named_parameters()}
    assert torch.equal(model(X), y)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_mask_on_a_computed_weight(name: str) -> None:
    """It moves with the model, is copied and saved with it, and only grows."""
    kind = ATTRIBUTES[name]
    model = network(kind)
    fresh = copy.deepcopy(model.state_dict())
    first, second = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(2)) > 0.3
    assert mask_of(model[2], "weight") is None
    keep_only(model[2], "weight", first)
    keep_only(model[2], "weight", second)
    both = first & second
    assert torch.equal(mask_of(model[2], "weight"), both)
    assert torch.equal(value(model[2], "weight") != 0, both)
    assert torch.equal(kind.effective(model[2]) != 0, both)
    with torch.no_grad():  # else torch cannot copy what its own hooks have computed
        model(X)
    assert torch.equal(kind.effective(copy.deepcopy(model[2])) != 0, both)
    (extra,) = model.state_dict().keys() - fresh.keys()
    other = network(kind)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(model.state_dict())
    keep_only(other[2], "weight", torch.ones(6, 6, dtype=torch.bool))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(X), model.eval()(X)) and extra.startswith("2.")
    model.to(torch.float64)
    assert torch.equal(value(model[2], "weight") != 0, both)


@pytest.mark.parametrize("traced", [False, True])
def test_a_weight_that_is_made_permanent(traced: bool) -> None:
    """A computed weight may become a parameter again; what is pruned stays so."""
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(2)) > 0.3
    remove = {
        "weight_norm": lambda m: parametrize.remove_parametrizations(m, "weight"),
        "old_weight_norm": nn.utils.remove_weight_norm,
        "old_spectral_norm": nn.utils.remove_spectral_norm,
    }
    for name, make_permanent in remove.items():
        model = network(ATTRIBUTES[name])
        keep_only(model[2], "weight", mask)
        y = model.eval()(X)
        make_permanent(model[2])
        if traced:
            assert list(lap_ext.trace(model, X).layers) == ["0", "2", "4"]
        assert torch.equal(model(X), y), name
        assert torch.equal(model[2].weight != 0, mask) and not references(model)
        plain = nn.Linear(6, 6)
        assert model[2].state_dict().keys() == plain.state_dict().keys()


def test_what_is_not_computed() -> None:
    """Plain weights, and those that torch.nn.utils.prune multiplies with its mask."""
    for kind in FACTORS.values():
        assert not references(network(kind))


def test_recurrent_weights_and_shared_modules() -> None:
    cell = nn.LSTM(3, 4)
    parametrizations.weight_norm(cell, "weight_hh_l0")
    model = nn.ModuleList([cell, cell])
    assert list(references(model)) == ["0.weight_hh_l0", "1.weight_hh_l0"]
    x = torch.randn(5, 2, 3)
    y, _ = cell(x)
    with as_parameters(model):
        assert torch.equal(cell(x)[0], y)
    keep_only(cell, "weight_hh_l0", torch.zeros(16, 4, dtype=torch.bool))
    plain = nn.LSTM(3, 4)
    own = {name: value for name, value in cell.named_parameters() if "." not in name}
    zero = {"weight_hh_l0": torch.zeros(16, 4)}
    plain.load_state_dict({**own, **zero})
    assert torch.equal(cell(x)[0], plain(x)[0])
