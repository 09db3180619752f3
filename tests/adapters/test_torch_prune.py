# SPDX-License-Identifier: MIT
"""torch.nn.utils.prune with lookahead scores; the oracle is lap_ext.prune of a plain copy.

The traps of torch.nn.utils.prune are cases here: 1-D scores at a second pruning, negative scores,
the mask's dtype, hooks lost by an error, masks that pile up, deepcopy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lap_ext
from lap_ext.adapters import torch_prune
from lap_ext.adapters.torch_prune import LookaheadUnstructured, lookahead_unstructured
from tests.helpers import masked_network as cases

EXAMPLE = torch.zeros(1, 1, 6, 6)
NAMES = ("conv", "fc1", "fc2")


def masks_of(model: nn.Module) -> lap_ext.Masks:
    """What torch's masks keep."""
    return lap_ext.Masks({name: model.get_submodule(name).weight_mask == 1 for name in NAMES})


def state_of(model: nn.Module) -> list[Any]:
    """All that scoring must leave alone: objects and their order."""
    return [
        [list(map(id, x.values())) + list(x) for x in (m._parameters, m._buffers)]
        + [list(m._forward_pre_hooks.items()), id(m.__dict__.get("weight"))]
        for m in model.modules()
    ]


def test_by_hand() -> None:
    """Of equal scores the lower index is kept; the second time it counts what is left."""
    layer = nn.Linear(3, 2, bias=False)
    scores = torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 3.0]])
    assert lookahead_unstructured(layer, "weight", 3, scores) is layer
    assert layer.weight_mask.tolist() == [[0, 1, 1], [0, 0, 1]]
    lookahead_unstructured(layer, "weight", 0.5, scores)  # keeps floor(0.5 * 3 + 0.5) of 2 2 3
    assert layer.weight_mask.tolist() == [[0, 1, 0], [0, 0, 1]]
    lookahead_unstructured(layer, "weight", 1, scores)
    assert layer.weight_mask.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    prune.remove(layer, "weight")
    assert layer.weight.count_nonzero() == 1 and not prune.is_pruned(layer)


@pytest.mark.parametrize("amount", [0, 1, 7, 12, 0.0, 0.3, 0.5, 1.0, Fraction(1, 3)])
def test_exactly_as_many_as_requested(amount: float) -> None:
    layer = nn.Linear(4, 3)
    LookaheadUnstructured.apply(layer, "weight", amount, importance_scores=torch.ones(3, 4))
    kept = int(layer.weight_mask.sum())
    pruned = amount if isinstance(amount, int) else Fraction(amount) * 12
    assert kept == math.floor(12 - pruned + Fraction(1, 2))
    assert layer.weight_mask.flatten()[:kept].all(), "all equal: the first are kept"


def test_each_layer_by_itself() -> None:
    model = cases.net()
    expected = lap_ext.prune(copy.deepcopy(model), EXAMPLE, 0.75).masks
    for (module, name), scores in torch_prune.scores(model, EXAMPLE).items():
        lookahead_unstructured(module, name, 0.75, scores)
    assert masks_of(model) == expected


@pytest.mark.parametrize("amount", [0.75, 429])
def test_global_by_torch_and_by_us(amount: float) -> None:
    """torch's own global pruning, ours, and lap_ext.prune give the same masks."""
    model, other = cases.net(), cases.net()
    other.load_state_dict(model.state_dict())
    importance = torch_prune.scores(model, EXAMPLE)
    assert list(importance) == [(model.get_submodule(name), "weight") for name in NAMES]
    prune.global_unstructured(
        list(importance), LookaheadUnstructured, importance_scores=importance, amount=amount
    )
    plain = copy.deepcopy(other)
    how = {"scope": "global", "normalize": "none", "min_keep": 0}
    expected = lap_ext.prune(plain, EXAMPLE, 0.75, **how).masks
    assert expected.total == 572 and masks_of(model) == expected
    assert (
        torch_prune.apply_global_(other, EXAMPLE, 0.75, normalize="none", min_keep=0)
        == expected
        == masks_of(other)
    )
    model(EXAMPLE), other(EXAMPLE)
    assert torch.equal(model.fc1.weight, other.fc1.weight)
    expected.remove(other)
    assert torch.equal(other.fc1.weight, plain.fc1.weight)


def test_second_pruning_sees_what_is_left() -> None:
    """Scores of a pruned model are those of a plain one with these masks; nothing is changed."""
    model = cases.net()
    plain = copy.deepcopy(model)
    first = torch_prune.apply_global_(model, EXAMPLE, 0.5)
    before = state_of(model)
    importance = torch_prune.scores(model, EXAMPLE)
    assert state_of(model) == before
    expected = lap_ext.scores(plain, EXAMPLE, masks=first)
    for name in NAMES:
        assert torch.equal(importance[model.get_submodule(name), "weight"], expected[name])
    prune.global_unstructured(
        list(importance), LookaheadUnstructured, importance_scores=importance, amount=0.5
    )
    how = {"scope": "global", "normalize": "none", "min_keep": 0}
    ranked = lap_ext.prune(plain, EXAMPLE, 0.75, masks=first, **how)
    assert first.kept == 286 and masks_of(model) == ranked.masks and ranked.kept == 143


