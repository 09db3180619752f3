# SPDX-License-Identifier: MIT
"""The oracle of coupled groups against groups written by hand, right ones and damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import coupling_oracle
from tests.helpers.coupling_oracle import Part, Thinned, channel_sets


class Residual(nn.Module):
    """c reads a + norm(b), which d reads too; c's outputs are read by e, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.c, self.d = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4, padding=1)
        self.e, self.f = nn.ConvTranspose2d(3, 2, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x) + self.norm(self.b(x)))
        return self.e(torch.relu(self.c(x))) + self.f(self.d(x))


RIGHT = [
    *(Part("a.weight", [1]), Part("a.bias", [1]), Part("b.weight", [1])),
    *(Part("norm.weight", [1]), Part("norm.bias", [1]), Part("c.weight", None, [1])),
    *(Part("d.weight", [1]), Part("d.bias", [1]), Part("f.weight", None, [1])),
]
INNER = [Part("c.weight", [2]), Part("c.bias", [2]), Part("e.weight", [2])]


@pytest.fixture(scope="module")
def thinned() -> Thinned:
    torch.manual_seed(3)
    model = Residual()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.norm.running_mean.normal_()
    return Thinned(model, (torch.randn(2, 2, 5, 5),))


def test_independent() -> None:
    assert "import lap_ext" not in Path(coupling_oracle.__file__).read_text()


@pytest.mark.parametrize("members", [RIGHT, INNER], ids=["residual", "inner"])
def test_right_groups(thinned: Thinned, members: list[Part]) -> None:
    assert thinned.faults(members) == []
    assert thinned.differences(members) == []


@pytest.mark.parametrize("gone", range(len(RIGHT)))
def test_a_member_is_missing(thinned: Thinned, gone: int) -> None:
    damaged = RIGHT[:gone] + RIGHT[gone + 1 :]
    if RIGHT[gone].parameter not in ("b.weight", "d.weight"):  # another zero is multiplied with it
        assert thinned.faults(damaged)
    assert any("missing" in text for text in thinned.differences(damaged))


@pytest.mark.parametrize("extra", [Part("c.bias", [0]), Part("c.weight", None, [2])])
def test_a_member_is_too_much(thinned: Thinned, extra: Part) -> None:
    assert any("too much" in text for text in thinned.differences([*RIGHT, extra]))


def test_a_member_is_another_one(thinned: Thinned) -> None:
    wrong = [Part("c.weight", None, [2]) if x.parameter == "c.weight" else x for x in RIGHT]
    assert thinned.faults(wrong) and thinned.differences(wrong)


def test_what_the_network_does_not_use() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    unit = [Part("0.weight", [1]), Part("0.bias", [1]), Part("1.weight", None, [1])]
    (fault,) = Thinned(model, (torch.randn(1, 2),)).faults(unit)
    assert "nothing changes" in fault


def test_sets_of_channels() -> None:
    """d has a group for each channel: its inputs and its outputs are one."""
    free, (fixed,) = channel_sets(Residual(), (torch.randn(1, 2, 5, 5),))
    expected = {
        frozenset([*((k, "out", i) for k in "abd"), *((k, "in", i) for k in "cdf")])
        for i in range(4)
    }
    assert free == expected | {frozenset([("c", "out", i), ("e", "in", i)]) for i in range(3)}
    ends = {(k, "in", i) for k in "ab" for i in (0, 1)}
    assert fixed == ends | {(k, "out", i) for k in "ef" for i in (0, 1)}


def test_tied_uses_are_apart() -> None:
    """The columns of an embedding make what the same columns of the head read."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    thinned = Thinned(model, (torch.arange(4),))
    made, read = thinned.sides([Part("0.weight", None, [1])])
    assert list(made) == ["0.weight"] and list(read) == ["1.weight"]
    assert thinned.faults([Part("0.weight", None, [1])]) == []
