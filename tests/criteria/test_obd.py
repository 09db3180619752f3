# SPDX-License-Identifier: MIT
"""Optimal brain damage: BackPACK's diagonals against autograd's Hessian, entry by entry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext import criteria
from lap_ext.criteria.statistics.curvature import hessian_diagonals
from tests.helpers import paper_formulas as cases

needs_backpack = pytest.mark.skipif(
    find_spec("backpack") is None, reason="the extra obd is not installed"
)
Batches = Sequence[tuple[Tensor, Tensor]]


class Functional(nn.Module):
    """A chain whose steps are functions, with names that are not in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.z_conv = nn.Conv2d(1, 3, 3, padding="same", groups=1)
        self.norm = nn.BatchNorm2d(3)
        self.y_conv = nn.Conv2d(3, 6, 2, stride=2, groups=3)
        self.a_linear = nn.Linear(6, 4)
        self.flat = nn.BatchNorm1d(4, affine=False)
        self.outlet = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.norm(self.z_conv(x))), 2, ceil_mode=True)
        x = F.adaptive_avg_pool2d(F.elu_(self.y_conv(x)), 1).view(len(x), -1)
        x = torch.sigmoid(self.flat(F.dropout(self.a_linear(x), training=self.training)))
        return self.outlet(x)


def diagonals(net: nn.Module, data: Batches, curvature: str = "hessian") -> dict[str, Tensor]:
    topology = lap_ext.trace(net, data[0][0][:1])
    return hessian_diagonals(topology, data, None, curvature)


def by_autograd(net: nn.Module, data: Batches, name: str) -> Tensor:
    """The diagonal of the whole Hessian of the mean loss with respect to one weight."""
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    weight = net.get_parameter(f"{name}.weight").detach()

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, {f"{name}.weight": w}, x), y)

    whole = torch.autograd.functional.hessian(loss, weight, vectorize=True)
    return whole.reshape(weight.numel(), -1).diagonal().reshape(weight.shape)


def doubled(data: Batches) -> Batches:
    return [(x.double(), y) for x, y in data]


@needs_backpack
class TestDiagonals:
    """Exact: a sum over batches of different sizes, batch norms, functions."""

    def test_a_chain_of_functions(self) -> None:
        net = Functional().double()
        cases.unsettle(net)
        data = doubled([(torch.randn(n, 1, 8, 8), torch.randint(0, 3, (n,))) for n in (2, 5)])
        net.train()  # measured in evaluation mode all the same
        found = diagonals(net, data)
        assert sorted(found) == ["a_linear", "outlet", "y_conv", "z_conv"]
        net.eval()
        for name, h in found.items():
            torch.testing.assert_close(h, by_autograd(net, data, name), rtol=1e-9, atol=1e-15)
            assert h.shape == net.get_parameter(f"{name}.weight").shape

    def test_a_convolution_right_behind_another(self) -> None:
        """Bug 16 of the public code, which looks whether the module before is a convolution."""
        net = nn.Sequential(
            *(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)),
            *(nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
        )
        cases.unsettle(net)
        net.double().eval()
        data = [(torch.randn(3, 1, 2, 2).double(), torch.tensor([0, 2, 1]))]
        found = diagonals(net, data)
        assert list(found) == ["0", "1", "3", "6"]
        for name, h in found.items():
            torch.testing.assert_close(h, by_autograd(net, data, name))

    def test_piecewise_linear(self) -> None:
        """Both curvatures are the same there."""
        net = cases.conv_net().double()
        data = doubled(cases.pictures(3, 4))
        found = [diagonals(net, data, curvature) for curvature in ("hessian", "ggn")]
        net.eval()
        for name in cases.CONV_LAYERS:
            expected = by_autograd(net, data, name)
            for h in found:
                torch.testing.assert_close(h[name], expected, rtol=1e-9, atol=1e-15)

    def test_gauss_newton_is_never_negative(self) -> None:
        net, data = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), cases.rows(4)
        net[0].weight.data *= 3
        assert float(diagonals(net, data, "hessian")["0"].min()) < 0
        assert float(diagonals(net, data, "ggn")["0"].min()) >= 0

    def test_transposed_and_1d(self) -> None:
        net = nn.Sequential(
            *(nn.Conv1d(2, 3, 3), nn.Sigmoid(), nn.ConvTranspose1d(3, 2, 2, stride=2)),
            *(nn.AvgPool1d(2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8, 3)),
        ).double()
        data = doubled([(torch.randn(3, 2, 6), torch.tensor([0, 1, 2]))])
        for name, h in diagonals(net, data).items():
            torch.testing.assert_close(h, by_autograd(net, data, name), rtol=1e-9, atol=1e-15)

    def test_half_precision_is_measured_in_float32(self) -> None:
        net = cases.mlp().bfloat16()
        data = cases.rows(4)
        found = diagonals(net, [(x.bfloat16(), y) for x, y in data])
        assert {h.dtype for h in found.values()} == {torch.float32}


