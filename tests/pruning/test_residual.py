# SPDX-License-Identifier: MIT
"""residual="chain": the public code's reading of a residual net as a chain of its layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lap_ext
from tests.helpers.parameters import TOLERANCE


class Residual(nn.Module):
    """A stem, one block with a projection, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(3, 4), nn.Linear(4, 5)
        self.second, self.shortcut = nn.Linear(5, 6), nn.Linear(4, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((self.norm(self.second(self.first(x).relu())) + self.shortcut(x)).relu())


@pytest.fixture
def net() -> Residual:
    net = Residual().eval()
    nn.init.uniform_(net.norm.weight, 0.5, 1.5)
    nn.init.uniform_(net.norm.running_var, 0.5, 2.0)
    return net


def chain(net: Residual, batch_norm: bool = True) -> dict[str, torch.Tensor]:
    """The formula along stem, first, second, head."""
    w = {
        name: getattr(net, name).weight.detach().double()
        for name in ("stem", "first", "second", "head")
    }
    a = lap_ext.bn_scale(net.norm) if batch_norm else torch.ones(6, dtype=torch.float64)
    rows = {name: x.norm(dim=1) for name, x in w.items()}
    cols = {name: x.norm(dim=0) for name, x in w.items()}
    one = {3: torch.ones(3).double(), 2: torch.ones(2).double()}
    into = {
        "stem": one[3],
        "first": rows["stem"],
        "second": rows["first"],
        "head": rows["second"] * a,
    }
    out = {
        "stem": cols["first"],
        "first": cols["second"],
        "second": cols["head"] * a,
        "head": one[2],
    }
    return {name: x.abs() * into[name] * out[name][:, None] for name, x in w.items()}


@pytest.mark.parametrize("batch_norm", ["edge", "ignore"])
def test_chain_order(net: Residual, batch_norm: str) -> None:
    got = lap_ext.scores(
        net, torch.randn(2, 3), residual="chain", exclude=["shortcut"], batch_norm=batch_norm
    )
    expected = chain(net, batch_norm == "edge")
    assert set(got) == set(expected)
    for name, score in got.items():
        torch.testing.assert_close(
            score.double(), expected[name], rtol=TOLERANCE[torch.float32], atol=0
        )


def test_skips_count_otherwise(net: Residual) -> None:
    got = lap_ext.scores(net, torch.randn(2, 3), exclude=["shortcut"])
    expected = chain(net)
    assert not torch.allclose(got["head"].double(), expected["head"])  # the shortcut feeds it, too
    assert not torch.allclose(got["stem"].double(), expected["stem"])
    assert torch.allclose(got["second"].double(), expected["second"])


def test_forward_order_sees_the_pruned_producer(net: Residual) -> None:
    x = torch.randn(2, 3)
    result = lap_ext.prune(
        net, x, 0.5, residual="chain", exclude=["shortcut"], order="forward", apply=False
    )
    pruned = torch.where(result.masks["stem"], net.stem.weight.detach(), 0.0)
    assert torch.equal(
        result.masks["first"],
        lap_ext.mask(pruned, net.first.weight, net.second.weight, sparsity=0.5),
    )


def test_a_layer_without_an_edge_to_the_one_before_counts_one(net: Residual) -> None:
    got = lap_ext.scores(net, torch.randn(2, 3), residual="chain")  # ..., second, shortcut, head
    w = net.second.weight.detach().double()
    expected = w.abs() * net.first.weight.detach().double().norm(dim=1)  # shortcut reads it not
    torch.testing.assert_close(
        got["second"].double(), expected, rtol=TOLERANCE[torch.float32], atol=0
    )


def test_wrong_word(net: Residual) -> None:
    with pytest.raises(
        ValueError, match=r"^prune: expected residual to be 'sum' or 'chain', got 'x'\.$"
    ):
        lap_ext.prune(net, torch.randn(2, 3), 0.5, residual="x")