def test_a_ready_trace_and_named_inputs() -> None:
    """Of the model before torch has pruned it, and after; by pattern of the layers to prune."""
    model = cases.net()
    plain = copy.deepcopy(model)
    topology = lap_ext.trace(model, EXAMPLE)
    masks = lap_ext.Masks({})
    for sparsity in (0.3, 0.6):
        options: Any = {"layers": "fc*", "exclude": "fc2"}
        result = torch_prune.apply_global_(model, None, sparsity, topology=topology, **options)
        masks = lap_ext.prune(
            plain, {"input": EXAMPLE}, sparsity, scope="global", masks=masks, **options
        ).masks
        assert result == masks and list(masks) == ["fc1"]
    by_name = torch_prune.scores(model, {"input": EXAMPLE}, "magnitude", layers="fc*")
    ready = torch_prune.scores(model, criterion="magnitude", topology=topology, layers="fc*")
    assert [module for module, _ in by_name] == [model.fc1, model.fc2]
    assert all(torch.equal(x, ready[key]) for key, x in by_name.items())
    with pytest.raises(
        TypeError, match=r"scores: expected topology alone .*got example_inputs too"
    ):
        torch_prune.scores(model, EXAMPLE, topology=topology)


def test_global_in_steps_keeps_one_mask() -> None:
    """apply_global_ again: the same buffer, the same hook, weights that never return."""
    model = cases.net()
    plain = copy.deepcopy(model)
    masks = torch_prune.apply_global_(model, EXAMPLE, 0.3, exclude=["conv"])
    assert not prune.is_pruned(model.conv)
    hooks, buffer = dict(model.fc1._forward_pre_hooks), model.fc1.weight_mask
    for sparsity in (0.6, 0.9):
        expected = lap_ext.prune(plain, EXAMPLE, sparsity, scope="global", masks=masks).masks
        masks = torch_prune.apply_global_(model, EXAMPLE, sparsity)
        assert masks == expected == masks_of(model)
        assert torch.equal(model.fc1.weight, model.fc1.weight_orig * masks["fc1"])
    assert dict(model.fc1._forward_pre_hooks) == hooks and model.fc1.weight_mask is buffer
    masks.remove(model)
    cases.check_zero(model, masks)


def test_tensors_that_torch_pruned_otherwise() -> None:
    """A bias, and a weight pruned twice, in a container: both count as they are."""
    model = cases.net()
    plain = copy.deepcopy(model)
    prune.l1_unstructured(model.fc1, "bias", 3)
    prune.l1_unstructured(model.fc1, "weight", 0.5)
    prune.random_unstructured(model.fc1, "weight", 0.5)
    given = lap_ext.Masks({"fc1": model.fc1.weight_mask == 1})
    masks = torch_prune.apply_global_(model, EXAMPLE, 0.8)
    assert masks == lap_ext.prune(plain, EXAMPLE, 0.8, scope="global", masks=given).masks
    assert model.fc1.bias_mask.sum() == 5 and prune.is_pruned(model.fc1)