@needs_backpack
class TestScores:
    """From h to scores."""

    def test_by_hand(self) -> None:
        """One linear layer and the squared error: h = 2 mean of x_i^2 / outputs."""
        net = nn.Sequential(nn.Linear(2, 1, bias=False))
        net[0].weight.data = torch.tensor([[3.0, -4.0]])
        data = [
            (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)),
            (torch.ones(3, 2), torch.ones(3, 1)),
        ]
        criterion = criteria.OBD(loss=nn.MSELoss())
        found = lap_ext.scores(net, torch.ones(1, 2), criterion=criterion, data=data)
        # h / 2: (1 + 3) / 4 and (4 + 3) / 4
        expected = torch.tensor([[3 * 1.0, 4 * (7 / 4) ** 0.5]])
        torch.testing.assert_close(found["0"], expected)

    def test_ranks_as_the_square_does(self) -> None:
        net, data = cases.mlp(), cases.rows(5)
        found = lap_ext.scores(net, torch.ones(1, 5), criterion="obd", data=data)
        masks = lap_ext.prune(
            net, torch.ones(1, 5), 0.5, criterion="obd", data=data, apply=False
        ).masks
        for name, h in diagonals(net, data).items():
            weight = net.get_parameter(f"{name}.weight").detach()
            square = h.clamp(min=0) / 2 * weight**2
            torch.testing.assert_close(found[name] ** 2, square, rtol=1e-5, atol=0)
            assert torch.equal(
                masks[name], lap_ext.topk_mask(found[name], keep=int(masks[name].sum()))
            )

    def test_lookahead_of_surrogates(self) -> None:
        """The paper's OBD+LAP: lookahead of sqrt(h) |w|."""
        net, data = cases.conv_net(), cases.pictures(4)
        found = lap_ext.scores(net, data[0][0][:1], criterion="obd_lookahead", data=data)
        h = diagonals(net, data)
        chain = [
            link._replace(weight=link.weight.detach() * h[name].clamp(min=0).sqrt())
            for name, link in zip(cases.CONV_LAYERS, cases.conv_chain(net), strict=True)
        ]
        for place, name in enumerate(cases.CONV_LAYERS):
            expected = cases.lookahead(chain, place)
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-12)

    def test_options(self) -> None:
        net, data = cases.mlp(), cases.rows(5)
        ggn = lap_ext.scores(net, torch.ones(1, 5), criterion=criteria.OBD("ggn"), data=data)
        exact = lap_ext.scores(net, torch.ones(1, 5), criterion=criteria.OBD(), data=data)
        assert not torch.allclose(ggn["0"], exact["0"])  # tanh curves
        torch.testing.assert_close(ggn["4"], exact["4"])  # the last layer is linear
        with pytest.raises(ValueError, match="expected curvature to be"):
            criteria.OBD("fisher")
        with pytest.raises(ValueError, match=r"reduction='mean' .* got reduction='sum'"):
            criteria.OBD(loss=nn.CrossEntropyLoss(reduction="sum"))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.block, self.outlet = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        return self.outlet(x + self.block(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.again, self.outlet = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outlet(self.again(torch.tanh(self.again(self.inlet(x)))))


class Inner(nn.Module):
    """A module of one's own inside a chain."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1)


@needs_backpack
@pytest.mark.parametrize(
    ("net", "text"),
    [
        (Residual(), "got a join, a split or a computed weight in Residual.forward"),
        (Twice(), r"got a second use of weight 'again' in module 'again' \(Linear\)"),
        (
            nn.Sequential(nn.Linear(5, 4), Inner(), nn.Linear(4, 3)),
            r"got aten.softmax.int in module '1' \(Inner\)",
        ),
        (
            nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
            r"got aten.layer_norm.default in module '1' \(LayerNorm\)",
        ),
        (
            nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            r"got a batch norm without running statistics in module '1' \(BatchNorm1d\)",
        ),
    ],
)
def test_no_chain(net: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match=f"prune: expected a chain of layers .*{text}"):
        lap_ext.prune(net, torch.randn(2, 5), 0.5, criterion="obd", data=cases.rows(3))


@needs_backpack
def test_batches_of_one_size() -> None:
    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    data = [(torch.randn(2, 1, n), torch.tensor([0, 1])) for n in (4, 6)]
    with pytest.raises(ValueError, match=r"one size in all batches, got \[1, 4\] and \[1, 6\]"):
        lap_ext.scores(net, data[0][0], criterion="obd", data=data)


@needs_backpack
def test_a_loss_that_has_no_second_order() -> None:
    criterion = criteria.OBD(loss=nn.L1Loss())
    data = [(torch.ones(2, 5), torch.ones(2, 3))]
    with pytest.raises(ValueError, match=r"prune: .* differentiate twice, got .*L1Loss"):
        lap_ext.prune(cases.mlp(), torch.ones(1, 5), 0.5, criterion=criterion, data=data)


@needs_backpack
def test_batches_are_pairs() -> None:
    with pytest.raises(TypeError, match=r"\(inputs, target\), got Tensor"):
        lap_ext.prune(cases.mlp(), torch.ones(1, 5), 0.5, criterion="obd", data=[torch.ones(2, 5)])


def test_without_backpack(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "backpack", None)
    with pytest.raises(ImportError, match=r"^prune: expected the package BackPACK.*lap_ext\[obd\]"):
        lap_ext.prune(cases.mlp(), torch.ones(1, 5), 0.5, criterion="obd", data=cases.rows(3))
