# SPDX-License-Identifier: MIT
"""Criteria that need no data, a user's own, and what is common to all: names, roles, rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext import criteria
from lap_ext.pruning import normalization
from tests.helpers import paper_formulas as cases

NAMES = (
    *("magnitude", "magnitude_bn", "random", "lookahead", "lookforward", "lookback"),
    *("lookahead_act", "wanda", "weight_gradient", "obd", "obd_lookahead", "minitron", "reap"),
)


class Tied(nn.Module):
    """A weight that is used twice, as it is and transposed; and one used once."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 3, bias=False)
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.inlet(x), self.weight), self.weight.t())


def test_names() -> None:
    assert sorted(criteria.REGISTRY) == sorted(NAMES)
    for name in NAMES:
        made = criteria.of(name)
        assert made.name == name
        assert criteria.of(made) is made


@pytest.mark.parametrize(
    ("name", "ahead", "back"),
    [
        ("magnitude", 0, 0),
        ("lookahead", 1, 1),
        ("lookforward", 1, 0),
        ("lookback", 0, 1),
    ],
)
def test_a_chain(name: str, ahead: int, back: int) -> None:
    net = cases.conv_net()
    chain = cases.conv_chain(net)
    found = lap_ext.scores(net, torch.randn(1, 2, 4, 4), criterion=name)
    for place, layer in enumerate(cases.CONV_LAYERS):
        own = chain[place : place + 1]
        seen = chain[place - 1 : place] if back and place else []
        after = chain[place + 1 : place + 2] if ahead else []
        # alone, a layer has no neighbors, but with what follows it has its batch norm
        expected = cases.lookahead([*seen, *own, *after], len(seen))
        torch.testing.assert_close(found[layer].double(), expected, rtol=1e-6, atol=0)


