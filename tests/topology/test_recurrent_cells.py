# SPDX-License-Identifier: MIT
"""Cells of one step, which a model calls in a loop of its own: LSTMCell, GRUCell, RNNCell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net, linear, randomized

TOKENS = torch.randn(1, 3, 4, dtype=torch.float64)


def stepped(step: Callable[[Any, Tensor, Any], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """A model's loop over the tokens from states that layers make."""

    def rule(m: Any, x: Tensor) -> Tensor:
        state = m.h(x[:, 0]), m.c(x[:, 0])
        for token in x.unbind(1):
            state = step(m, m.a(token), state)
        return m.b(state[0])

    return rule


def fused(m: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return m.cell(x, state)


def written(m: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    h, c = state
    gates = F.linear(x, m.cell.weight_ih, m.cell.bias_ih) + F.linear(h, m.cell.weight_hh)
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def test_an_lstm_cell_is_what_it_computes() -> None:
    """Its scores are those of the same steps written out with linear layers, gates and sums."""
    layers = {"h": linear(3), "c": linear(3), "a": linear(5), "b": linear(2, 3)}
    model = randomized(Net(stepped(fused), cell=nn.LSTMCell(5, 3), **layers))
    result = lap_ext.scores(model, TOKENS)
    model.rule = stepped(written)
    torch.testing.assert_close(result, lap_ext.scores(model, TOKENS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("build", [nn.GRUCell, nn.RNNCell])
def test_a_step_from_a_state(build: Any) -> None:
    """Every gate's rows of both weights feed the state; a GRU keeps a part of the last one."""
    model = Net(lambda m, x: m.b(m.cell(m.a(x), m.h(x))), a=linear(5), h=linear(3), b=linear(2, 3))
    model.cell = build(5, 3)
    a, h, b, w, u = (x.detach() for x in (
        randomized(model).a.weight, model.h.weight, model.b.weight, model.cell.weight_ih,
        model.cell.weight_hh))  # fmt: skip
    kept = 1.0 if build is nn.GRUCell else 0.0
    made = (w.square().sum(1) + u.square().sum(1)).view(-1, 3).sum(0) + kept * h.square().sum(1)
    read = b.square().sum(0)
    by_row = read.repeat(len(w) // 3)[:, None].sqrt()
    expected = {
        "a": a.abs() * w.norm(dim=0)[:, None],
        "h": h.abs() * (u.square().sum(0) + kept * read).sqrt()[:, None],
        "cell.weight_ih": w.abs() * by_row * a.norm(dim=1),
        "cell.weight_hh": u.abs() * by_row * h.norm(dim=1),
        "b": b.abs() * made.sqrt(),
    }
    torch.testing.assert_close(lap_ext.scores(model, TOKENS[:, 0]), expected)


def test_a_first_state_of_zeros_counts_nothing() -> None:
    """In the first of two steps, weight_hh reads zeros; in the second, the state."""

    def rule(m: Any, x: Tensor) -> Tensor:
        return m.b(m.cell(x[:, 1], m.cell(x[:, 0])))

    model = randomized(Net(rule, cell=nn.RNNCell(4, 3), b=linear(2, 3)))
    w, u = model.cell.weight_ih.detach(), model.cell.weight_hh.detach()
    read = model.b.weight.detach().square().sum(0).sqrt()
    made = (w.square().sum(1) + u.square().sum(1)).sqrt()
    expected = u.abs() * read[:, None] * made
    torch.testing.assert_close(lap_ext.scores(model, TOKENS)["cell.weight_hh"], expected)
