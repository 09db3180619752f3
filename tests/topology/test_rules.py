# SPDX-License-Identifier: MIT
"""Operations that are no moves: activations, sums and products, norms, weights in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net, randomized
from tests.helpers.topologies import V, W, Weighted, followed, pairs

ROWS = torch.randn(2, 6)


def linear(out: int = 6, into: int = 6) -> nn.Linear:
    return nn.Linear(into, out)


def followed_rows(function: Callable[[Tensor], Tensor], n: int = 6) -> dict[tuple[int, int], float]:
    """Layer a, a function, layer b."""
    model = Net(lambda m, x: m.b(m.function(m.a(x))), a=linear(), b=linear(2, n))
    model.function = function
    return followed(lap_ext.trace(model, ROWS))


def same(n: int = 6) -> dict[tuple[int, int], float]:
    return {(i, i): 1.0 for i in range(n)}


# ---- activations ---------------------------------------------------------------------------------
ACTIVATIONS = """relu relu6 gelu silu mish elu selu celu leaky_relu rrelu sigmoid tanh hardswish
hardsigmoid hardtanh hardshrink softshrink tanhshrink softplus softsign logsigmoid softmax
log_softmax softmin dropout alpha_dropout feature_alpha_dropout normalize""".split()
UNARY = """exp expm1 log log1p sqrt rsqrt neg abs sin cos atan erf square reciprocal sign round
floor ceil trunc nan_to_num clone contiguous detach double half positive sigmoid_ relu_ tanh_
exp_""".split()
WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": lambda x: x * torch.sigmoid(1.7 * x),
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x),
    "clamp": lambda x: x.clamp(-1, 1).clamp_min(0).clamp(max=2),
    "power": lambda x: x**3,
    "masked": lambda x: x.masked_fill(x < 0, 0.0),
    "centered": lambda x: x - x.mean(1, keepdim=True),
    "normed": lambda x: x / x.norm(dim=1, keepdim=True),
    "standardized": lambda x: (
        (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()),
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "statistic_first": lambda x: x.abs().mean(1, keepdim=True) * x,
    "soft_capped": lambda x: torch.tanh(x / 30),
    "gated_by_a_constant": lambda x: x * torch.sigmoid(W),
    "added_numbers": lambda x: x + 1 - W,
    "fake_quantized": lambda x: x + (x.round() - x).detach(),
    "own_dtype": lambda x: x.to(torch.float64).type_as(torch.zeros(1)),
    "half_there_and_back": lambda x: x.bfloat16().float(),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    options = {"dim": 1} if name in ("softmax", "log_softmax", "softmin") else {}
    options |= {"training": False} if "dropout" in name else {}
    assert followed_rows(lambda x: getattr(F, name)(x, **options)) == same()


@pytest.mark.parametrize("name", UNARY)
def test_element_by_element(name: str) -> None:
    assert followed_rows(lambda x: getattr(x, name)().float()) == same()


@pytest.mark.parametrize("name", list(WRITTEN))
def test_activations_written_out(name: str) -> None:
    """However often x occurs, and with a statistic over its own channels: the same channels."""
    factors = {"soft_capped": 1 / 30, "gated_by_a_constant": torch.sigmoid(W).tolist()}
    expected = factors.get(name, 1.0)
    each = expected if isinstance(expected, list) else [expected] * 6
    assert followed_rows(WRITTEN[name]) == pytest.approx({(i, i): each[i] for i in range(6)})


def test_prelu_has_no_layer() -> None:
    model = nn.Sequential(linear(), nn.PReLU(6), linear(2))
    topology = lap_ext.trace(model, ROWS)
    assert list(topology.layers) == ["0", "2"] and pairs(topology, "2", "0") == list(same())


# ---- two operands -------------------------------------------------------------------------------
JOINS: dict[str, Any] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y, "maximum": torch.maximum, "minimum": torch.minimum,
    "max": torch.max, "where": lambda x, y: torch.where(x > y, x, y),
    "add_": lambda x, y: x.add_(y),
    "mul_": lambda x, y: x.mul_(y), "atan2": torch.atan2, "logaddexp": torch.logaddexp,
    "gate": lambda x, y: F.silu(x) * y, "stacked": lambda x, y: torch.stack([x, y]).sum(0),
    "addcmul": lambda x, y: torch.addcmul(x, y, torch.ones(6)), "fmax": torch.fmax,
    "hypot": torch.hypot, "glu": lambda x, y: F.glu(torch.cat([x, y], 1)),
    "broadcast": lambda x, y: (x[:, None] + y[:, None]).squeeze(1),
    "add_at": lambda x, y: x.index_add(0, torch.tensor([1, 0]), y),
    "written_rows": lambda x, y: x.scatter(0, torch.zeros(2, 6).long(), y),
    "masked_scatter": lambda x, y: x.masked_scatter(torch.ones(2, 6) > 0, y),
    "mean": lambda x, y: torch.stack([x, y]).mean(0), "twice": lambda x, y: x + 2 * y,
    "lerp": lambda x, y: torch.lerp(x, y, 0.25), "alpha": lambda x, y: torch.add(x, y, alpha=2),
    "value": lambda x, y: torch.addcmul(x, y, torch.ones(2, 6), value=2),
    "rsub": lambda x, y: torch.rsub(x, y, alpha=3), "quotient": lambda x, y: torch.addcdiv(x, y, V),
    "product": lambda x, y: torch.addcmul(torch.ones(6), x, y), "nothing": lambda x, y: 0.0 * x + y,
    "pow": torch.pow, "clamp": lambda x, y: x.clamp(max=y),
    "clamp_min": lambda x, y: x.clamp_min(y),
    "clamp_of_constant": lambda x, y: torch.ones(2, 6).clamp(x, y),
}  # fmt: skip
FACTORS: dict[str, tuple[Any, Any]] = {
    "mean": (0.5, 0.5), "twice": (1, 2), "lerp": (0.75, 0.25), "alpha": (1, 2), "value": (1, 2),
    "rsub": (3, 1), "quotient": (1, (1 / V).tolist()), "nothing": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", list(JOINS))
def test_two_operands(name: str) -> None:
    """Both feed the result: a sum, and a product with the other operand at 1."""
    model = Net(lambda m, x: m.b(m.join(m.a(x), m.c(x))), a=linear(), c=linear(), b=linear(2))
    model.join = JOINS[name]
    topology = lap_ext.trace(model, ROWS)
    for producer, factor in zip("ac", FACTORS.get(name, (1, 1)), strict=True):
        edges = [edge for edge in topology.layers["b"].prev if edge.name == producer]
        if factor == 0:
            assert not edges
            continue
        (edge,) = edges
        assert edge.here.tolist() == edge.there.tolist() == list(range(6))
        scale = torch.ones(6) if edge.scale is None else edge.scale
        expected = torch.tensor(factor, dtype=torch.float64).expand(6)
        torch.testing.assert_close(scale.double(), expected, rtol=1e-6, atol=0)


def test_a_sum_across() -> None:
    """[N, 6, 1] + [N, 1, 6]: each of the 36 results has two parents."""
    model = Net(
        lambda m, x: m.b((m.a(x)[:, :, None] + m.c(x)[:, None]).flatten(1)),
        a=linear(),
        c=linear(),
        b=linear(2, 36),
    )
    topology = lap_ext.trace(model, ROWS)
    assert pairs(topology, "b", "a") == [(n, n // 6) for n in range(36)]
    assert pairs(topology, "b", "c") == [(n, n % 6) for n in range(36)]


def test_a_choice_ends_its_channels() -> None:
    """Nobody reads an argmax's channels, but it is an output of a kind."""
    model = Net(lambda m, x: m.b(x) * m.a(x).argmax(1, keepdim=True), a=linear(), b=linear(2))
    topology = lap_ext.trace(model, ROWS)
    assert [(edge.name, edge.kind) for edge in topology.layers["a"].next] == [
        ("argmax", "boundary")
    ]


