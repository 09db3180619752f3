# SPDX-License-Identifier: MIT
"""States, matrices of products that are read along one side: linear attention, selective scans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net, linear, randomized
from tests.helpers.topologies import pairs, traced


def tokens(n: int) -> Tensor:
    return torch.randn(1, n, 4, dtype=torch.float64)


STATES: dict[str, Any] = {
    "matmul": lambda q, k, v: q @ (k.mT @ v),
    "einsum": lambda q, k, v: torch.einsum("nti,nij->ntj", q, torch.einsum("nti,ntj->nij", k, v)),
    "transposed": lambda q, k, v: ((v.mT @ k) @ q.mT).mT,
    "scaled": lambda q, k, v: q @ ((k / 2).mT @ v),
}


@pytest.mark.parametrize("name", list(STATES))
def test_linear_attention_is_attention_without_a_softmax(name: str) -> None:
    """q (k^T v) = (q k^T) v, and so are the scores."""

    def rule(m: Any, x: Tensor) -> Tensor:
        return m.o(m.function(m.q(x), m.k(x), m.v(x)))

    model = randomized(Net(rule, q=linear(3), k=linear(3), v=linear(5), o=linear(2, 5)))
    half = 0.5 if name == "scaled" else 1.0
    model.function = lambda q, k, v: (q @ (half * k).mT) @ v
    expected = lap_ext.scores(model, tokens(3))
    model.function = STATES[name]
    scores = lap_ext.scores(model, tokens(3))
    torch.testing.assert_close(scores, expected)


def scan(m: Any, x: Tensor) -> Tensor:
    """Mamba: h = exp(a dt) h + dt b x, y = sum over the state of c h, as transformers writes it."""
    h = m.inlet(x)
    dt, b, c = F.softplus(m.dt(h)), m.b(h), m.c(h)
    decay = torch.exp(-torch.exp(m.a) * dt[..., None])  # [1, L, D, N]
    added = dt[..., None] * b[:, :, None] * h[..., None]
    state, read = torch.zeros(1, 3, 2, dtype=x.dtype), []
    for i in range(x.shape[1]):
        state = decay[:, i] * state + added[:, i]
        read.append((state @ c[:, i, :, None])[..., 0])
    return m.outlet(torch.stack(read, 1) + h * m.d)


def test_a_selective_scan() -> None:
    """By hand: dt and x of a channel make it, b and c are coupled; whatever the length is."""
    model = Net(scan, inlet=linear(3), dt=linear(3, 3), b=linear(2, 3), c=linear(2, 3))
    model.outlet, model.d = linear(2, 3), nn.Parameter(torch.randn(3))
    model.a = nn.Parameter(torch.randn(3, 2))
    layers = {name: x.detach() for name, x in randomized(model).named_parameters()}
    inlet, dt, b, c, outlet = (layers[f"{k}.weight"] for k in ("inlet", "dt", "b", "c", "outlet"))
    rows, columns = inlet.norm(dim=1), outlet.square().sum(0)
    decay = 1 + layers["a"].exp().square().mean(1)  # of the scan, and of exp(a dt)
    skip = 1 + layers["d"].square()
    read = columns * skip + sum(x.square().sum(0) for x in (dt, b, c))
    fed = skip * rows.square() + decay * dt.square().sum(1)
    expected = {
        "inlet": inlet.abs() * read.sqrt()[:, None],
        "dt": dt.abs() * rows * (columns * decay).sqrt()[:, None],
        "b": b.abs() * rows * c.norm(dim=1)[:, None],
        "c": c.abs() * rows * b.norm(dim=1)[:, None],
        "outlet": outlet.abs() * fed.sqrt(),
    }
    for n in (2, 5):
        torch.testing.assert_close(lap_ext.scores(model, tokens(n)), expected)


def test_mamba() -> None:
    """transformers' own: the scan's channels are those of its convolution and of dt_proj."""
    topology = traced("hf_mamba")
    mixer = "backbone.layers.0.mixer"
    for name in ("conv1d", "dt_proj"):
        same = [(i, i) for i in range(16)]
        assert pairs(topology, f"{mixer}.out_proj", f"{mixer}.{name}") == same
    (coupled,) = [e for e in topology.layers[f"{mixer}.x_proj"].next if e.kind == "coupled"]
    b, c = range(1, 4), range(4, 7)
    both = {*zip(b, c, strict=True), *zip(c, b, strict=True)}
    assert set(zip(coupled.here.tolist(), coupled.there.tolist(), strict=True)) == both
