# SPDX-License-Identifier: MIT
"""Units across layers against the definition: dense matrices, with and without the unit.

    worth^2 = sum over the layers that make the unit of || W_next (W - W without it) W_prev ||_F^2

The matrices of a model's neighborhoods are put together here by hand, or by running the model
(tests/helpers/network_oracle.py); neither knows lap_ext.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext import criteria
from lap_ext.criteria.context import Network
from lap_ext.criteria.exact_groups import group_worths
from lap_ext.places.memory import Memory
from lap_ext.topology.coupling import CoupledGroup, CoupledGroups, Family
from tests import zoo
from tests.helpers.cut_place import Cut
from tests.helpers.linear_nets import CASES, runs
from tests.helpers.networks import Net, conv, linear, randomized

RTOL = 1e-9
EYE = torch.eye(4, dtype=torch.float64)  # the inputs of a model
LOOKAHEAD = criteria.Lookahead()


# ---- the definition ------------------------------------------------------------------------------
@dataclass
class Made:
    """A layer that makes channels, as matrices."""

    weight: Tensor  # [outputs, inputs]
    prev: Tensor  # [inputs, ...]
    following: Tensor  # [..., outputs]

    def worth(self, rows: Iterable[int]) -> Tensor:
        """The squared change when rows go; the same when the columns that read them do."""
        without, unread = self.weight.clone(), self.following.clone()
        for row in rows:
            without[row] = 0
            unread[:, row] = 0
        change = self.following @ self.weight @ self.prev - self.following @ without @ self.prev
        same = (self.following - unread) @ self.weight @ self.prev
        torch.testing.assert_close(change, same, rtol=1e-9, atol=1e-12)
        return change.square().sum()


Unit = frozenset[tuple[str, int]]  # (layer, output channel)


@dataclass
class Hand:
    """A model, what each of its layers does (several views: squares add), and its units."""

    model: nn.Module
    inputs: Tensor
    structure: str
    units: list[Unit]
    layers: dict[str, list[Made]] = field(default_factory=dict)

    def expected(self, unit: Unit) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for name, layers in self.layers.items():
            rows = [row for layer, row in unit if layer == name]
            total += sum(layer.worth(rows) for layer in layers)
        return float(total.sqrt())


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight as a dense matrix; a grouped convolution of one position as blocks."""
    result = {}
    for name, module in model.named_children():
        weight = module.weight.detach().flatten(1)
        groups = getattr(module, "groups", 1)
        result[name] = torch.block_diag(*weight.chunk(groups))
    return result


def singles(name: str, count: int) -> list[Unit]:
    return [frozenset([(name, row)]) for row in range(count)]


def pairs(one: str, other: str, count: int) -> list[Unit]:
    return [frozenset([(one, row), (other, row)]) for row in range(count)]


def residual() -> Hand:
    rule = lambda m, x: m.d((y := m.a(x)) + m.c(torch.relu(m.b(y))))  # noqa: E731
    model = randomized(Net(rule, a=linear(), b=linear(5), c=linear(4, 5), d=linear(3)))
    w = weights(model)
    layers = {
        "a": [Made(w["a"], EYE, torch.cat([w["b"], w["d"]]))],
        "b": [Made(w["b"], w["a"], w["c"])],
        "c": [Made(w["c"], w["b"], w["d"])],
    }
    return Hand(model, EYE[:1], "channel", pairs("a", "c", 4) + singles("b", 5), layers)


def concatenated() -> Hand:
    rule = lambda m, x: m.d(torch.cat([m.b(y := torch.relu(m.a(x))), m.c(y), y], 1))  # noqa: E731
    model = randomized(Net(rule, a=linear(3), b=linear(2, 3), c=linear(4, 3), d=linear(3, 9)))
    w = weights(model)
    layers = {
        "a": [Made(w["a"], EYE, torch.cat([w["b"], w["c"], w["d"][:, 6:]]))],
        "b": [Made(w["b"], w["a"], w["d"][:, :2])],
        "c": [Made(w["c"], w["a"], w["d"][:, 2:6])],
    }
    units = singles("a", 3) + singles("b", 2) + singles("c", 4)
    return Hand(model, EYE[:1], "channel", units, layers)