# ---- norms ------------------------------------------------------------------------------------
def tracked(norm: nn.Module) -> nn.Module:
    return randomized(norm).float()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch_plain": lambda: nn.BatchNorm2d(4, affine=False, eps=0.3),
    "batch_untracked": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "group_plain": lambda: nn.GroupNorm(2, 4, affine=False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance_plain": lambda: nn.InstanceNorm2d(4),
    "instance_tracked": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "instance_tracked_plain": lambda: nn.InstanceNorm2d(4, track_running_stats=True, eps=0.2),
    "local": lambda: nn.LayerNorm([4, 3, 5]),
}


@pytest.mark.parametrize("name", list(NORMS))
def test_norms_of_images(name: str) -> None:
    """Running statistics count, others are 1; a weight that varies counts by its mean square."""
    norm = tracked(NORMS[name]())
    model = Net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Conv2d(3, 4, 1), n=norm, b=nn.Conv2d(4, 2, 1))
    topology = lap_ext.trace(model, torch.randn(2, 3, 3, 5))
    weight = torch.ones(4) if norm.weight is None else norm.weight.detach()
    gain = weight.flatten(1).square().mean(1).sqrt() if weight.dim() > 1 else weight.abs()
    if getattr(norm, "running_var", None) is not None:
        gain = gain / (norm.running_var + norm.eps).sqrt()
    expected = {(i, i): float(gain[i]) for i in range(4)}
    assert followed(topology) == pytest.approx(expected, rel=1e-6)


