# SPDX-License-Identifier: MIT
"""lap_ext.scores == the brute-force definition, weight by weight: dense models.

Every instance is a model of tiny layers in float64 with random weights, no weight near 0, and batch
norms with random statistics. tests/helpers/network_oracle.py sees it through autograd, lap_ext
through torch.export. (test_network_oracle.py checks the oracle itself.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.network_oracle import columns, distortions, rows, scored
from tests.helpers.networks import RTOL, Net, check, linear, randomized, row
from tests.helpers.parameters import TOLERANCE


def blocks(m: Any, x: Tensor) -> Tensor:
    """Three residual blocks between a stem and a head."""
    h = m.stem(x)
    for i in range(3):
        h = h + m.down[i](F.gelu(m.up[i](h)))
    return m.head(h)


def scaled_blocks(m: Any, x: Tensor) -> Tensor:
    """Normed branches with a layer scale; the second gain is written as in transformers' Gemma."""
    x = m.stem(x)
    x = x + m.gamma * m.b(F.relu(m.a(m.n(x))))
    x = x + (1 + m.delta) * m.d(F.relu(m.c(m.r(x))))
    return m.head(m.last(x))


def split(m: Any, x: Tensor) -> Tensor:
    """Unequal pieces of one layer's output, one of them read twice."""
    p, q, r = m.a(x).split([3, 1, 2], dim=-1)
    return m.e(torch.cat([m.b(p), m.c(q), r], dim=-1)) + m.d(p)


def chunk(m: Any, x: Tensor) -> Tensor:
    """Halves that are swapped, then reversed and rolled."""
    p, q = m.a(x).chunk(2, dim=-1)
    y = torch.cat([q, F.relu(p)], dim=-1)
    return m.b(y.flip(-1)) + m.c(y.roll(1, dims=-1))


def gathered(m: Any, x: Tensor) -> Tensor:
    """Channels moved by an index, unbound and stacked, written into an empty tensor."""
    y = m.a(x)[:, [2, 0, 3, 1]]
    z = torch.stack(m.b(y).unbind(1)[::-1], dim=1)
    h = torch.zeros_like(z)
    h[:, :3] = z[:, 1:]
    h[:, 3:] = y[:, :1]
    return m.c(h) + z[:, :4]


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += m.b(F.relu(h))
    h[:, :2] += m.c(h)
    return m.d(h)


def overwritten(m: Any, x: Tensor) -> Tensor:
    """The channels that are written over are read no more."""
    h = m.a(x).clone()
    h[:, 1:3] = m.b(x)
    return m.c(h)


def interpolated(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.lerp(m.a(x), m.b(x), 0.25))


def normed_input(m: Any, x: Tensor) -> Tensor:
    """What a norm does to the model's own input is a scale on that edge, for the skip as well."""
    h = m.n(x)
    return m.b(x + F.relu(m.a(h))) + m.c(h)


def constants_of_input(m: Any, x: Tensor) -> Tensor:
    """Images are often standardized by the model."""
    mean, deviation = x.new_tensor([0.1, 0.2, 0.3, 0.4]), x.new_tensor([1.0, 2.0, 3.0, 4.0])
    return m.a((x - mean) / deviation)


def numbers(m: Any, x: Tensor) -> Tensor:
    """Signs and numbers on the way; a difference is a sum, a stack that is summed as well."""
    y = 0.5 * m.a(x) - m.b(-x) / 3 + 2 * x
    return torch.stack([m.c(y), y], dim=1).sum(dim=1)


def written_norms(m: Any, x: Tensor) -> Tensor:
    """RMSNorm as transformers writes it."""
    x = m.d(x)
    for layer, gain in ((m.a, m.gamma), (m.b, m.delta)):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = x + layer(gain * normed)
    return m.c(x)


def sliced_weight(m: Any, x: Tensor) -> Tensor:
    """A packed weight that is used in parts, one of them twice."""
    q, k = F.linear(x, m.packed[:4]), F.linear(m.a(x), m.packed[4:])
    return m.b(F.relu(q)) + m.c(F.linear(k, m.packed[:4, :3]))


