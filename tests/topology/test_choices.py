# SPDX-License-Identifier: MIT
"""What data or a constant chooses: maxima, top-k, sorting, masks, routers, weights of positions.

One rule for all of them: every candidate counts 1, like the input of an activation. So all ways of
writing one choice give the same factors; a constant choice is known and counts as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net, randomized
from tests.helpers.topologies import E, H, gated, pairs

ROWS, TOKENS = torch.randn(3, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
KEEP = torch.tensor([True, False, True, True, False, True])


def around(function: Callable[[Tensor], Tensor], n: int = 6) -> Any:
    """Layer a, a function, layer b."""
    model = Net(lambda m, x: m.b(m.function(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(n, 2))
    model.function = function
    return randomized(model)


def fed(model: Any, x: Tensor = ROWS) -> Tensor:
    """The squared factor of every input of b."""
    score = lap_ext.scores(model, x)["b"]
    return (score / model.b.weight.detach().abs())[0].square()


# ---- by data ------------------------------------------------------------------------------------
def by_index(x: Tensor) -> Tensor:
    return x[:, x.mean(0).argsort()]


ANY: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "amax": (lambda x: x.amax(1, keepdim=True), 1),
    "max": (lambda x: x.max(1, keepdim=True).values, 1),
    "topk": (lambda x: x.topk(2, 1).values, 2),
    "sort": (lambda x: x.sort(1).values, 6),
    "gather": (lambda x: x.gather(1, x.argsort(1)), 6),
    "take_along_dim": (lambda x: x.take_along_dim(x.argsort(1), 1), 6),
    "index": (by_index, 6),
    "index_select": (lambda x: x.index_select(1, x.mean(0).argsort()), 6),
}


@pytest.mark.parametrize("name", list(ANY))
def test_any_channel_may_come(name: str) -> None:
    """Each of the six counts in every position, with factor 1."""
    function, n = ANY[name]
    model = around(function, n)
    assert pairs(lap_ext.trace(model, ROWS), "b", "a") == [
        (i, c) for i in range(n) for c in range(6)
    ]
    total = model.a.weight.detach().square().sum()
    torch.testing.assert_close(fed(model), total.expand(n))


def test_the_best_go_back_to_their_places() -> None:
    """A top-k that is written back into zeros is a mask: the channels stay what they were."""

    def best(x: Tensor) -> Tensor:
        value, index = x.topk(2, 1)
        return torch.zeros_like(x).scatter(1, index, value / value.sum(1, keepdim=True))

    model = around(best)
    torch.testing.assert_close(fed(model), model.a.weight.detach().square().sum(1))

    def elsewhere(x: Tensor) -> Tensor:  # the indices of another tensor's best
        return torch.zeros_like(x).scatter(1, (-x).topk(2, 1).indices, x.topk(2, 1).values)

    edges = pairs(lap_ext.trace(around(elsewhere), ROWS), "b", "a")
    assert set(edges) == {(i, c) for i in range(6) for c in range(6)}


def test_places_to_look_at() -> None:
    """A spatial transformer's grid is a decision: the layer that computes it ends there."""

    def rule(m: Any, x: Tensor) -> Tensor:
        grid = m.where(x).permute(0, 2, 3, 1).tanh()
        return m.b(F.grid_sample(m.a(x), grid, align_corners=False))

    layers = {"a": nn.Conv2d(3, 4, 1), "where": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(4, 2, 1)}
    topology = lap_ext.trace(Net(rule, **layers), torch.randn(2, 3, 4, 4))
    assert pairs(topology, "b", "a") == [(i, i) for i in range(4)]
    assert [(edge.name, edge.kind) for edge in topology.layers["where"].next] == [
        ("grid_sampler", "boundary")
    ]


# ---- by a constant -------------------------------------------------------------------------------
CONSTANT: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "index": (lambda x: x[:, KEEP], [0, 2, 3, 5]),
    "index_list": (lambda x: F.relu(x[:, [True, False, False, True, False, True]]), [0, 3, 5]),
    "index_of_two": (lambda x: x.unflatten(1, (2, 3))[:, KEEP.view(2, 3)], [0, 2, 3, 5]),
    "nonzero": (lambda x: x[:, KEEP.nonzero().flatten()], [0, 2, 3, 5]),
}


@pytest.mark.parametrize("name", list(CONSTANT))
def test_constant_selections(name: str) -> None:
    function, indices = CONSTANT[name]
    topology = lap_ext.trace(around(function, len(indices)), ROWS)
    assert pairs(topology, "b", "a") == list(enumerate(indices))


def test_constant_selections_of_positions() -> None:
    """Three of five tokens side by side."""
    three = torch.tensor([True, False, True, True, False])
    topology = lap_ext.trace(around(lambda x: x[:, three].flatten(1), 18), TOKENS)
    assert pairs(topology, "b", "a") == [(i, i % 6) for i in range(18)]


MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda x: x * KEEP,
    "where": lambda x: torch.where(KEEP, x, 0.0),
    "where_zeros": lambda x: torch.where(~KEEP, torch.zeros(6).double(), x),
    "masked_fill": lambda x: x.masked_fill(~KEEP, 0.0),
    "masked_fill_tensor": lambda x: x.masked_fill(~KEEP, torch.tensor(0.0).double()),
    "rows": lambda x: torch.where(KEEP.expand(3, 6), x, 0.0),
}


@pytest.mark.parametrize("name", list(MASKED))
def test_constant_masks_of_channels(name: str) -> None:
    """What a constant mask takes away counts 0, however it is written."""
    model = around(MASKED[name])
    expected = model.a.weight.detach().square().sum(1) * KEEP
    torch.testing.assert_close(fed(model), expected)


def test_masks_that_choose_between_two() -> None:
    rule = lambda m, x: m.b(torch.where(KEEP, m.a(x), m.c(x)))  # noqa: E731
    model = randomized(Net(rule, **{name: nn.Linear(6, 6) for name in "abc"}))
    topology = lap_ext.trace(model, ROWS)
    assert pairs(topology, "b", "a") == [(i, i) for i in (0, 2, 3, 5)]
    assert pairs(topology, "b", "c") == [(i, i) for i in (1, 4)]


def test_a_mask_that_parameters_make_is_no_constant() -> None:
    """It may change while training: all that it may let pass counts."""
    rule = lambda m, x: m.b(torch.where(m.w > 0, m.a(x), 0.0))  # noqa: E731
    model = Net(rule, a=nn.Linear(6, 6), b=nn.Linear(6, 2), w=nn.Parameter(torch.randn(6)))
    torch.testing.assert_close(fed(randomized(model)), model.a.weight.detach().square().sum(1))


def test_masks_of_positions_between_two() -> None:
    """Each channel has both, at different positions: squares add."""
    positions = torch.tensor([True, False, True, True, False])[:, None]
    rule = lambda m, x: m.b(torch.where(positions, m.a(x), m.c(x)))  # noqa: E731
    model = randomized(Net(rule, **{name: nn.Linear(6, 6) for name in "abc"}))
    both = sum(getattr(model, name).weight.detach().square().sum(1) for name in "ac")
    torch.testing.assert_close(fed(model, TOKENS), both)


def test_masks_of_other_things() -> None:
    """By position channels go on; filled with ones a channel is a constant; by data both count."""
    positions = torch.tensor([True, False, True, True, False])[:, None]
    model = around(lambda x: torch.where(positions, x, 0.0))
    rows = model.a.weight.detach().square().sum(1)
    torch.testing.assert_close(fed(model, TOKENS), rows)
    model = around(lambda x: x.masked_fill(~KEEP, 1.0))
    rows = model.a.weight.detach().square().sum(1)
    torch.testing.assert_close(fed(model), torch.where(KEEP, rows, 1.0))
    model = around(lambda x: x.masked_fill(x < 0, 0.0))
    torch.testing.assert_close(fed(model), model.a.weight.detach().square().sum(1))


MATRIX = torch.randn(6, 3, dtype=torch.float64)
PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: x @ MATRIX,
    "mm": lambda x: torch.mm(x, MATRIX),
    "from_the_left": lambda x: (MATRIX.T @ x.T).T,
    "einsum": lambda x: torch.einsum("ni,io->no", x, MATRIX),
    "einsum_first": lambda x: torch.einsum("io,...i->...o", MATRIX, x),
    "tensordot": lambda x: torch.tensordot(x, MATRIX, dims=1),
}


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_constant_matrices_over_channels(name: str) -> None:
    """A transform that is not learned: its squares, entry by entry."""
    model = around(PRODUCTS[name], 3)
    expected = MATRIX.square().T @ model.a.weight.detach().square().sum(1)
    torch.testing.assert_close(fed(model), expected)


def test_constant_matrices_one_a_row_are_refused() -> None:
    model = around(lambda x: torch.bmm(x[:, None], MATRIX.expand(3, 6, 3))[:, 0], 3)
    with pytest.raises(lap_ext.TopologyError, match=r"got aten\.bmm\.default, fed by layer 'a'"):
        lap_ext.trace(model, ROWS)


# ---- routers -------------------------------------------------------------------------------------
def best(logits: Tensor) -> Tensor:
    """Mixtral: the best of the softmax, normed."""
    chance = logits.softmax(-1)
    value, index = chance.topk(2, -1)
    return torch.zeros_like(chance).scatter(1, index, value / value.sum(-1, keepdim=True))