def test_statistics_of_the_batch_count_one() -> None:
    """Where a model asks for them itself, in whichever mode it is."""
    weight, mean, variance = torch.rand(6) + 0.5, torch.rand(6), torch.rand(6)
    got = followed_rows(lambda x: F.batch_norm(x, mean, variance, weight, training=True))
    assert got == pytest.approx({(i, i): float(weight[i]) for i in range(6)})


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d])
def test_norms_of_rows(norm: Any, affine: bool) -> None:
    name = "affine" if norm is nn.BatchNorm1d else "elementwise_affine"
    layer = tracked(norm(6, **{name: affine}))
    model = nn.Sequential(linear(), layer, linear(2))
    edge = lap_ext.trace(model, ROWS).layers["2"].prev[0]
    gain = layer.weight.detach() if affine else torch.ones(6)
    if norm is nn.BatchNorm1d:
        gain = gain / (layer.running_var + layer.eps).sqrt()
    scale = torch.ones(6) if edge.scale is None else edge.scale
    torch.testing.assert_close(scale.float(), gain.abs(), rtol=1e-6, atol=0)
    assert (edge.scale is None) == (not affine and norm is not nn.BatchNorm1d)


def test_images_that_the_model_standardizes() -> None:
    """Constants scale the edge from the input, color by color."""
    mean, deviation = torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 0.5
    model = Net(lambda m, x: m.a((x - mean) / deviation), a=nn.Conv2d(3, 2, 1))
    scores = lap_ext.scores(model, torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(scores["a"], model.a.weight.detach().abs() / deviation)


def test_gemma_norm() -> None:
    """(1 + w) after a written-out RMS norm."""

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w)

    got = followed_rows(Weighted(W, norm))
    assert got == pytest.approx({(i, i): abs(1 + float(W[i])) for i in range(6)})


def test_weight_by_weight_norms_follow_the_weights() -> None:
    """A scale is computed when scores are: from the weights of that moment."""
    model = nn.Sequential(linear(), nn.LayerNorm(6), linear(2))
    topology = lap_ext.trace(model, ROWS)
    before = lap_ext.scores(model, topology=topology)["2"]
    with torch.no_grad():
        model[1].weight.mul_(3)
    torch.testing.assert_close(lap_ext.scores(model, topology=topology)["2"], 3 * before)