def autoencoder(m: Any, x: Tensor) -> Tensor:
    """The decoder is the encoder's transpose."""
    return m.c(F.linear(F.relu(m.b(F.relu(m.a(x)))), m.b.weight.t()))


def experts(m: Any, x: Tensor) -> Tensor:
    """Two experts in one batched weight."""
    y = torch.bmm(m.a(x).expand(2, 1, 4), m.stacked)
    return m.b(F.relu(y).sum(0))


def halves(m: Any, x: Tensor) -> Tensor:
    """Two inputs meet in every channel."""
    p, q = x.chunk(2, dim=-1)
    return m.a(p + q)


def mean_of_channels(m: Any, x: Tensor) -> Tensor:
    """Two layers count one half each."""
    return m.c(torch.stack([m.a(x), m.b(x)]).mean(0))


def many(out: int, into: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(into, out) for _ in range(3))


def parameters(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(4)) for name in names}


DENSE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alone": (lambda: nn.Sequential(linear(3)), 4),
    "mlp": (lambda: nn.Sequential(linear(5), nn.ReLU(), linear(3, 5), nn.SiLU(), linear(2, 3)), 4),
    "norms": (
        lambda: nn.Sequential(
            *(linear(5), nn.BatchNorm1d(5), nn.ReLU(), linear(3, 5), nn.ReLU()),
            *(nn.BatchNorm1d(3, affine=False, eps=0.3), linear(4, 3), nn.BatchNorm1d(4)),
        ),
        4,
    ),
    "normed_input": (lambda: Net(normed_input, n=nn.BatchNorm1d(4), **abc()), 4),
    "layer_normed_input": (lambda: Net(normed_input, n=nn.LayerNorm(4), **abc()), 4),
    "constants_of_input": (lambda: Net(constants_of_input, a=linear()), 4),
    "skip_from_input": (lambda: Net(lambda m, x: m.c(x + m.b(F.relu(m.a(x)))), **abc()), 4),
    "skip_to_output": (lambda: Net(lambda m, x: (h := m.a(x)) + m.c(F.relu(m.b(h))), **abc()), 4),
    "skip_through": (lambda: Net(lambda m, x: x + m.c(m.b(m.a(x))), **abc()), 4),
    "projection": (
        lambda: Net(lambda m, x: m.d(F.relu(m.b(m.a(x)) + m.c(x))), d=linear(2), **abc()),
        4,
    ),
    "three_blocks": (
        lambda: Net(blocks, stem=linear(), up=many(3, 4), down=many(4, 3), head=linear(2)),
        4,
    ),
    "layer_scale": (
        lambda: Net(
            scaled_blocks,
            **parameters("gamma", "delta"),
            **abc(),
            stem=linear(),
            d=linear(),
            head=linear(2),
            last=nn.LayerNorm(4),
            n=nn.LayerNorm(4),
            r=nn.RMSNorm(4),
        ),
        4,
    ),
    "split": (
        lambda: Net(
            split,
            a=linear(6),
            b=linear(2, 3),
            c=linear(3, 1),
            d=linear(4, 3),
            e=linear(4, 7),
        ),
        4,
    ),
    "chunk": (lambda: Net(chunk, **abc()), 4),
    "written_norms": (
        lambda: Net(written_norms, **parameters("gamma", "delta"), d=linear(), **abc()),
        4,
    ),
    "sliced_weight": (
        lambda: Net(sliced_weight, packed=nn.Parameter(torch.ones(7, 4)), **abc()),
        4,
    ),
    "autoencoder": (lambda: Net(autoencoder, **abc() | {"b": linear(3, 4)}), 4),
    "experts": (lambda: Net(experts, stacked=nn.Parameter(torch.ones(2, 4, 4)), **abc()), 4),
    "unread": (lambda: Net(lambda m, x: m.b(m.a(x)[:, 1:3]), a=linear(), b=linear(3, 2)), 4),
    "unfed": (lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1))), a=linear(), b=linear(3, 6)), 4),
    "halves_of_input": (lambda: Net(halves, a=linear(3, 2)), 4),
    "mean_of_channels": (lambda: Net(mean_of_channels, **abc()), 4),
    "gathered": (lambda: Net(gathered, **abc()), 4),
    "in_place": (lambda: Net(in_place, d=linear(), **abc() | {"c": linear(2, 4)}), 4),
    "overwritten": (lambda: Net(overwritten, **abc() | {"b": linear(2, 4)}), 4),
    "interpolated": (lambda: Net(interpolated, **abc()), 4),
    "numbers": (lambda: Net(numbers, **abc()), 4),
    "gate": (
        lambda: Net(
            lambda m, x: m.down(F.silu(m.gate(h := m.stem(x))) * m.up(h)),
            stem=linear(),
            gate=linear(3),
            up=linear(3),
            down=linear(4, 3),
        ),
        4,
    ),
    "packed_gate": (
        lambda: Net(lambda m, x: m.c(F.glu(m.a(m.b(x)), dim=-1)), **abc() | {"c": linear(3, 2)}),
        4,
    ),
    "called_twice": (
        lambda: Net(lambda m, x: m.d(m.b(F.relu(m.a(x))) + m.b(m.c(x))), d=linear(2), **abc()),
        4,
    ),
    "recurrent": (lambda: Net(lambda m, x: m.c(m.b(m.b(m.b(m.a(x))))), **abc()), 4),
}