def grouped() -> Hand:
    rule = lambda m, x: m.c(m.b(m.a(x)))  # noqa: E731
    model = randomized(Net(rule, a=conv(8), b=conv(6, 8, groups=2), c=conv(3, 6)))
    w = weights(model)
    layers = {"a": [Made(w["a"], EYE, w["b"])], "b": [Made(w["b"], w["a"], w["c"])]}
    units = singles("a", 8) + singles("b", 6)
    return Hand(model, EYE[:1, :, None, None], "channel", units, layers)


def depthwise() -> Hand:
    """Its channel is that of the layer before: both make the unit."""
    rule = lambda m, x: m.c(m.b(m.a(x)))  # noqa: E731
    model = randomized(Net(rule, a=conv(6), b=conv(6, 6, groups=6), c=conv(3, 6)))
    w = weights(model)
    layers = {"a": [Made(w["a"], EYE, w["b"])], "b": [Made(w["b"], w["a"], w["c"])]}
    return Hand(model, EYE[:1, :, None, None], "channel", pairs("a", "b", 6), layers)


def gated() -> Hand:
    rule = lambda m, x: m.d(F.silu(m.g(y := m.a(x))) * m.u(y))  # noqa: E731
    model = randomized(Net(rule, a=linear(), g=linear(6), u=linear(6), d=linear(3, 6)))
    w = weights(model)
    layers = {
        "a": [Made(w["a"], EYE, torch.cat([w["g"], w["u"]]))],
        "g": [Made(w["g"], w["a"], w["d"])],  # d(ab) = da + db
        "u": [Made(w["u"], w["a"], w["d"])],
    }
    return Hand(model, EYE[:1], "channel", singles("a", 4) + pairs("g", "u", 6), layers)


HEADS, WIDTH, TIMES = 4, 2, 2  # query heads, their width, and how many share a key and a value