# ---- weights in every form ----------------------------------------------------------------------
X3 = torch.randn(2, 5, 6)
FORMS: dict[str, tuple[tuple[int, ...], str, Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((3, 6), "oi", F.linear),
    "matmul": ((6, 3), "io", lambda x, w: x @ w),
    "matmul_transposed": ((3, 6), "oi", lambda x, w: x @ w.t()),
    "mm": ((6, 3), "io", lambda x, w: torch.mm(x.flatten(0, 1), w).unflatten(0, (2, 5))),
    "from_the_left": ((3, 6), "oi", lambda x, w: (w @ x.mT).mT),
    "from_the_left_transposed": ((6, 3), "io", lambda x, w: (w.T @ x.mT).mT),
    "addmm": ((6, 3), "io", lambda x, w: torch.addmm(W[:3], x[0], w)),
    "vector": ((6, 3), "io", lambda x, w: x[0, 0] @ w),
    "by_vector": ((3, 6), "oi", lambda x, w: w @ x[0, 0]),
    "mv": ((3, 6), "oi", lambda x, w: torch.mv(w, x[0, 0])),
    "tensordot": ((6, 3), "io", lambda x, w: torch.tensordot(x, w, dims=1)),
    "tensordot_weight_first": (
        (3, 6), "oi", lambda x, w: torch.tensordot(w, x, dims=([1], [2])).permute(1, 2, 0)),
    "tensordot_heads": (
        (2, 3, 3), "io", lambda x, w: torch.tensordot(x.unflatten(2, (2, 3)), w, dims=2)),
    "einsum_any": ((3, 6), "oi", lambda x, w: torch.einsum("...i,oi->...o", x, w)),
    "einsum_implicit": ((6, 3), "io", lambda x, w: torch.einsum("...i, ij", x, w)),
    "einsum_any_weight_first": ((3, 6), "oi", lambda x, w: torch.einsum("oi,...i->...o", w, x)),
    "einsum": ((3, 6), "oi", lambda x, w: torch.einsum("nti,oi->nto", x, w)),
    "einsum_io": ((6, 3), "io", lambda x, w: torch.einsum("nti,io->nto", x, w)),
    "einsum_weight_first": ((3, 6), "oi", lambda x, w: torch.einsum("oi,nti->nto", w, x)),
    "einsum_moved": ((3, 6), "oi", lambda x, w: torch.einsum("nti,oi->not", x, w).mT),
    "einsum_heads": ((6, 3, 1), "io", lambda x, w: torch.einsum("nti,ihd->nthd", x, w).flatten(2)),
    "einsum_heads_in": ((2, 3, 3), "io",
                        lambda x, w: torch.einsum("nthd,hdo->nto", x.unflatten(2, (2, 3)), w)),
    "einsum_three": ((6, 3), "io", lambda x, w: torch.einsum("o,nti,io->nto", torch.ones(3), x, w)),
    "conv": ((3, 6, 1), "oi", lambda x, w: F.conv1d(x.mT, w).mT),
    "conv_of_matrix": ((3, 6), "oi", lambda x, w: F.conv1d(x.mT, w[:, :, None]).mT),
    "vmap": ((3, 6), "oi", lambda x, w: torch.vmap(lambda y: F.linear(y, w))(x)),
    "conv_transpose": ((6, 3, 1), "io", lambda x, w: F.conv_transpose1d(x.mT, w).mT),
    "flattened": ((3, 2, 3), "oi", lambda x, w: F.linear(x, w.flatten(1))),
    "cloned": ((3, 6), "oi", lambda x, w: F.linear(x, w.clone().contiguous().float())),
    "squeezed": ((3, 6, 1), "oi", lambda x, w: F.linear(x, w.squeeze(-1))),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORMS))
def test_weights_in_every_form(name: str) -> None:
    """|w| * ||row of a|| * ||column of b||, whichever way round the weight is kept."""
    shape, order, function = FORMS[name]
    model = Net(lambda m, x: m.b(function(m.a(x), m.w)), a=linear(), b=linear(2, 3))
    model.w = nn.Parameter(torch.randn(shape))
    randomized(model).double()
    scores = lap_ext.scores(model, X3.double())
    rows = model.a.weight.norm(dim=1)  # [6]
    columns = model.b.weight.norm(dim=0)  # [3]
    matrix = torch.outer(columns, rows) if order == "oi" else torch.outer(rows, columns)
    torch.testing.assert_close(scores["w"], model.w.abs() * matrix.reshape(shape).detach())
    torch.testing.assert_close(scores["b"] / model.b.weight.abs(), weight_norms(model.w, order))