def test_recurrent_layers() -> None:
    """Weights that the module also lists elsewhere, several of them with a hook each."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model, x = Model(), torch.randn(5, 2, 3)
    plain = copy.deepcopy(model)
    torch_prune.apply_global_(model, x, 0.25)
    masks = torch_prune.apply_global_(model, x, 0.5)
    assert list(masks) == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"] and masks.kept == 56
    masks.apply(plain)
    assert torch.equal(model(x), plain(x))
    masks.remove(model)
    assert torch.equal(model(x), plain(x))


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).tanh())

    model = Tied()
    for sparsity in (0.25, 0.5):
        masks = torch_prune.apply_global_(model, torch.arange(6), sparsity, layers="*")
        model(torch.arange(6))
        assert list(masks) == ["embed"] and masks.kept == 24 * (1 - sparsity)
        for layer in (model.embed, model.head):
            assert torch.equal(layer.weight != 0, masks["embed"])
    assert list(torch_prune.scores(model, torch.arange(6))) == []  # dense by default
    scores = torch_prune.scores(model, torch.arange(6), layers="*")
    assert list(scores) == [(model.embed, "weight")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_masks_have_the_weights_dtype(dtype: torch.dtype) -> None:
    """Scores of bfloat16 weights are float32: neither mask nor weight becomes that."""
    model = cases.net(dtype)
    importance = torch_prune.scores(model, EXAMPLE.to(dtype))
    for _ in range(2):
        prune.global_unstructured(
            list(importance), LookaheadUnstructured, importance_scores=importance, amount=0.5
        )
        assert model.fc1.weight_mask.dtype == model.fc1.weight.dtype == dtype
        assert model(torch.ones(1, 1, 6, 6, dtype=dtype)).dtype == dtype
    other = nn.Linear(4, 4).to(dtype)
    lookahead_unstructured(other, "weight", 4, torch.rand(4, 4))
    assert other.weight_mask.dtype == dtype and other.weight_mask.sum() == 12


def test_training_moves_only_what_is_left() -> None:
    model = cases.net()
    masks = torch_prune.apply_global_(model, EXAMPLE, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    cases.train(model, optimizer, cases.batches(3))
    masks.remove(model)
    cases.check_zero(model, masks)


def test_deepcopy() -> None:
    """torch's own trap: the weight of a module just pruned is no leaf."""
    layer = nn.Linear(3, 2)
    lookahead_unstructured(layer, "weight", 0.5, torch.rand(2, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer)
    with torch.no_grad():
        layer(torch.ones(1, 3))
    other = copy.deepcopy(layer)
    assert torch.equal(other.weight_mask, layer.weight_mask) and prune.is_pruned(other)


def test_an_error_while_scoring_changes_nothing() -> None:
    model = cases.net()
    torch_prune.apply_global_(model, EXAMPLE, 0.5)
    before = state_of(model)
    model.fc1.weight_orig.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="fc1"):
        torch_prune.scores(model, EXAMPLE)
    with pytest.raises(TypeError):
        torch_prune.apply_global_(model, EXAMPLE, "half")
    assert state_of(model) == before


def weights_only(layer: nn.Linear) -> None:
    prune.global_unstructured([(layer, "weight")], LookaheadUnstructured, amount=0.5)


def frozen(layer: nn.Linear) -> None:
    layer.weight_orig.requires_grad_(False)
    layer(torch.ones(1, 3))
    weights_only(layer)


def applied(amount: Any, scores: Any = None) -> Callable[[nn.Linear], None]:
    def apply(layer: nn.Linear) -> None:
        LookaheadUnstructured.apply(layer, "weight", amount, importance_scores=scores)

    return apply


ONES, NAN = torch.ones(2, 3), torch.tensor([[1.0, 1.0, float("nan")], [1.0, 1.0, 1.0]])
REFUSED: list[tuple[str, Callable[[nn.Linear], None], type[Exception], str]] = [
    ("no scores", applied(0.5), TypeError, "expected importance_scores (a module does not know"),
    ("weights", weights_only, ValueError, "expected importance scores for every tensor, got param"),
    ("frozen weights", frozen, ValueError, "expected importance scores >= 0, got -"),
    ("negative", applied(1, -9 * ONES), ValueError, "expected importance scores >= 0, got -9.0."),
    ("nan", applied(1, NAN), ValueError, "expected importance scores >= 0, got nan."),
    ("shape", applied(1, ONES.T), ValueError, "expected importance_scores like weight of Linear"),
    ("device", applied(1, ONES.to("meta")), ValueError, "got [2, 3] on meta and [2, 3] on cpu"),
    ("too many", applied(6, ONES), ValueError, "expected amount <= 5 (the weights that are not"),
    ("percent", applied(90.0, ONES), ValueError, "expected 0 <= amount <= 1 (the fraction of the"),
    ("below", applied(-1, ONES), ValueError, "expected amount >= 0, got -1."),
    ("nan amount", applied(float("nan"), ONES), ValueError, "expected 0 <= amount <= 1"),
    ("type", applied("0.5", ONES), TypeError, "expected amount to be a float (the fraction of"),
    ("bool", applied(True, ONES), TypeError, "got bool."),
]


@pytest.mark.parametrize(
    ("act", "error", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refused_and_nothing_changed(
    act: Callable[[nn.Linear], None], error: type[Exception], text: str
) -> None:
    """Also of a layer that is pruned: torch alone would have dropped its hook by then."""
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0], [0.5, -1.0, 2.0]])
    lookahead_unstructured(layer, "weight", 1, layer.weight.abs().detach())
    hooks, mask = dict(layer._forward_pre_hooks), layer.weight_mask.clone()
    with pytest.raises(error) as caught:
        act(layer)
    assert str(caught.value).startswith("LookaheadUnstructured: ") and text in str(caught.value)
    assert dict(layer._forward_pre_hooks) == hooks and torch.equal(layer.weight_mask, mask)


def test_layers_that_torch_cannot_mask_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model, x = Model(), torch.ones(2, 1, 4)
    with pytest.raises(ValueError, match="expected layers whose module is called"):
        torch_prune.apply_global_(model, x, 0.5)
    assert not prune.is_pruned(model)
    masks = torch_prune.apply_global_(model, x, 0.5, exclude="*.out_proj")
    assert list(masks) == ["attention.in_proj_weight"] and masks.kept == 24