def grouped_queries(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    q, k, v = (p(y).unflatten(-1, (-1, WIDTH)).transpose(-2, -3) for p in (m.q, m.k, m.v))
    k, v = (z.repeat_interleave(TIMES, -3) for z in (k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return m.o(out.transpose(-2, -3).flatten(-2))


def grouped_attention() -> tuple[nn.Module, Tensor]:
    few, all_ = HEADS // TIMES * WIDTH, HEADS * WIDTH
    layers = {"a": linear(), "q": linear(all_), "k": linear(few), "v": linear(few)}
    model = randomized(Net(grouped_queries, **layers, o=linear(3, all_)))
    return model, torch.randn(1, HEADS, 4, dtype=torch.float64)


def values_of(w: dict[str, Tensor]) -> Made:
    """The path of the values: head h reads position h, so that no two heads are the same map."""
    few = HEADS // TIMES * WIDTH
    read = torch.zeros(HEADS * WIDTH, HEADS * few, dtype=torch.float64)
    for head in range(HEADS):
        for c in range(WIDTH):
            read[head * WIDTH + c, head * few + head // TIMES * WIDTH + c] = 1
    positions = torch.eye(HEADS, dtype=torch.float64)
    made, before = torch.kron(positions, w["v"]), torch.kron(positions, w["a"])
    return Made(made, before, w["o"] @ read)


def heads() -> Hand:
    model, x = grouped_attention()
    w, few = weights(model), HEADS // TIMES * WIDTH
    units = []
    for kv in range(HEADS // TIMES):
        rows = range(kv * WIDTH, (kv + 1) * WIDTH)
        units.append(frozenset(("v", t * few + row) for t in range(HEADS) for row in rows))
    return Hand(model, x, "head", units, {"v": [values_of(w)]})


HANDS: dict[str, Callable[[], Hand]] = {
    f.__name__: f for f in (residual, concatenated, grouped, depthwise, gated)
}


def network(model: nn.Module, inputs: Tensor, **how: object) -> Network:
    return Network(Memory(lap_ext.trace(model, inputs)), **how)  # type: ignore[arg-type]


def unit_of(group: CoupledGroup) -> Unit:
    """The rows that a group has of weights."""
    result = set()
    for name, shape, rows, cols in group.members:
        if len(shape) == 2 and cols is None:
            every = range(shape[0]) if rows is None else rows.tolist()
            result |= {(name.removesuffix(".weight"), row) for row in every}
    return frozenset(result)


@pytest.mark.parametrize("name", HANDS)
@pytest.mark.parametrize("seed", range(3))
def test_against_dense_matrices(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    hand = HANDS[name]()
    net = network(hand.model, hand.inputs)
    groups = net.topology.groups("channel")
    got = group_worths(net, LOOKAHEAD, groups)
    assert got.dtype == torch.float64 and got.shape == (len(groups),)
    found = dict(zip(map(unit_of, groups), got.tolist(), strict=True))
    assert found == pytest.approx({x: hand.expected(x) for x in hand.units}, rel=RTOL, abs=0)


def test_heads_against_the_path_of_their_values() -> None:
    torch.manual_seed(1)
    hand = heads()
    net = network(hand.model, hand.inputs)
    groups = net.topology.groups("head")
    got = group_worths(net, LOOKAHEAD, groups)
    assert got.tolist() == pytest.approx([hand.expected(x) for x in hand.units], rel=RTOL, abs=0)


def test_queries_count_for_the_logits() -> None:
    """A channel of a key goes with its queries: || k[c]^T q[c, :] W_prev || for each of them."""
    torch.manual_seed(2)
    model, x = grouped_attention()
    net = network(model, x)
    groups = net.topology.groups("channel")
    got = group_worths(net, LOOKAHEAD, groups)
    w = weights(model)
    found = 0
    for group, worth in zip(groups, got.tolist(), strict=True):
        unit = unit_of(group)
        queries, keys = ([row for name, row in unit if name == side] for side in "qk")
        if not keys:
            continue
        total = torch.zeros((), dtype=torch.float64)
        for row in queries:
            key = row // (WIDTH * TIMES) * WIDTH + row % WIDTH
            assert key in keys
            total += (w["k"][key, :, None] @ w["q"][None, row] @ w["a"]).square().sum()
        assert worth == pytest.approx(float(total.sqrt()), rel=RTOL)
        found += 1
    assert found > 0


@pytest.mark.parametrize("packed", [False, True])
def test_heads_are_those_of_values_however_packed(packed: bool) -> None:
    """Queries and keys count nothing in a head, also as rows of the layer that makes values."""
    torch.manual_seed(3)

    def rule(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = m.p(y).chunk(3, -1) if packed else (m.q(y), m.k(y), m.v(y))
        q, k, v = (z.unflatten(-1, (2, 3)).transpose(1, 2) for z in (q, k, v))
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    given = {"p": linear(18)} if packed else {name: linear(6) for name in "qkv"}
    model = randomized(Net(rule, a=linear(), o=linear(4, 6), **given))
    net = network(model, torch.randn(1, 2, 4, dtype=torch.float64))
    w = weights(model)
    values = w["p"][12:] if packed else w["v"]
    for criterion, before, after in (
        (LOOKAHEAD, w["a"], w["o"]),
        (criteria.Lookback(), w["a"], torch.eye(6).double()),
        (criteria.Lookforward(), EYE, w["o"]),
        (criteria.Criterion(), EYE, torch.eye(6).double()),
    ):
        got = group_worths(net, criterion, net.topology.groups("head"))
        expected = [
            float((after[:, x] @ values[x] @ before).norm()) for x in (slice(3), slice(3, 6))
        ]
        assert got.tolist() == pytest.approx(expected, rel=RTOL)


# ---- the network itself, run without them --------------------------------------------------------
LOGITS = {"attention": {"k"}}  # the other side of the same logits
VIEWS = "with and without groups"  # one weight in two shapes: its rows are in two groups


@pytest.mark.parametrize("name", [name for name in CASES if name != VIEWS])
def test_against_the_network_without_them(name: str) -> None:
    against_the_network(name, LOOKAHEAD, True, True)


@pytest.mark.parametrize(
    ("criterion", "before", "after"),
    [(criteria.Lookback(), True, False), (criteria.Lookforward(), False, True)],
)
@pytest.mark.parametrize("name", ["residual", "grouped", "transposed", "gated", "packed", "twice"])
def test_one_side(name: str, criterion: criteria.Criterion, before: bool, after: bool) -> None:
    against_the_network(name, criterion, before, after)


def against_the_network(
    name: str, criterion: criteria.Criterion, before: bool, after: bool
) -> None:
    torch.manual_seed(4)
    case = CASES[name]
    model = randomized(case.build())
    net, oracle = network(model, torch.randn(case.shape, dtype=torch.float64)), runs(model, case)
    groups = net.topology.groups("channel")
    got = group_worths(net, criterion, groups)
    for group, worth in zip(groups, got, strict=True):
        expected = torch.zeros((), dtype=torch.float64)
        for run in oracle:
            for call in run.calls:
                if call.name in LOGITS.get(name, ()):
                    continue
                without = without_rows(call.weight, call.name, group)
                change = call.operator() - call.operator(without)
                change = change @ run.prev(call) if before else change
                change = run.next(call) @ change if after else change
                expected += change.square().sum() / len(oracle)
        torch.testing.assert_close(worth, expected.sqrt(), rtol=RTOL, atol=1e-12)


def without_rows(weight: Tensor, name: str, group: CoupledGroup) -> Tensor:
    """A weight without the outputs of a group: rows, or columns of a transposed convolution."""
    result = weight.clone()
    for member in group.members:
        if member.parameter not in (name, f"{name}.weight"):
            continue
        if member.cols is None and not is_transposed(name, group):
            result[slice(None) if member.rows is None else member.rows] = 0
        elif member.cols is not None and is_transposed(name, group):
            result[slice(None) if member.rows is None else member.rows[:, None], member.cols] = 0
    return result


def is_transposed(name: str, group: CoupledGroup) -> bool:
    return any(x.transposed for x in group._of.weights if x.layer == name)


# ---- any shapes and any partition ----------------------------------------------------------------
@st.composite
def partitions(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Widths of three layers, and the number of each of their channels; -1 for none."""
    widths = draw(st.lists(st.integers(1, 7), min_size=3, max_size=3))
    count = draw(st.integers(1, 5))
    numbers = [draw(st.integers(-1, count - 1)) for _ in range(2 * widths[0] + widths[1])]
    return widths, numbers, count


@given(partitions(), st.integers(0, 1 << 30))
def test_any_partition(drawn: tuple[list[int], list[int], int], seed: int) -> None:
    """Of a residual net's channels, also of different layers, and groups of nothing."""
    (stream, inner, out), numbers, count = drawn
    torch.manual_seed(seed)
    rule = lambda m, x: m.d((y := m.a(x)) + m.c(torch.relu(m.b(y))))  # noqa: E731
    model = Net(
        rule,
        a=linear(stream),
        b=linear(inner, stream),
        c=linear(stream, inner),
        d=linear(out, stream),
    )
    net, w = network(model.double(), EYE[:1]), weights(model)
    graph = net.topology.graph
    ids = torch.full((graph.channels.size,), -1)
    made = {"a": numbers[:stream], "b": numbers[stream:-stream], "c": numbers[-stream:]}
    for role in graph.roles:
        if role.layer in made:
            ids[role.out.ids] = torch.tensor(made[role.layer])
    family = Family("", ("a",), torch.arange(count), torch.zeros(count, dtype=torch.int64))
    got = group_worths(net, LOOKAHEAD, CoupledGroups("channel", [family], [], [], [], {}, ids))
    layers = {
        "a": Made(w["a"], EYE, torch.cat([w["b"], w["d"]])),
        "b": Made(w["b"], w["a"], w["c"]),
        "c": Made(w["c"], w["b"], w["d"]),
    }
    for number, worth in enumerate(got.tolist()):
        total = torch.zeros((), dtype=torch.float64)
        for name, layer in layers.items():
            total += layer.worth([row for row, own in enumerate(made[name]) if own == number])
        assert worth == pytest.approx(float(total.sqrt()), rel=RTOL, abs=1e-14)


# ---- what counts ---------------------------------------------------------------------------------
def test_a_tied_weight_counts_where_it_makes_the_channels() -> None:
    """Columns of an embedding; not again in the head, which reads them."""
    torch.manual_seed(5)
    rule = lambda m, x: F.linear(m.n(m.e(x)), m.e.weight)  # noqa: E731
    model = randomized(Net(rule, e=nn.Embedding(7, 4), n=nn.Identity()))
    net = Network(Memory(lap_ext.trace(model, torch.tensor([[3]]))))
    groups = net.topology.groups("channel")
    w = model.e.weight.detach()
    assert len(groups) == 4
    for criterion, after in ((LOOKAHEAD, w), (criteria.Lookback(), EYE)):
        got = group_worths(net, criterion, groups)
        expected = [float((after[:, [c]] @ w.T[[c]]).norm()) for c in range(4)]
        assert got.tolist() == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("name", ["residual", "twice", "packed", "depthwise", "transposed"])
def test_magnitude_is_energy_of_what_makes_them(name: str) -> None:
    """Once for a weight, however often it is used."""
    case = CASES[name]
    model = randomized(case.build())
    net = network(model, torch.randn(case.shape, dtype=torch.float64))
    groups = net.topology.groups("channel")
    got = group_worths(net, criteria.Criterion(), groups)
    parameters = dict(model.named_parameters())
    for group, worth in zip(groups, got.tolist(), strict=True):
        total = 0.0
        for layer in net.topology.layers.values():
            weight = parameters[layer.roles[0].parameter].detach()
            total += float((weight - without_rows(weight, layer.name, group)).square().sum())
        assert worth == pytest.approx(total**0.5, rel=1e-12)


def test_biases_of_logits_do_not_count_in_heads() -> None:
    """T5's relative position biases are logits, as queries and keys are."""
    entry = next(x for x in zoo.ENTRIES if "t5" in x.name)
    model, args, kwargs = entry.make()
    topology = lap_ext.trace(model, args or kwargs)
    groups = topology.groups("head")
    before = group_worths(Network(Memory(topology)), LOOKAHEAD, groups)
    others = {name for x in groups for name, *_ in x.members if name.endswith("bias.weight")}
    assert others
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name in others:
                x.mul_(3)
    assert torch.equal(before, group_worths(Network(Memory(topology)), LOOKAHEAD, groups))
    assert bool((before > 0).all())


@pytest.mark.parametrize("structure", ["channel", "head", "unit"])
@pytest.mark.parametrize("name", ["lenet", "densenet", "decoder_gqa", "mixer", "lstm"])
def test_every_group_of_the_zoo_has_a_worth(name: str, structure: str) -> None:
    entry = next((x for x in zoo.ENTRIES if x.name == name), None)
    assert entry is not None
    model, args, kwargs = entry.make()
    net = Network(Memory(lap_ext.trace(model, args or kwargs)))
    groups = net.topology.groups(structure)
    got = group_worths(net, LOOKAHEAD, groups)
    assert got.shape == (len(groups),) and bool((got > 0).all())


# ---- places --------------------------------------------------------------------------------------
def masked() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    torch.manual_seed(6)
    case = CASES["residual"]
    masks = {"a": torch.rand(4, 4) < 0.5, "c": torch.rand(4, 5) < 0.5}
    return randomized(case.build()), torch.randn(case.shape, dtype=torch.float64), masks


def test_masks_count() -> None:
    """In the layers and in their neighbors."""
    model, x, masks = masked()
    topology = lap_ext.trace(model, x)
    groups = topology.groups("channel")
    got = group_worths(Network(Memory(topology, masks)), LOOKAHEAD, groups)
    with torch.no_grad():
        for name, mask in masks.items():
            topology.layers[name].weight.mul_(mask)
    torch.testing.assert_close(got, group_worths(Network(Memory(topology)), LOOKAHEAD, groups))


def test_every_place_gives_the_same() -> None:
    """The same bits from one whose chunks do not stay, in another order: a sum of many layers."""
    torch.manual_seed(7)
    rule = lambda m, x: m.z(sum(m.get_submodule(name)(x) for name in "abcdef"))  # noqa: E731
    layers = {name: linear(32) for name in "abcdef"}
    topology = lap_ext.trace(randomized(Net(rule, **layers, z=linear(3, 32))), EYE[:1])
    groups = topology.groups("channel")
    for masks in ({}, {name: torch.rand(32, 4) < 0.5 for name in "ace"}):
        held, cut = Memory(topology, masks), Cut(topology, fits=True, masks=masks)
        got = [group_worths(Network(place), LOOKAHEAD, groups) for place in (held, cut)]
        assert len(groups) == 32 and torch.equal(*got)


def test_a_large_weight_keeps_its_range() -> None:
    """The squares of 1e200 would be infinite."""
    model, x, _ = masked()
    topology = lap_ext.trace(model, x)
    groups = topology.groups("channel")
    before = group_worths(Network(Memory(topology)), criteria.Criterion(), groups)
    with torch.no_grad():
        for layer in topology.layers.values():
            layer.weight.mul_(2.0**700)
    got = group_worths(Network(Memory(topology)), criteria.Criterion(), groups)
    assert torch.equal(got, before * 2.0**700)


def test_a_layer_without_room() -> None:
    model, x, _ = masked()
    topology = lap_ext.trace(model, x)
    with pytest.raises(lap_ext.errors.LapValueError, match="room for a full layer"):
        group_worths(Network(Cut(topology)), LOOKAHEAD, topology.groups("channel"))


def test_not_finite() -> None:
    model, x, _ = masked()
    topology = lap_ext.trace(model, x)
    with torch.no_grad():
        topology.layers["d"].weight[0, 0] = float("nan")
    with pytest.raises(lap_ext.errors.LapValueError, match="finite"):
        group_worths(Network(Memory(topology)), LOOKAHEAD, topology.groups("channel"))


def test_experts_are_refused() -> None:
    entry = next(x for x in zoo.ENTRIES if "mixtral" in x.name)
    model, args, kwargs = entry.make()
    topology = lap_ext.trace(model, args or kwargs)
    with pytest.raises(lap_ext.errors.LapValueError, match="which tokens an expert sees"):
        group_worths(Network(Memory(topology)), LOOKAHEAD, topology.groups("expert"))


def test_other_criteria_are_refused() -> None:
    model, x, _ = masked()
    topology = lap_ext.trace(model, x)
    with pytest.raises(lap_ext.errors.LapValueError, match="no linear neighborhood"):
        group_worths(Network(Memory(topology)), criteria.Wanda(), topology.groups("channel"))


def test_a_model_without_groups() -> None:
    net = network(nn.Sequential(linear()).double(), EYE[:1])
    assert group_worths(net, LOOKAHEAD, net.topology.groups("channel")).shape == (0,)