def weight_norms(weight: Tensor, order: str) -> Tensor:
    """[2, outputs] of a matrix that is kept one way or the other."""
    if order == "oi":
        return weight.reshape(3, -1).norm(dim=1).expand(2, 3).detach()
    return weight.reshape(6, 3).norm(dim=0).expand(2, 3).detach()


def test_sums_inside_a_product() -> None:
    """addmm and baddbmm add what they are given, with both of their numbers."""
    model = Net(
        lambda m, x: m.b(torch.addmm(m.a(x), m.c(x), m.w, beta=2, alpha=3)),
        a=linear(),
        c=linear(),
        b=linear(2),
        w=nn.Parameter(torch.randn(6, 6)),
    )
    result = lap_ext.trace(model, ROWS).layers["b"].prev
    assert [(e.name, e.channel_map, set(e.scale.tolist())) for e in result] == [
        ("a", "same", {2.0}),
        ("w", "same", {3.0}),
    ]
    model.w = nn.Parameter(torch.randn(1, 6, 6))
    model.rule = lambda m, x: m.b(torch.baddbmm(m.a(x)[None], m.c(x)[None], m.w)[0])
    assert [edge.name for edge in lap_ext.trace(model, ROWS).layers["b"].prev] == ["a", "w"]


def test_parts_of_a_weight() -> None:
    """Channels are counted through the full parameter, on either side and however it is stored."""

    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)  # [N, 6]
        rows, columns = F.linear(h, m.w[2:5]), F.linear(h[:, :4], m.w[:3, 1:5])
        flipped = h[:, 4:] @ m.v[3:5, 2:]
        return m.b(torch.cat([rows, columns, flipped], 1))

    model = Net(rule, a=linear(), b=linear(2, 10))
    model.w, model.v = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 6))
    topology = lap_ext.trace(model, ROWS)
    w, v = topology.layers["w"], topology.layers["v"]
    assert [(r.part.rows, r.part.cols, r.part.transposed) for r in (*w.roles, *v.roles)] == [
        ((2, 5), None, False),
        ((0, 3), (1, 5), False),
        ((3, 5), (2, 6), True),
    ]
    shown = [list(zip(e.here.tolist(), e.there.tolist(), strict=True)) for e in (*w.prev, *v.prev)]
    everything = [(i, i) for i in range(6)]  # (input of the weight, channel of a)
    assert shown == [everything, [(1, 0), (2, 1), (3, 2), (4, 3)], [(3, 4), (4, 5)]]
    result = {e.name: list(zip(e.here.tolist(), e.there.tolist(), strict=True))
             for e in topology.layers["b"].prev}  # fmt: skip
    assert sorted(result["w"]) == [(0, 2), (1, 3), (2, 4), (3, 0), (4, 1), (5, 2)]
    assert result["v"] == [(6, 2), (7, 3), (8, 4), (9, 5)]
    readers = {e.name: set(zip(e.here.tolist(), e.there.tolist(), strict=True))
               for e in topology.layers["a"].next}  # fmt: skip
    assert readers == {"w": {*everything, (0, 1), (1, 2), (2, 3), (3, 4)}, "v": {(4, 3), (5, 4)}}


