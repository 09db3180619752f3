# SPDX-License-Identifier: MIT
"""Facts that the trace notes beside the channels, where it must stop looking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.topology import noting

TOKENS = torch.randn(2, 5, 8)


class Attention(nn.Module):
    """Two heads, written out; then a product with a matrix of zeros and ones that data makes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.chosen, self.value, self.last = nn.Linear(8, 5), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        x = self.out((weights @ v).transpose(1, 2).reshape(2, 5, 8))
        chosen = (self.chosen(x) > 0).float()
        mixed = chosen[:, None] @ self.value(x).view(2, 5, 2, 4).transpose(1, 2)
        last: Tensor = self.last(mixed.transpose(1, 2).reshape(2, 5, 8))
        return last


def test_a_product_of_data_is_no_attention_of_an_earlier_one() -> None:
    topology = lap_ext.trace(Attention().eval(), TOKENS)
    assert len(topology.graph.facts.heads) == 1
    (family,) = topology.groups("head").families
    assert family.layers == ("qkv",) and family.groups.numel() == 2


class Positions(nn.Module):
    """A table of positions is added to the channels between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(1, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x) + self.table)
        return result


def test_a_table_goes_with_its_channels() -> None:
    found = lap_ext.trace(Positions(), TOKENS).groups("channel")
    assert [x.parameter for x in found[2].members] == ["a.weight", "b.weight", "a.bias", "table"]
    assert found[2].members[-1].rows is not None
    assert found[2].members[-1].rows.tolist() == [2, 8, 14, 20, 26]


def test_a_table_that_is_too_large_fixes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noting, "_MOST", 29)
    found = lap_ext.trace(Positions(), TOKENS).groups("channel")
    reasons = {x.layer: x.reason for x in found.fixed}
    assert not len(found) and reasons["a"] == "'table' has too many entries to be followed"