def best_first(logits: Tensor) -> Tensor:
    """GPT-OSS: the softmax of the best."""
    value, index = logits.topk(2, -1)
    return torch.zeros_like(logits).scatter(1, index, value.softmax(-1))


ROUTES: list[Callable[[Tensor], Tensor]] = [
    best, best_first, torch.sigmoid, lambda logits: logits.softmax(-1)]  # fmt: skip


def experts(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("teh,eoh->teo", gated(torch.einsum("tc,eoc->teo", x, m.up)), m.down)


def by_bmm(m: Any, x: Tensor, w: Tensor) -> Tensor:
    y = torch.bmm(gated(torch.bmm(x.expand(E, *x.shape), m.up.mT)), m.down.mT)
    return (y * w.t().unsqueeze(-1)).sum(0)


def by_loop(m: Any, x: Tensor, w: Tensor) -> Tensor:
    y = [F.linear(gated(F.linear(x, m.up[e])), m.down[e]) for e in range(E)]
    return sum(part * w[:, e, None] for e, part in enumerate(y))  # type: ignore[return-value]


MIXED: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
    by_bmm,
    by_loop,
    lambda m, x, w: torch.einsum("te,teo->to", w, experts(m, x)),
    lambda m, x, w: torch.einsum("...eo,...e->...o", experts(m, x), w),
    lambda m, x, w: (experts(m, x) * w[..., None]).sum(1),
]


@pytest.mark.parametrize("route", range(len(ROUTES)))
@pytest.mark.parametrize("way", range(len(MIXED)))
def test_routers(way: int, route: int) -> None:
    """Its channel e is a gate of expert e's result, linearized at 1: it feeds each output once."""

    def rule(m: Any, x: Tensor) -> Tensor:
        return m.b(MIXED[way](m, h := m.a(x), ROUTES[route](m.router(h))))

    model = Net(rule, a=nn.Linear(6, 4), b=nn.Linear(4, 2), router=nn.Linear(4, E))
    model.up, model.down = (nn.Parameter(torch.randn(E, *s)) for s in ((2 * H, 4), (4, H)))
    randomized(model)
    scores = lap_ext.scores(model, ROWS)
    a, b, router, down = (
        w.detach() for w in (model.a.weight, model.b.weight, model.router.weight, model.down)
    )
    into = down.square().sum((0, 2)) + router.square().sum()
    torch.testing.assert_close(scores["b"], b.abs() * into.sqrt())
    torch.testing.assert_close(scores["router"], router.abs() * a.norm(dim=1) * b.norm())


def counted(logits: Tensor) -> Tensor:
    """The best, counted by expert: any of them may come to a position."""
    value, index = logits.softmax(-1).topk(2, -1)
    return (F.one_hot(index, E).to(value.dtype) * value[..., None]).sum(1)


@pytest.mark.parametrize("way", [0, 2, 3, 4])
def test_a_term_that_does_not_change_is_summed_once(way: int) -> None:
    """Experts change along what is summed, what weighs them does not: it is not counted E times."""
    rule = lambda m, x: m.b(MIXED[way](m, h := m.a(x), counted(m.router(h))))  # noqa: E731
    model = Net(rule, a=nn.Linear(6, 4), b=nn.Linear(4, 2), router=nn.Linear(4, E))
    model.up, model.down = (nn.Parameter(torch.randn(E, *s)) for s in ((2 * H, 4), (4, H)))
    into = randomized(model).down.detach().square().sum((0, 2))
    into = into + model.router.weight.detach().square().sum()
    torch.testing.assert_close(fed(model), into)


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "centered": lambda x: x - x.mean(1, keepdim=True),
    "over_sum": lambda x: x / x.sum(1, keepdim=True),
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "layer_norm": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt(),
}


@pytest.mark.parametrize("name", list(WRITTEN))
def test_norms_written_out_behind_a_gate_of_positions(name: str) -> None:
    """Their statistics are of the same channels: a gate common to all does not hide that."""
    rule = lambda m, x: m.b(WRITTEN[name](m.a(x) * m.gate(x)))  # noqa: E731
    layers = {"a": nn.Conv2d(3, 4, 1), "gate": nn.Conv2d(3, 1, 1), "b": nn.Conv2d(4, 2, 1)}
    topology = lap_ext.trace(Net(rule, **layers), torch.randn(2, 3, 4, 4))
    assert pairs(topology, "b", "a") == [(i, i) for i in range(4)]
    assert pairs(topology, "b", "gate") == [(i, 0) for i in range(4)]
    assert all(edge.scale is None for edge in topology.layers["b"].prev)