def test_parts_of_a_kernel() -> None:
    """Rows and columns of a convolution, entries of an embedding: of a slimmed network."""

    def rule(m: Any, x: Tensor) -> Tensor:
        h = F.conv2d(m.a(x), m.w[:3, 1:5])
        h = F.conv2d(h, m.d[:3], groups=3)
        return m.b(F.conv2d(h, m.u[2:4, :3])) + F.embedding(torch.zeros(2, 2, 2).long(), m.e[1:3])

    model = Net(rule, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(2, 2, 1))
    sizes = {"w": (4, 6, 1, 1), "d": (5, 1, 1, 1), "u": (6, 4, 1, 1), "e": (4, 2)}
    for name, size in sizes.items():
        setattr(model, name, nn.Parameter(torch.randn(size)))
    scores = lap_ext.scores(
        randomized(model), torch.randn(1, 3, 2, 2, dtype=torch.float64), layers="*"
    )
    used = {"w": model.w[:3, 1:5], "d": model.d[:3], "u": model.u[2:4, :3], "e": model.e[1:3]}
    inside = {"w": scores["w"][:3, 1:5], "d": scores["d"][:3], "u": scores["u"][2:4, :3],
              "e": scores["e"][1:3]}  # fmt: skip
    rows = {name: x.detach().flatten(1).norm(dim=1) for name, x in used.items()}
    columns = model.u[2:4, :3].detach().flatten(1).norm(dim=0)
    expected = {
        "w": used["w"].abs() * rows["d"].new_tensor(model.d[:3].flatten().abs().tolist()).view(
            3, 1, 1, 1) * model.a.weight.detach().flatten(1).norm(dim=1).view(1, 4, 1, 1),
        "d": used["d"].abs() * (rows["w"] * columns).view(3, 1, 1, 1),
    }  # fmt: skip
    for name, x in expected.items():
        torch.testing.assert_close(inside[name], x.detach())
    for name, x in inside.items():
        assert int((scores[name] != 0).sum()) == x.numel() and bool((x != 0).all())


def test_einsum_in_another_order() -> None:
    """Heads and their channels are swapped on the way out."""
    rule = lambda m, x: m.b(torch.einsum("nti,ihd->ntdh", m.a(x), m.w).flatten(2))  # noqa: E731
    model = Net(rule, a=linear(), b=linear(2), w=nn.Parameter(torch.randn(6, 2, 3)))
    topology = lap_ext.trace(model, X3)
    assert pairs(topology, "b", "w") == [(2 * d + h, 3 * h + d) for d in range(3) for h in range(2)]


def test_einsum_meets_from_the_right() -> None:
    """As in broadcasting: [N, heads, channels] and [heads, channels]."""

    def rule(m: Any, x: torch.Tensor) -> torch.Tensor:
        left, right = m.a(x).unflatten(1, (2, 3)), m.c(x)[0].unflatten(0, (2, 3))
        return m.b(torch.einsum("...d,...d->...d", left, right).flatten(1))

    topology = lap_ext.trace(Net(rule, a=linear(), c=linear(), b=linear()), torch.randn(3, 6))
    for name in "ac":
        assert pairs(topology, "b", name) == [(i, i) for i in range(6)]


def test_a_layer_that_nothing_reads_counts_as_the_last() -> None:
    model = Net(lambda m, x: m.b(x) * (m.a(x) > 0), a=linear(), b=linear())
    topology = lap_ext.trace(model, ROWS)
    assert topology.layers["a"].next == []
    scores = lap_ext.scores(model, topology=topology)
    torch.testing.assert_close(scores["a"], model.a.weight.detach().abs())


def test_a_part_written_by_an_operation() -> None:
    """Through views of views, without an assignment: rows 0 to 2 are read by c, then scaled."""

    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h.view(2, 2, 3)[:, 0].add_(m.c(x))
        h.chunk(2, 1)[1].mul_(2.0)
        return m.b(h)

    topology = lap_ext.trace(Net(rule, a=linear(), c=linear(3), b=linear(2)), ROWS)
    assert followed(topology) == {(i, i): 1.0 if i < 3 else 2.0 for i in range(6)}
    assert pairs(topology, "b", "c") == [(0, 0), (1, 1), (2, 2)]


def test_a_result_written_elsewhere() -> None:
    """What out= names is written over, what is read stays as it was."""

    def rule(m: Any, x: Tensor) -> Tensor:
        h, c = m.a(x), m.c(x)
        torch.mul(c, 2, out=h)
        return m.b(h) + m.d(c)

    layers = {"a": linear(), "c": linear(), "b": linear(2), "d": linear(2)}
    topology = lap_ext.trace(Net(rule, **layers), ROWS)
    assert [(e.name, e.scale is None) for e in topology.layers["b"].prev] == [("c", False)]
    assert [(e.name, e.scale is None) for e in topology.layers["d"].prev] == [("c", True)]
    assert topology.layers["a"].next == []
