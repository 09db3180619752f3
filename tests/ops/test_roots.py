# SPDX-License-Identifier: MIT
"""Square roots are IEEE 754's, bit for bit, wherever they enter a norm or a score.

torch.sqrt on a CPU goes through a vector math library that may miss the nearest number by one ulp:
so many entries are compared that it would show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.ops import schema
from lap_ext.ops.reference import common
from tests.helpers import layer_oracle as oracle
from tests.helpers.parameters import needs_native

N = 200_000
each_real = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def squared_norms(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers over most of the range of dtype, denormal ones included."""
    power = 1020 if dtype == torch.float64 else 120
    mantissas, exponents = 1 + np.random.rand(n), np.random.randint(-power - 25, power, n)
    return torch.from_numpy(np.ldexp(mantissas, exponents)).to(dtype)


LAYOUTS = {
    "contiguous": lambda x: x,
    "strided": lambda x: x[::3],
    "transposed": lambda x: x.view(400, -1).t(),
    "expanded": lambda x: x[:7, None].expand(7, 5),
    "offset": lambda x: x[1:],
    "scalar": lambda x: x[5],
    "empty": lambda x: x[:0],
    "requires_grad": lambda x: x.clone().requires_grad_(),
}


def same(got: Tensor, x: Tensor) -> bool:
    """Whether got has the bits of x's roots."""
    expected = oracle.root(x.detach().cpu())
    return got.dtype == expected.dtype and torch.equal(got.cpu(), expected)


@each_real
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_sqrt(layout: str, dtype: torch.dtype, device: str) -> None:
    x = LAYOUTS[layout](squared_norms(dtype=dtype).to(device))
    before = x.detach().clone()
    got = common.exact_sqrt(x)
    assert same(got, x) and torch.equal(x.detach(), before) and not got.requires_grad


@each_real
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed", "scalar", "empty"])
def test_in_place(layout: str, dtype: torch.dtype, device: str) -> None:
    values = squared_norms(dtype=dtype).to(device)
    x = LAYOUTS[layout](values)
    before = x.clone()
    assert common.exact_sqrt(x, out=x) is x and same(x, before)


@each_real
def test_without_numpy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not need it; Python's root has the same bits."""
    monkeypatch.setattr(common, "np", None)
    for layout in LAYOUTS.values():
        x = layout(squared_norms(dtype=dtype))
        got = common.exact_sqrt(x)
        assert same(got, x) and not got.requires_grad
    x = squared_norms(dtype=dtype)
    before = x.clone()
    assert common.exact_sqrt(x, out=x) is x and same(x, before)


@pytest.mark.parametrize("numpy", [True, False])
def test_what_has_no_root(numpy: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, without a warning (pytest turns warnings into errors); zeros keep their sign."""
    if not numpy:
        monkeypatch.setattr(common, "np", None)
    x = torch.tensor([-1.0, -torch.inf, torch.nan, torch.inf, 0.0, -0.0], device=device)
    got = common.exact_sqrt(x.double()).cpu()
    assert got[:3].isnan().all() and got[3:].tolist() == [torch.inf, 0.0, 0.0]
    assert got.signbit()[4:].tolist() == [False, True]


def test_the_operator(device: str) -> None:
    one, two = squared_norms(), squared_norms()
    for parts in ([one], [one, two], [x[::2] for x in (one, two)]):
        assert same(schema.norm([x.to(device) for x in parts]), sum(parts[1:], parts[0]))
    with torch.inference_mode():
        assert same(schema.norm([one.to(device)]), one)


def test_neighbor_norms(device: str) -> None:
    """Row norms of a producer, and column norms of a consumer, of two entries each."""
    w_prev, w_next = (torch.rand(N, 2, dtype=torch.float64) for _ in range(2))
    w = torch.ones(1, N, device=device)
    sums = [x.square() for x in (w_prev, w_next)]
    sums = [x[:, 0] + x[:, 1] for x in sums]  # in any order
    assert same(lap_ext.neighbor_norms(w_prev.to(device), w, None)[0], sums[0])
    assert same(lap_ext.neighbor_norms(None, w.t(), w_next.t().to(device))[1], sums[1])


@needs_native
def test_numpy_has_the_bits_of_torch() -> None:
    import lap_ext.numpy as lap

    w_prev, w = torch.rand(N, 2, dtype=torch.float64), torch.ones(1, N)
    expected: Any = lap_ext.neighbor_norms(w_prev, w, None)[0].numpy()
    assert np.array_equal(lap.neighbor_norms(w_prev.numpy(), w.numpy(), None)[0], expected)


def test_bn_scale(device: str) -> None:
    bn = nn.BatchNorm1d(N).to(device)
    nn.init.uniform_(bn.running_var)
    expected = 1.0 / oracle.root(bn.running_var.cpu().double() + bn.eps)
    assert torch.equal(lap_ext.bn_scale(bn).cpu(), expected)


def test_bn_scale_is_traced() -> None:
    """A compiler gets the operator, not a root of its own."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(N)
            nn.init.uniform_(self.bn.running_var)

        def forward(self, x: Tensor) -> Tensor:
            return x * lap_ext.bn_scale(self.bn)

    model, x = Scaled(), torch.ones(N)
    expected = 1.0 / oracle.root(model.bn.running_var.double() + model.bn.eps)
    exported = torch.export.export(model, (x,), strict=False)
    assert "lap_ext.norm" in exported.graph_module.code
    assert torch.equal(exported.module()(x), expected)
    assert torch.equal(torch.compile(model, backend="aot_eager")(x), expected)
    assert lap_ext.bn_scale(model.bn.to("meta")).is_meta


def test_scores_of_a_model() -> None:
    """Passes over a model's graph, its batch norm and the weight's roles take the same roots."""
    n = 20_000
    net = nn.Sequential(nn.Linear(2, n, bias=False), nn.BatchNorm1d(n), nn.Linear(n, 2, bias=False))
    net = net.double().eval()
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)
    nn.init.uniform_(net[1].weight, 0.5, 2.0)
    x = torch.ones(1, 2, dtype=torch.float64)
    deviation = oracle.root(net[1].running_var + net[1].eps)
    scores = lap_ext.scores(net, x, criterion="magnitude_bn")["0"]
    scale = net[1].weight.detach() / deviation
    assert torch.equal(scores, net[0].weight.detach().abs() * scale[:, None])
    plain = nn.Sequential(net[0], net[2])
    scores = lap_ext.scores(plain, x)["0"]
    squares = net[2].weight.detach().square()
    assert torch.equal(
        scores, net[0].weight.detach().abs() * oracle.root(squares[0] + squares[1])[:, None]
    )
