# SPDX-License-Identifier: MIT
"""criteria.register: a criterion of one's own under a name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext import criteria
from lap_ext.places import Chunk
from lap_ext.topology import Layer

X = torch.ones(1, 3)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = dict(criteria.REGISTRY)
    yield
    criteria.REGISTRY.clear()
    criteria.REGISTRY.update(before)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_function() -> None:
    @criteria.register("last_first")
    def last_first(layer: Layer) -> Tensor:
        return torch.arange(layer.weight.numel()).reshape(layer.shape).float()

    model = net()
    assert last_first(lap_ext.trace(model, X).layers["0"]).shape == (4, 3)  # it stays the function
    result = lap_ext.prune(model, X, 0.5, criterion="last_first")
    assert result.criterion == "last_first"
    assert result.masks["0"].flatten().tolist() == [False] * 6 + [True] * 6


def test_a_class() -> None:
    @criteria.register("magnitude_twice")
    class Twice(criteria.Criterion):
        def weight(self, network: object, chunk: Chunk) -> Tensor:
            return 2 * chunk.weight

    model = net()
    found = lap_ext.scores(model, X, criterion="magnitude_twice")
    assert isinstance(criteria.of("magnitude_twice"), Twice)
    assert lap_ext.prune(net(), X, 0.5, criterion="magnitude_twice").criterion == "magnitude_twice"
    assert torch.equal(found["0"], 2 * model[0].weight.detach().abs())


@pytest.mark.parametrize(
    ("name", "text"),
    [("lookahead", "got 'lookahead', which is taken"), ("", "got ''"), (3, "got 3")],
)
def test_names(name: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"^criteria.register: expected a name .* yet, {text}"):
        criteria.register(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(("made", "got"), [(3, "int"), (nn.Linear, "Linear")])
def test_what_is_no_criterion(made: object, got: str) -> None:
    with pytest.raises(TypeError, match=rf"^criteria\.register: expected a .* got {got}\.$"):
        criteria.register("new")(made)  # type: ignore[type-var]
    assert "new" not in criteria.REGISTRY


def test_an_error_within_a_criterion_names_what_it_called() -> None:
    @criteria.register("wrong")
    def wrong(layer: Layer) -> Tensor:
        return lap_ext.score(layer.weight, layer.weight, None)

    with pytest.raises(ValueError, match=r"^score: expected w_prev.shape\[0\] == w.shape\[1\]"):
        lap_ext.prune(net(), X, 0.5, criterion="wrong")