def test_magnitude_with_batch_norm() -> None:
    net = cases.conv_net()
    found = lap_ext.scores(net, torch.randn(1, 2, 4, 4), criterion="magnitude_bn")
    for layer, norm in (("0", net[1]), ("3", net[4])):
        scale = cases.bn_scale(norm).abs()[:, None, None, None]
        expected = net.get_parameter(f"{layer}.weight").double().abs() * scale
        torch.testing.assert_close(found[layer].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(found["8"], net[8].weight.abs())


def test_a_tied_weight_has_the_magnitude_it_has() -> None:
    """Not sqrt(2) times as much for two uses: one ranking over layers would favor it."""
    net = Tied()
    for name in ("magnitude", lambda layer: layer.weight.abs()):
        found = lap_ext.scores(net, torch.randn(1, 4), criterion=name)
        assert torch.equal(found["weight"], net.weight.abs())
        assert torch.equal(found["inlet"], net.inlet.weight.abs())
    mask = lap_ext.prune(
        net,
        torch.randn(1, 4),
        0.5,
        criterion="magnitude",
        scope="global",
        normalize="none",
        apply=False,
    ).masks
    every = torch.cat([net.weight.flatten(), net.inlet.weight.flatten()]).abs()
    limit = every.sort(descending=True).values[10]  # 21 weights, 11 kept
    assert torch.equal(mask["weight"], net.weight.abs() >= limit)
    assert torch.equal(mask["inlet"], net.inlet.weight.abs() >= limit)


def test_random_is_by_seed_and_layer() -> None:
    net, x = cases.mlp(), torch.randn(1, 5)
    first = lap_ext.scores(net, x, criterion="random")
    assert all(bool(((s > 0) & (s <= 1)).all()) for s in first.values())
    torch.manual_seed(5)
    again = lap_ext.scores(net, x, criterion=criteria.Random(seed=0))
    other = lap_ext.scores(net, x, criterion=criteria.Random(seed=1))
    for name, score in first.items():
        assert torch.equal(score, again[name])
        assert not torch.equal(score, other[name])


def test_a_users_function() -> None:
    net, x = cases.mlp(), torch.randn(1, 5)
    seen: list[str] = []

    def largest_last(layer: lap_ext.topology.Layer) -> Tensor:
        seen.append(layer.name)
        return torch.arange(layer.weight.numel()).reshape(layer.shape).float()

    result = lap_ext.prune(net, x, 0.5, criterion=largest_last, apply=False)
    assert seen == ["0", "2", "4"]
    assert result.criterion == "custom"
    for name, mask in result.masks.items():
        n = mask.numel()
        assert torch.equal(mask.flatten(), torch.arange(n) >= n // 2), name


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (lambda layer: layer.weight[0], ValueError, r"^prune, layer '0': .* \[6, 5\], got \[5\]"),
        (lambda layer: None, ValueError, "^prune, layer '0': .*, got NoneType"),
        (lambda layer: layer.weight > 0, TypeError, "layer '0': .* floating-.*, got torch.bool"),
        (lambda layer: -layer.weight.abs() - 1, ValueError, "layer '0': .* scores >= 0 .*, got -"),
        (lambda layer: layer.weight * float("nan"), ValueError, "got nan"),
        ("lookahaed", ValueError, "Did you mean 'lookahead'?"),
        (3, TypeError, "a name, a Criterion or a function of a layer, got int"),
    ],
)
def test_errors(function: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        lap_ext.prune(cases.mlp(), torch.randn(1, 5), 0.5, criterion=function)


def test_no_data_where_none_is_read() -> None:
    with pytest.raises(ValueError, match="no data for criterion 'lookahead'"):
        lap_ext.prune(cases.mlp(), torch.randn(1, 5), 0.5, data=[torch.randn(1, 5)])


def test_a_criterion_of_ones_own_class() -> None:
    """Norms count where a class has them."""

    class Columns(criteria.Criterion):
        def norms(self, network: object, role: object) -> criteria.Norms:
            return torch.arange(5.0), None

    net = nn.Sequential(nn.Linear(5, 2))
    found = lap_ext.scores(net, torch.randn(1, 5), criterion=Columns())["0"]
    torch.testing.assert_close(found, net[0].weight.abs() * torch.arange(5.0))


class TestLamp:
    """Lee et al., ICLR 2021: each square over the sum of all that are not smaller."""

    def test_by_hand(self) -> None:
        # squares 9, 1, 4: 9/9, 1/(9+4+1), 4/(9+4)
        found = normalization.lamp(torch.tensor([3.0, 1.0, 2.0]))
        torch.testing.assert_close(found, torch.tensor([1, 1 / 14, 4 / 13], dtype=torch.float64))

    def test_ties(self) -> None:
        """Of equal scores the lower index is the larger; zeros are 0."""
        found = normalization.lamp(torch.tensor([2.0, 2.0, 0.0]))
        assert found.tolist() == [1.0, 0.5, 0.0]

    def test_global_by_hand(self) -> None:
        """Layers of other sizes and scales: 4 of 7 weights."""
        net = nn.Sequential(
            nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
        )
        for layer, values in zip(
            net, ([[3.0, 1], [2, 0.5]], [[0.02, -0.01]], [[-7.0]]), strict=True
        ):
            layer.weight.data = torch.tensor(values)
        # 1, 1/14, 4/13, .25/14.25 | 1, 1/5 | 1
        found = lap_ext.scores(net, torch.ones(1, 2), criterion="magnitude", normalize="lamp")
        expected = torch.tensor([[1, 1 / 14], [4 / 13, 0.25 / 14.25]], dtype=torch.float64)
        torch.testing.assert_close(found["0"], expected, rtol=1e-6, atol=0)
        options = {"criterion": "magnitude", "scope": "global", "normalize": "lamp", "apply": False}
        masks = lap_ext.prune(net, torch.ones(1, 2), sparsity=3 / 7, **options).masks
        assert [mask.tolist() for mask in masks.values()] == [
            [[True, False], [True, False]],
            [[True, False]],
            [[True]],
        ]

    @pytest.mark.parametrize("criterion", ["magnitude", "lookahead", "random", "wanda"])
    def test_any_criterion(self, criterion: str) -> None:
        """The largest of each layer is 1: no layer is emptied before the others have one left."""
        net = cases.conv_net()
        net[8].weight.data *= 1e-4
        data = cases.pictures(3) if criterion == "wanda" else None
        x = torch.randn(1, 2, 4, 4)
        found = lap_ext.scores(net, x, criterion=criterion, normalize="lamp", data=data)
        assert [float(s.max()) for s in found.values()] == [1.0] * 4
        total = sum(s.numel() for s in found.values())
        result = lap_ext.prune(
            net, x, 1 - 4 / total, criterion=criterion, scope="global", normalize="lamp", data=data
        )
        assert [row.kept for row in result.layers] == [1] * 4