def test_mixtures_that_are_refused() -> None:
    """A product of two that both change along what is summed, if channels are left, is no logit."""
    rule = lambda m, x: m.b((m.r(x)[:, None] @ m.a(x).unflatten(1, (2, 3)))[:, 0])  # noqa: E731
    model = Net(rule, a=nn.Linear(6, 6), r=nn.Linear(6, 2), b=nn.Linear(3, 2))
    with pytest.raises(
        lap_ext.TopologyError, match=r"got aten\.matmul\.default, fed by layers 'r' and 'a'"
    ):
        lap_ext.trace(model, ROWS.float())


@pytest.mark.parametrize("equation", ["nd,nd->n", "nd,md->nm"])
def test_products_without_channels_are_logits(equation: str) -> None:
    """Two towers: q and k are each other's neighbors, whichever rows meet."""
    model = Net(
        lambda m, x: torch.einsum(equation, m.q(x), m.k(x)), q=nn.Linear(6, 4), k=nn.Linear(6, 4)
    )
    scores = lap_ext.scores(randomized(model), ROWS)
    q, k = model.q.weight.detach(), model.k.weight.detach()
    torch.testing.assert_close(
        scores, {"q": q.abs() * k.norm(dim=1)[:, None], "k": k.abs() * q.norm(dim=1)[:, None]}
    )


# ---- weights of positions ------------------------------------------------------------------------
POOLED: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, w: (x * w).sum(1),
    lambda x, w: (w * x).mean(1),
    lambda x, w: (w.mT @ x).squeeze(1),
    lambda x, w: torch.bmm(x.mT, w).squeeze(2),
    lambda x, w: torch.einsum("ntc,nt->nc", x, w.squeeze(2)),
]


@pytest.mark.parametrize("way", range(len(POOLED)))
def test_pooling_by_attention(way: int) -> None:
    """A softmax over positions weighs them, as in any attention: it ends there and x continues."""
    rule = lambda m, x: m.b(POOLED[way](h := m.a(x), m.w(h).softmax(1)))  # noqa: E731
    model = Net(rule, a=nn.Linear(6, 4), w=nn.Linear(4, 1), b=nn.Linear(4, 2))
    topology = lap_ext.trace(randomized(model), TOKENS)
    assert [(edge.name, edge.kind) for edge in topology.layers["w"].next] == [
        ("attention", "boundary")
    ]
    assert [edge.name for edge in topology.layers["b"].prev] == ["a"]
    assert pairs(topology, "b", "a") == [(i, i) for i in range(4)]


@pytest.mark.parametrize("fused", [True, False])
def test_attention_between_channels(fused: bool) -> None:
    """XCiT: each channel of the values feeds each result; queries and keys end in the softmax."""

    def rule(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).mT for layer in (m.q, m.k, m.v))  # [N, channels, positions]
        weights = (q @ k.mT).softmax(-1)
        y = weights @ v if fused else (weights[..., None] * v[:, None]).sum(2)
        return m.o(y.mT)

    model = randomized(Net(rule, **{name: nn.Linear(6, 6) for name in "qkvo"}))
    topology = lap_ext.trace(model, TOKENS)
    assert [(e.name, e.kind) for e in topology.layers["q"].next] == [("attention", "boundary")]
    assert set(pairs(topology, "o", "v")) == {(i, c) for i in range(6) for c in range(6)}
    assert [edge.name for edge in topology.layers["o"].prev] == ["v"]


DYNAMIC: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda w, v: w @ v,
    lambda w, v: (w[..., None] * v[:, None]).sum(2),
    lambda w, v: torch.einsum("nts,nsc->ntc", w, v),
]


@pytest.mark.parametrize("way", range(len(DYNAMIC)))
def test_weights_that_a_layer_makes_for_each_position(way: int) -> None:
    """Row s of the layer weighs position s: all rows are gates, and v's channels count once."""
    rule = lambda m, x: m.b(DYNAMIC[way](m.w(x).softmax(-1), m.a(x)))  # noqa: E731
    model = randomized(Net(rule, a=nn.Linear(6, 4), w=nn.Linear(6, 5), b=nn.Linear(4, 2)))
    rows = model.a.weight.detach().square().sum(1) + model.w.weight.detach().square().sum()
    torch.testing.assert_close(fed(model, TOKENS), rows)


def test_a_layer_over_positions() -> None:
    """A token mixer's inputs are positions: each meets every channel; all count at both ends."""
    rule = lambda m, x: m.b(m.mix(m.a(x).mT).mT)  # noqa: E731
    model = randomized(Net(rule, a=nn.Linear(6, 4), mix=nn.Linear(5, 3), b=nn.Linear(4, 2)))
    scores = lap_ext.scores(model, TOKENS)
    a, mix, b = (layer.weight.detach() for layer in (model.a, model.mix, model.b))
    torch.testing.assert_close(scores["mix"], mix.abs() * a.norm() * b.norm())
    torch.testing.assert_close(scores["b"], b.abs() * mix.norm())
    torch.testing.assert_close(scores["a"], a.abs() * mix.norm())
