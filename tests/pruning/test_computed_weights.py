# SPDX-License-Identifier: MIT
"""Weights that are computed from parameters: what is scored, and where their masks are."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import lap_ext
from tests.helpers import computed_weights as cases
from tests.helpers.computed_weights import ATTRIBUTES, FACTORS, FORWARDS, network, plain

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
ALL = {**FACTORS, **ATTRIBUTES, **FORWARDS}
PRUNABLE = {**FACTORS, **ATTRIBUTES}


def test_scores_are_those_of_the_effective_weights() -> None:
    """All kinds in one chain, against the same chain of plain layers; nothing is changed."""
    kinds = [kind for kind in ALL.values() for _ in range(2)]  # each between two kinds
    layers = [kind.make() for kind in kinds]
    model = nn.Sequential(*layers)
    weights = [kind.effective(layer) for kind, layer in zip(kinds, layers, strict=True)]
    expected = lap_ext.scores(nn.Sequential(*map(cases.dense, weights, layers)), X)
    model.train()
    state = {key: x.clone() for key, x in model.state_dict().items()}
    scores = lap_ext.scores(model, X)
    assert list(scores) == [f"{i}{kind.name}" for i, kind in enumerate(kinds)]
    for (name, ours), of_dense in zip(scores.items(), expected.values(), strict=True):
        assert_close(ours, of_dense, msg=name)
    assert all(layer.training for layer in layers) and state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_weights_are_zero_in_the_forward(name: str) -> None:
    """The pruned model computes what it would with its effective weight times the mask."""
    kind = PRUNABLE[name]
    model = network(kind)
    before = kind.effective(model[2])
    result = lap_ext.prune(model, X, sparsity=0.6)
    mask = result.masks[f"2{kind.name}"]
    row = result.layers[1]
    assert row.kept == int(mask.sum()) == 14
    reference = plain(model, torch.where(mask, before, 0.0))
    assert torch.equal(model.eval()(X), reference(X))
    assert torch.equal(kind.effective(model[2]), reference[2].weight)
    assert row.pruned_by == ("mask" if name in ATTRIBUTES else "zeros")
    assert ("computed weights, multiplied by a mask: 2" in str(result)) == (name in ATTRIBUTES)
    assert '"pruned_by": "mask"' in result.to_json() or name in FACTORS


def test_the_masks_of_torch_stay() -> None:
    """What torch.nn.utils.prune or a mask in a forward has pruned is never kept."""
    for name in ("torch_prune", "mask", "buffer"):
        kind = FACTORS[name]
        model = network(kind)
        alive = kind.effective(model[2]) != 0
        result = lap_ext.prune(model, X, sparsity=0.0)
        assert torch.equal(result.masks[f"2{kind.name}"], alive), name
    model = network(FACTORS["gain"])  # a gain of 0 may be trained: it is no mask
    assert lap_ext.prune(model, X, sparsity=0.0).masks["2"].all()


@pytest.mark.parametrize("name", FORWARDS)
def test_a_weight_that_no_mask_reaches_is_refused(name: str) -> None:
    model = network(FORWARDS[name])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        lap_ext.prune(model, X, sparsity=0.5)
    text = str(caught.value)
    assert text.startswith(
        "prune, layer '2': expected weights that are zero where their parameter is, or that a mask "
        "can multiply, got one that a forward computes by aten."
    )
    assert " in module '2' from '2.weight', where no mask can reach it. " in text
    assert text.endswith(
        "Leave the layer out with exclude='2'. Or compute the weight in a parametrization instead "
        "of a forward, torch.nn.utils.parametrize.register_parametrization(model.2, 'weight', "
        "...), where a mask can multiply it."
    )
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    kept = lap_ext.prune(model, X, sparsity=0.5, exclude="2").masks  # the first way out
    assert list(kept) == ["0", "4"]
    reference = network(FORWARDS[name])  # its neighbors count its effective weight
    dense = plain(reference, reference[2].effective().detach())
    assert kept == lap_ext.prune(dense, X, sparsity=0.5, exclude="2").masks


def test_the_advice_for_a_forward_works() -> None:
    """The same function with a parametrization can be pruned."""
    model = network(FORWARDS["standardized"])
    layer = nn.Linear(6, 6)
    layer.load_state_dict(model[2].state_dict())
    y = model(X)
    model[2] = layer
    parametrize.register_parametrization(model[2], "weight", cases.Standardize())
    assert_close(model(X), y)
    assert lap_ext.prune(model, X, sparsity=0.5).layers[1].pruned_by == "mask"


class Factored(nn.Module):
    """A weight that is the product of two thin matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.b @ self.a)


def test_a_weight_without_a_parameter_of_its_shape() -> None:
    model = network(cases.Kind(Factored))
    text = (
        "prune: expected weights that are parameters, or computed entry by entry from a parameter "
        "of their shape, got aten.linear.default in module '2', with a weight of shape [6, 6] that "
        "is computed from '2.b', '2.a'. Compute it in a parametrization of a layer "
        '(torch.nn.utils.parametrize.register_parametrization), or pass on_unsupported="cut" to '
        "count it as a boundary (factor 1)."
    )
    with pytest.raises(lap_ext.TopologyError, match=f"^{re.escape(text)}$"):
        lap_ext.prune(model, X, sparsity=0.5)
    with pytest.warns(UserWarning, match="boundary"):
        result = lap_ext.prune(model, X, sparsity=0.5, on_unsupported="cut")
    assert list(result.masks) == ["0", "4"]

    class Product(nn.Module):
        def __init__(self, factored: Factored) -> None:
            super().__init__()
            self.a, self.b = factored.a, factored.b

        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return self.b @ self.a

    expected = model(X)
    step = Product(model[2])
    model[2] = nn.Linear(6, 6, bias=False)
    parametrize.register_parametrization(model[2], "weight", step)
    assert_close(model(X), expected)
    assert lap_ext.prune(model, X, sparsity=0.5).masks["2"].sum() == 18


@pytest.mark.parametrize(
    "name", ["mask", "gain", "torch_prune", "weight_norm", "old_spectral_norm"]
)
def test_criteria_with_data_see_the_effective_weight(name: str) -> None:
    kind = PRUNABLE[name]
    model = network(kind)
    data = [(X, torch.arange(7) % 2)]
    dense = plain(model, kind.effective(model[2]))
    expected = lap_ext.scores(dense, X, "weight_gradient", data=data)
    scores = lap_ext.scores(model, X, "weight_gradient", data=data)
    for ours, of_dense in zip(scores.values(), expected.values(), strict=True):
        assert_close(ours, of_dense)
    for criterion in ("wanda", "lookahead_act"):
        expected = lap_ext.scores(dense, X, criterion, data=[X])
        scores = lap_ext.scores(model, X, criterion, data=[X])
        for ours, of_dense in zip(scores.values(), expected.values(), strict=True):
            assert_close(ours, of_dense)