def abc() -> dict[str, nn.Module]:
    return {name: linear() for name in "abc"}


@pytest.mark.parametrize("name", list(DENSE))
def test_dense(name: str) -> None:
    build, width = DENSE[name]
    check(build(), row(width))


def test_two_inputs() -> None:
    check(Net(lambda m, x, y: m.c(m.a(x) + m.b(y) + y), **abc()), row(), row())


def test_tied_embedding() -> None:
    def rule(m: Any, tokens: Tensor) -> Tensor:
        x = m.tokens(tokens) + m.places(torch.zeros_like(tokens))
        return m.head(x + m.down(F.relu(m.up(x))))

    model = Net(
        rule,
        tokens=nn.Embedding(5, 4),
        places=nn.Embedding(2, 4),
        up=linear(3),
        down=linear(4, 3),
        head=nn.Linear(4, 5, bias=False),
    )
    model.head.weight = model.tokens.weight
    check(model, torch.tensor([[3]]))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent(kind: str) -> None:
    """By hand: all gates of a unit feed it, and it is read by the head and by its own layer."""
    cell = getattr(nn, kind)(4, 3, batch_first=True)
    model = randomized(
        Net(lambda m, x: m.b(m.cell(m.a(x))[0]), a=linear(), cell=cell, b=linear(2, 3))
    )
    a, b, ih, hh = (x.detach() for x in (model.a.weight, model.b.weight, *cell.all_weights[0][:2]))
    gates = len(ih) // 3
    fed = (rows(ih) + rows(hh)).reshape(gates, 3).sum(0)
    read = (columns(b) + columns(hh)).repeat(gates)
    expected = {
        "a": scored(a, 1, columns(ih)),
        "cell.weight_ih_l0": scored(ih, rows(a), read),
        "cell.weight_hh_l0": scored(hh, fed, read),
        "b": scored(b, fed, 1),
    }
    got = lap_ext.scores(model, torch.randn(1, 2, 4, dtype=torch.float64))
    assert set(got) == set(expected)
    for name, score in got.items():
        torch.testing.assert_close(score, expected[name], rtol=RTOL, atol=0)


def test_float32() -> None:
    """The same bits but for the rounding of the score."""
    model = randomized(Net(blocks, stem=linear(), up=many(3, 4), down=many(4, 3), head=linear(2)))
    model.float()
    expected = distortions(model, row())
    for name, score in lap_ext.scores(model, row().float()).items():
        assert score.dtype == torch.float32
        tolerance = TOLERANCE[torch.float32]
        torch.testing.assert_close(score.double(), expected[name], rtol=tolerance, atol=0)
