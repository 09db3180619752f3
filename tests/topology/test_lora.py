# SPDX-License-Identifier: MIT
"""Low-rank adapters as PEFT writes them: h + s B(A(dropout(x))), several at once, and DoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lap_ext

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
SCALING = 0.5


class Lora(nn.Module):
    """PEFT's Linear: layers base_layer, lora_A.<adapter> and lora_B.<adapter>.

    PEFT takes the weights of an adapter for DoRA by passing an identity matrix through its layers.
    """

    def __init__(self, into: int, out: int, adapters: list[str], dora: bool) -> None:
        super().__init__()
        self.base_layer, self.dora, self.dropout = nn.Linear(into, out), dora, nn.Dropout(0.1)
        self.lora_A = nn.ModuleDict({name: nn.Linear(into, 2, bias=False) for name in adapters})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, out, bias=False) for name in adapters})
        self.magnitude = nn.Parameter(torch.linspace(0.5, 2.0, out))

    def scale(self) -> Tensor:
        """DoRA's magnitude / ||w + s b a||."""
        (a,), (b,) = self.lora_A.values(), self.lora_B.values()
        low_rank = b(a(torch.eye(a.weight.shape[1]))).T
        norm = torch.linalg.norm(self.base_layer.weight + SCALING * low_rank.detach(), dim=1)
        return (self.magnitude / norm.detach()).view(1, -1)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        for a, b in zip(self.lora_A.values(), self.lora_B.values(), strict=True):
            low_rank = b(a(self.dropout(x))) * SCALING
            result = self.scale() * (result + low_rank) if self.dora else result + low_rank
        return result


def network(adapters: list[str], dora: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), Lora(5, 4, adapters, dora), nn.ReLU(), nn.Linear(4, 2)
    )


@pytest.mark.parametrize("adapters", [["one"], ["one", "two"]], ids=len)
def test_adapters_are_layers(adapters: list[str]) -> None:
    model = network(adapters)
    layers = lap_ext.trace(model, X).layers
    paths = [f"2.lora_B.{name}" for name in adapters]
    assert sorted(layers) == sorted(
        ["0", "2.base_layer", *(f"2.lora_A.{name}" for name in adapters), *paths, "4"]
    )
    assert {e.name: e.scale for e in layers["4"].prev}["2.base_layer"] is None
    for edge in layers["4"].prev[1:]:
        assert edge.name in paths and bool((edge.scale == SCALING).all())
    assert [e.name for e in layers["2.lora_A.one"].next] == ["2.lora_B.one"]
    assert len(layers["0"].next) == 1 + len(adapters)
    result = lap_ext.prune(model, X, sparsity=0.5)
    assert result.sparsity == 0.5 and {row.pruned_by for row in result.layers} == {"zeros"}


def test_magnitudes_are_scales() -> None:
    """The norms around the layers are those of DoRA's scaled sum."""
    model = network(["one"], dora=True)
    lora = model[2]
    layers = lap_ext.trace(model, X).layers
    assert list(layers) == ["0", "2.base_layer", "2.lora_A.one", "2.lora_B.one", "4"]
    scale = lora.scale().detach().double().flatten()
    edges = {edge.name: edge for edge in layers["4"].prev}
    assert_close(edges["2.base_layer"].scale, scale)
    assert_close(edges["2.lora_B.one"].scale, scale * SCALING)
    scores = lap_ext.scores(model, X)
    base, b, last = (x.weight.detach() for x in (lora.base_layer, lora.lora_B["one"], model[4]))
    rows = (base.norm(dim=1) ** 2 + (SCALING * b.norm(dim=1)) ** 2) * scale.float() ** 2
    assert_close(scores["4"], last.abs() * rows.sqrt())
    into, out = model[0].weight.detach().norm(dim=1), last.norm(dim=0) * scale.float()
    assert_close(scores["2.base_layer"], base.abs() * into * out[:, None])


def test_a_layer_of_an_identity_matrix_alone() -> None:
    """A table of positions that is read by one-hot vectors is a layer as before."""
    table = nn.Linear(4, 5, bias=False)

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table, self.last = nn.Linear(6, 5), table, nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)[:, None] + self.table(torch.eye(4)))

    assert list(lap_ext.trace(Positions(), X).layers) == ["first", "table", "last"]
