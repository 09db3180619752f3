# SPDX-License-Identifier: MIT
"""The oracle of full models against formulas written by hand, one model for each of its rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from tests.helpers import network_oracle
from tests.helpers.network_oracle import columns, distortions, rows, scored
from tests.helpers.networks import RTOL, Net, linear, randomized, row


def agree(expected: dict[str, Tensor], model: nn.Module, *inputs: Tensor, **how: Any) -> None:
    """The oracle against formulas."""
    result = distortions(model, inputs, **how)
    assert set(result) == set(expected)
    for name, x in result.items():
        torch.testing.assert_close(x, expected[name].detach(), rtol=RTOL, atol=0)


def test_independent() -> None:
    assert "import lap_ext" not in Path(network_oracle.__file__).read_text()


def test_of_three_matrices() -> None:
    """Nothing but matrix products: all three operators multiplied out, with one weight zeroed."""
    model = randomized(
        nn.Sequential(linear(4, 3), nn.ReLU(), linear(5, 4), nn.Tanh(), linear(2, 5))
    )
    a, b, c = (model[i].weight.detach() for i in (0, 2, 4))
    result = distortions(model, row(3))
    for o in range(5):
        for i in range(4):
            without = b.clone()
            without[o, i] = 0
            change = torch.linalg.norm(c @ b @ a - c @ without @ a)
            torch.testing.assert_close(result["2"][o, i], change, rtol=RTOL, atol=0)
    torch.testing.assert_close(result["0"], scored(a, 1, columns(b)), rtol=RTOL, atol=0)
    torch.testing.assert_close(result["4"], scored(c, rows(b), 1), rtol=RTOL, atol=0)


def test_of_residuals() -> None:
    """c reads a, b and the model's input; d alone reads c and b, and reaches the output."""
    model = Net(lambda m, x: m.d((h := m.b(m.a(x)) + x) + m.c(h)), **{k: linear() for k in "abcd"})
    a, b, c, d = (getattr(randomized(model), k).weight for k in "abcd")
    agree(
        {
            "a": scored(a, 1, columns(b)),
            "b": scored(b, rows(a), columns(c) + columns(d)),
            "c": scored(c, rows(b) + 1, columns(d)),
            "d": scored(d, rows(b) + 1 + rows(c), 1),
        },
        model,
        row(),
    )


def test_of_batch_norms() -> None:
    """The norm after a layer scales its consumers' and producers' edges; c's own counts for c."""
    layers = {"a": linear(), "n": nn.BatchNorm1d(4), "b": linear(), "o": nn.BatchNorm1d(4)}
    model = randomized(Net(lambda m, x: m.o(m.b(F.relu(m.n(m.a(x))))), **layers))
    n, o = (
        x.weight.square() / (x.running_var + x.eps)  # type: ignore[operator]
        for x in (model.n, model.o)
    )
    a, b = model.a.weight, model.b.weight
    agree({"a": scored(a, 1, n * columns(b)), "b": scored(b, n * rows(a), o)}, model, row())


def test_of_windows() -> None:
    """Every tap of a filter counts, though its positions overlap."""
    conv = {k: nn.Conv2d(2, 2, 3, padding=1) for k in "abc"}
    model = randomized(Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), **conv))
    a, b, c = (getattr(model, k).weight for k in "abc")
    agree(
        {
            "a": scored(a, 1, columns(b)),
            "b": scored(b, rows(a), columns(c)),
            "c": scored(c, rows(b), 1),
        },
        model,
        torch.randn(1, 2, 7, 7),
        read=lambda y: y[..., 3, 3],
    )


def test_of_a_flatten() -> None:
    """The linear layer's columns of one channel add up, and repeat the channel's row."""
    layers = {"a": nn.Conv2d(2, 3, 1), "b": nn.Conv2d(3, 2, 1), "c": linear(3, 8)}
    model = randomized(Net(lambda m, x: m.c(m.b(m.a(x)).flatten(1)), **layers))
    a, b, c = (getattr(model, k).weight for k in "abc")
    agree(
        {
            "a": scored(a, 1, columns(b)),
            "b": scored(b, rows(a), columns(c).reshape(2, 4).sum(1)),
            "c": scored(c, rows(b).repeat_interleave(4), 1),
        },
        model,
        torch.randn(1, 2, 2, 2),
    )


def test_of_grouped_attention() -> None:
    """Two heads of two features share each key and value: their squares add."""

    def rule(m: Any, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 2)).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.o(y.transpose(1, 2).flatten(2))

    layers = {"q": linear(8, 3), "k": linear(4, 3), "v": linear(4, 3), "o": linear(3, 8)}
    model = randomized(Net(rule, **layers))
    q, k, v, o = (getattr(model, name).weight for name in "qkvo")
    owner = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])  # feature of q -> feature of k and v
    shared = torch.zeros(4, 8, dtype=torch.float64)
    shared[owner, torch.arange(8)] = 1
    agree(
        {
            "q": scored(q, 1, rows(k)[owner]),
            "k": scored(k, 1, shared @ rows(q)),
            "v": scored(v, 1, shared @ columns(o)),
            "o": scored(o, rows(v)[owner], 1),
        },
        model,
        torch.randn(1, 4, 3),
        read=lambda y: y[:, -1],
    )


def test_of_gates_and_ties() -> None:
    """One embedding that is the head as well: the squares of its two roles add."""

    def rule(m: Any, tokens: Tensor) -> Tensor:
        x = m.e(tokens)
        return F.linear(m.down(F.silu(m.gate(x)) * m.up(x)), m.e.weight)

    layers = {"gate": linear(4, 3), "up": linear(4, 3), "down": linear(3, 4)}
    model = randomized(Net(rule, e=nn.Embedding(5, 3), **layers))
    e, gate, up, down = (getattr(model, k).weight for k in ("e", "gate", "up", "down"))
    first = scored(e, columns(gate) + columns(up), 1)  # [V, D]: the features are its columns
    agree(
        {
            "e": (first.square() + scored(e, rows(down), 1).square()).sqrt(),
            "gate": scored(gate, columns(e), columns(down)),
            "up": scored(up, columns(e), columns(down)),
            "down": scored(down, rows(gate) + rows(up), columns(e)),
        },
        model,
        torch.tensor([[2]]),
    )
