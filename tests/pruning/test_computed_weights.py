# SPDX-License-Identifier: MIT
"""Weights that are computed from parameters: what is scored, and where their masks are."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import lap_ext
from lap_ext.schedule import iterative, one_shot
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
    assert ("Computed weights, multiplied by a mask: '2'" in str(result)) == (name in ATTRIBUTES)
    assert '"pruned_by": "mask"' in result.to_json() or name in FACTORS
    if name in ATTRIBUTES:
        assert lap_ext.sparsity(model) == result.masks.sparsity


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
        "of a forward, torch.nn.utils.parametrize.register_parametrization("
        "model.get_submodule('2'), 'weight', ...), where a mask can multiply it."
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
        "(torch.nn.utils.parametrize.register_parametrization). Otherwise: Pass "
    )
    text = re.escape(text).replace("2\\.a'\\.", r"2\.a' \(test_computed_weights\.py:\d+\)\.")
    with pytest.raises(lap_ext.TopologyError, match=f"^{text}"):
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


@pytest.mark.parametrize("name", ["weight_norm", "old_spectral_norm", "torch_prune"])
def test_pruning_in_training_and_resuming(name: str) -> None:
    """Masks grow with the schedule, hold in training, and a new run loads them."""
    kind = PRUNABLE[name]

    def run() -> tuple[nn.Sequential, torch.optim.Optimizer, lap_ext.Pruner]:
        model = network(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = iterative(0.5, rounds=2, every=2)
        return model, optimizer, lap_ext.Pruner(model, X, schedule, optimizer=optimizer)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: lap_ext.Pruner) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(X).square().sum().backward()
            optimizer.step()
            pruner.step()

    model, optimizer, pruner = run()
    train(model, optimizer, pruner)
    first = pruner.masks[f"2{kind.name}"]
    saved = copy.deepcopy([x.state_dict() for x in (model, optimizer, pruner)])
    train(model, optimizer, pruner)
    mask = pruner.masks[f"2{kind.name}"]
    assert pruner.sparsity == 0.75 and not (mask & ~first).any()
    assert torch.equal(kind.effective(model[2]) != 0, mask)
    again = run()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    assert again[2].masks[f"2{kind.name}"].sum() == first.sum()
    train(*again)
    assert again[2].masks == pruner.masks
    assert all(map(torch.equal, again[0].state_dict().values(), model.state_dict().values()))


def test_an_optimizer_of_computed_weights_alone() -> None:
    """Their modules keep the masks: no optimizer has to."""
    model = network(ATTRIBUTES["weight_norm"])
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    pruner = lap_ext.Pruner(model, X, one_shot(0.5), optimizer=optimizer, layers="2")
    pruner.step()
    optimizer.step()
    assert int(model[2].weight.count_nonzero()) == 18


class StdConv(nn.Conv2d):
    """As in timm: standardization by a batch norm over the view of the weight, with a gain."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out, 3, groups=2)
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, out))

    def effective(self) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        w = nn.functional.batch_norm(flat, None, None, weight=self.gain, training=True, momentum=0)
        return w.reshape_as(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.effective(), self.bias)


def test_convolutions() -> None:
    """A standardized one between one with a weight norm and one whose weight is scaled."""
    torch.manual_seed(0)

    class Scaled(nn.ConvTranspose2d):
        def __init__(self) -> None:
            super().__init__(4, 2, 3)
            self.register_buffer("scale", torch.tensor([[[[0.5]], [[2.0]]]]))

        def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
            return nn.functional.conv_transpose2d(x, self.weight * self.scale, self.bias)

    convs = parametrizations.weight_norm(nn.Conv2d(2, 4, 3), dim=1), StdConv(4, 4), Scaled()
    plain = [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3)]
    weights = convs[0].weight, convs[1].effective(), convs[2].weight * convs[2].scale
    for layer, weight in zip(plain, weights, strict=True):
        layer.weight.data.copy_(weight)
    image, model = torch.randn(1, 2, 8, 8), nn.Sequential(*convs)
    masks = lap_ext.prune(
        nn.Sequential(*plain), image, sparsity=0.5, exclude="1", scope="global"
    ).masks
    with pytest.raises(ValueError, match=r"layer '1'.* computes by aten\.batch_norm"):
        lap_ext.prune(model, image, sparsity=0.5)
    result = lap_ext.prune(model, image, sparsity=0.5, exclude="1", scope="global")
    assert result.masks == masks
    assert [row.pruned_by for row in result.layers] == ["mask", "zeros"]
    assert torch.equal(convs[0].weight != 0, masks["0"])
    assert torch.equal(convs[2].weight != 0, masks["2"])


def test_one_parameter_in_several_computations() -> None:
    """Called twice it is one layer; uses that differ are scored by the parameter itself."""

    class Twice(nn.Module):
        def __init__(self, other: float) -> None:
            super().__init__()
            self.w, self.other = nn.Parameter(torch.randn(6, 6)), other
            self.register_buffer("scale", torch.linspace(1.0, 2.0, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(x, self.w * self.scale)
            return nn.functional.linear(x, self.w * self.scale * self.other)

    for other in (1.0, 3.0):
        model = nn.Sequential(Twice(other))
        layer = lap_ext.trace(model, X).layers["0.w"]
        assert torch.equal(layer.effective, layer.weight)
        assert lap_ext.prune(model, X, sparsity=0.5).masks["0.w"].sum() == 18
    standard = nn.Sequential(StdConv(4, 4))
    image = torch.randn(1, 4, 8, 8)
    shared = nn.Sequential(standard, nn.ReLU(), standard)
    layer = lap_ext.trace(shared, image).layers["0.0"]
    assert layer.pruned_by == "nothing" and len(layer.roles) == 2
    assert_close(layer.effective, standard[0].effective())
