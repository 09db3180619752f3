# SPDX-License-Identifier: MIT
"""Units of traced models against the definition: the network is run without them, in float64.

    worth^2 = || next @ (M - M without the unit) @ prev ||_F^2

The models are linear between their layers, with one position of every window, so that the operator
of a layer is its weight.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext import criteria
from lap_ext.criteria import exact
from lap_ext.criteria.context import Network
from lap_ext.ops.factors import Factor
from lap_ext.places.memory import Memory
from lap_ext.structures import Block, Column, Grid, Matrix, Partition, Row
from lap_ext.topology import Layer
from tests import zoo
from tests.helpers import network_oracle
from tests.helpers.cut_place import Cut
from tests.helpers.linear_nets import CASES, runs
from tests.helpers.networks import Net, linear, randomized

STRUCTURES = [Row(), Column(), Block(2, 3)]


def network(model: nn.Module, shape: tuple[int, ...], **how: object) -> Network:
    topology = lap_ext.trace(model, torch.randn(shape, dtype=torch.float64))
    return Network(Memory(topology), **how)  # type: ignore[arg-type]


def grid_of(layer: Layer, structure: Partition) -> Grid:
    part = layer.roles[0].part
    return structure.grid(Matrix(part.shape, part.groups, part.transposed))


def numbers_of(grid: Grid) -> Tensor:
    """The number of each weight's block, in the weight's shape, counted here."""
    matrix, (rows, cols) = grid.matrix, grid.block
    row = torch.arange(matrix.rows)
    down = row // matrix.height * -(-matrix.height // rows) + row % matrix.height // rows
    across = torch.arange(matrix.cols) // cols
    numbers = down[:, None] * grid.shape[1] + across
    return numbers.reshape(*numbers.shape, *[1] * (len(matrix.shape) - 2)).expand(matrix.shape)


def defined(
    calls: list[network_oracle.Run], name: str, numbers: Tensor, before: bool, after: bool
) -> Tensor:
    """The worth of every unit by running the layer without it."""
    result = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64)
    for run in calls:
        for call in (call for call in run.calls if call.name == name):
            full, prev, following = call.operator(), run.prev(call), run.next(call)
            for number in range(len(result)):
                weight = call.weight * (numbers.reshape(call.weight.shape) != number)
                change = full - call.operator(weight)
                change = change @ prev if before else change
                change = following @ change if after else change
                result[number] += change.square().sum() / len(calls)
    return result.sqrt()


@pytest.mark.parametrize("name", CASES)
def test_units_against_the_network_without_them(name: str) -> None:
    torch.manual_seed(3)
    case = CASES[name]
    model = randomized(case.build())
    net, oracle = network(model, case.shape), runs(model, case)
    for layer in net.topology.layers.values():
        for structure in STRUCTURES:
            grid = grid_of(layer, structure)
            got = exact.worths(net, criteria.Lookahead(), layer, layer.weight, grid)
            expected = defined(oracle, layer.name, numbers_of(grid), True, True)
            torch.testing.assert_close(got.flatten(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_groups_against_the_network_without_them(name: str) -> None:
    torch.manual_seed(4)
    case = CASES[name]
    model = randomized(case.build())
    net, oracle = network(model, case.shape), runs(model, case)
    for layer in net.topology.layers.values():
        numbers = torch.randint(4, layer.shape)
        got = exact.worths(net, criteria.Lookahead(), layer, layer.weight, numbers.flatten())
        expected = defined(oracle, layer.name, numbers, True, True)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("criterion", "before", "after"),
    [(criteria.Lookback(), True, False), (criteria.Lookforward(), False, True)],
)
@pytest.mark.parametrize("name", ["residual", "grouped", "packed"])
def test_one_side(name: str, criterion: criteria.Criterion, before: bool, after: bool) -> None:
    torch.manual_seed(5)
    case = CASES[name]
    model = randomized(case.build())
    net, oracle = network(model, case.shape), runs(model, case)
    for layer in net.topology.layers.values():
        grid = grid_of(layer, Block(2, 2))
        got = exact.worths(net, criterion, layer, layer.weight, grid)
        expected = defined(oracle, layer.name, numbers_of(grid), before, after)
        torch.testing.assert_close(got.flatten(), expected, rtol=1e-9, atol=1e-12)


def test_a_tied_weight() -> None:
    """An embedding, whose rows are inputs, and a head, whose rows are outputs."""
    torch.manual_seed(5)
    model = Net(lambda m, x: F.linear(m.a(m.e(x)), m.e.weight), e=nn.Embedding(7, 4), a=linear())
    tokens = torch.tensor([[3]])
    topology = lap_ext.trace(randomized(model), tokens)
    oracle = [network_oracle.cut(model, (tokens,), "one", "last", lambda y: y)]
    layer = topology.layers["e"]
    assert [role.part.transposed for role in layer.roles] == [True, False]
    for units in (Grid.of(Matrix((7, 4)), 2, 3), Grid.of(Matrix((7, 4), 1, True), 1, 4)):
        net = Network(Memory(topology))
        got = exact.worths(net, criteria.Lookahead(), layer, layer.weight, units)
        expected = defined(oracle, "e", numbers_of(units), True, True)
        torch.testing.assert_close(got.flatten(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_magnitude_is_energy(name: str) -> None:
    """Once for a weight, however often it is used."""
    net = network(randomized(CASES[name].build()), CASES[name].shape)
    for layer in net.topology.layers.values():
        grid = grid_of(layer, Block(2, 3))
        got = exact.worths(net, criteria.Criterion(), layer, layer.weight, grid)
        numbers = numbers_of(grid).flatten()
        squares = layer.weight.detach().flatten().square()
        expected = torch.zeros(grid.count).double().index_add_(0, numbers, squares).sqrt()
        torch.testing.assert_close(got.flatten(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_units_of_one_weight_have_its_score(name: str) -> None:
    case = CASES[name]
    model = randomized(case.build())
    net = network(model, case.shape)
    scores = lap_ext.scores(model, None, topology=net.topology, layers="*")
    for layer in net.topology.layers.values():
        grid = grid_of(layer, Block(1, 1))
        got = exact.worths(net, criteria.Lookahead(), layer, layer.weight, grid)
        torch.testing.assert_close(got.flatten(), scores[layer.name].flatten(), rtol=1e-12, atol=0)


# ---- the squared norms are the diagonals ---------------------------------------------------------
def diagonals_are_norms(net: Network) -> None:
    for role in net.topology.roles:
        sides = exact.neighborhood(net, criteria.Lookahead(), role)
        for factors, norm in zip(sides, net.norms(role), strict=True):
            diagonal = torch.zeros_like(norm)
            for factor in factors or ():
                diagonal += factor.gram().diagonal()
            diagonal = torch.ones_like(norm) if factors is None else diagonal
            torch.testing.assert_close(diagonal.sqrt(), norm, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("batch_norm", ["edge", "fold", "ignore"])
@pytest.mark.parametrize("name", CASES)
def test_the_diagonals_are_the_norms(name: str, batch_norm: str) -> None:
    model = randomized(CASES[name].build())
    diagonals_are_norms(network(model, CASES[name].shape, batch_norm=batch_norm))


def test_channels_of_constants_count_one() -> None:
    """As in the norms; and all of them where nothing else feeds a layer."""
    two = torch.ones(1, 2, dtype=torch.float64)
    rule = lambda m, x: m.c(torch.cat([m.a(x), two], 1)) + m.b(two)  # noqa: E731
    model = Net(rule, a=linear(), b=linear(3, 2), c=linear(3, 6)).double()
    net = network(model, (1, 4))
    diagonals_are_norms(net)
    diagonals_are_norms(network(model, (1, 4), chain=["a", "c", "b"]))  # 0 where no edge leads
    for name, ones in (("c", 2), ("b", 2)):
        (role,) = net.topology.layers[name].roles
        factors, _ = exact.neighborhood(net, criteria.Lookahead(), role)
        assert gram(factors)[-ones:, -ones:].equal(torch.eye(2, dtype=torch.float64))


ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}


@pytest.mark.parametrize("name", ["lenet", "densenet", "decoder_gqa", "mixer"])
def test_the_diagonals_are_the_norms_in_the_zoo(name: str) -> None:
    model, args, kwargs = ENTRIES[name].make()
    diagonals_are_norms(Network(Memory(lap_ext.trace(model, args or kwargs)), "fold"))


# ---- signs, heads and positions ------------------------------------------------------------------
def gram(factors: list[Factor] | None) -> Tensor:
    assert factors
    return torch.stack([factor.gram() for factor in factors]).sum(0)


def test_paths_that_meet_keep_the_sign_of_their_sum() -> None:
    """y * 2 + y * -3: the norms have 4 + 9, the sign is that of 2 - 3."""
    model = Net(lambda m, x: m.b((y := m.a(x)) * m.s + y * m.t), a=linear(), b=linear())
    model.s = nn.Parameter(torch.tensor([2.0, -1.0, 3.0, -4.0], dtype=torch.float64))
    model.t = nn.Parameter(torch.tensor([-3.0, -2.0, 1.0, 4.0], dtype=torch.float64))
    net = network(model.double(), (1, 4))
    factor = torch.tensor([-13.0, -5.0, 10.0, 32.0], dtype=torch.float64)
    factor = factor.sign() * factor.abs().sqrt()
    for layer, side, matrix in (("b", 0, model.a.weight), ("a", 1, model.b.weight.T)):
        (role,) = net.topology.layers[layer].roles
        got = gram(exact.neighborhood(net, criteria.Lookahead(), role)[side])
        rows = matrix.detach() * factor[:, None]
        torch.testing.assert_close(got, rows @ rows.T)


def test_signs_along_a_path_multiply() -> None:
    model = Net(lambda m, x: m.b(m.a(x) * m.s * m.t), a=linear(), b=linear())
    model.s = nn.Parameter(torch.tensor([2.0, -1.0, 3.0, -4.0], dtype=torch.float64))
    model.t = nn.Parameter(torch.tensor([-3.0, -2.0, 1.0, 4.0], dtype=torch.float64))
    net = network(model.double(), (1, 4))
    rows = model.a.weight.detach() * (model.s * model.t).detach()[:, None]
    got = gram(exact.neighborhood(net, criteria.Lookahead(), net.topology.roles[1])[0])
    torch.testing.assert_close(got, rows @ rows.T)


def test_heads_of_a_group_are_read_one_by_one() -> None:
    """Two heads of v, each read by two of o: its first by the first of the other, and so on."""
    model, args, kwargs = ENTRIES["decoder_gqa"].make()
    topology = lap_ext.trace(model, args or kwargs)
    net = Network(Memory(topology))
    v, o = (next(x for n, x in topology.layers.items() if n.endswith(end)) for end in ("v", "o"))
    (edge,) = [edge for edge in v.next if edge.name == o.name]
    times = edge.here.numel() // v.shape[0]
    assert times > 1
    width = v.shape[0] // 2
    got = gram(exact.neighborhood(net, criteria.Lookahead(), v.roles[0])[1])
    blocks = o.weight.detach().double().reshape(o.shape[0], 2, times, width)
    expected = sum((x := blocks[:, :, k].reshape(o.shape[0], -1)).T @ x for k in range(times))
    torch.testing.assert_close(got, expected)


# ---- what a network says -------------------------------------------------------------------------
def test_masks_of_neighbors_count() -> None:
    torch.manual_seed(6)
    model = randomized(CASES["residual"].build())
    topology = lap_ext.trace(model, torch.randn(1, 4, dtype=torch.float64))
    masks = {name: torch.rand(x.shape) < 0.5 for name, x in topology.layers.items() if name != "c"}
    layer = topology.layers["c"]
    units = grid_of(layer, Block(2, 2))
    own = torch.rand(layer.shape) < 0.7
    options = criteria.Lookahead(), layer, layer.weight.detach(), units
    got = exact.worths(Network(Memory(topology, masks)), *options, own)
    with torch.no_grad():
        for name, mask in {**masks, "c": own}.items():
            topology.layers[name].weight.mul_(mask)
    torch.testing.assert_close(got, exact.worths(Network(Memory(topology)), *options))


def test_named_neighbors() -> None:
    torch.manual_seed(7)
    model = randomized(nn.Sequential(linear(5), linear(6, 5), linear(3, 6)))
    prev = lap_ext.Neighbor(torch.randn(5, 2).double(), scale=torch.randn(5).double())
    x = torch.randn(1, 4, dtype=torch.float64)
    net = Network(Memory(lap_ext.trace(model, x, neighbors={"1": ([prev, "0"], "2")})))
    layer = net.topology.layers["1"]
    got = exact.worths(net, criteria.Lookahead(), layer, layer.weight, grid_of(layer, Block(2, 2)))
    w_prev, w, w_next = (part.weight.detach() for part in model)
    first = prev.weight * prev.scale[:, None]
    for row in range(3):
        for col in range(3):
            unit = torch.zeros_like(w)
            unit[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = 1
            expected = (w_next @ (w * unit) @ torch.cat([first, w_prev], 1)).norm()
            torch.testing.assert_close(got[row, col], expected)


def test_neighbors_of_a_chain() -> None:
    """The layers before and after in the list, whatever the skip; ones where no edge leads."""
    torch.manual_seed(8)
    model = randomized(CASES["residual"].build())
    x = torch.randn(1, 4, dtype=torch.float64)
    net = Network(Memory(lap_ext.trace(model, x)), chain=["a", "b", "d", "c"])
    a, b, d = (getattr(model, name).weight.detach() for name in "abd")
    for name, prev, following in (
        ("a", torch.eye(4), b),
        ("b", a, torch.eye(5)),
        ("c", None, None),
    ):
        layer = net.topology.layers[name]
        w = layer.weight.detach()
        got = exact.worths(net, criteria.Lookahead(), layer, w, grid_of(layer, Block(64, 64)))
        product = w if prev is None else following.double() @ w @ prev.double()
        torch.testing.assert_close(got[0, 0], product.norm())
    layer = net.topology.layers["d"]
    got = exact.worths(net, criteria.Lookahead(), layer, layer.weight, grid_of(layer, Row()))
    torch.testing.assert_close(got[:, 0], d.norm(dim=1))
    diagonals_are_norms(net)


def test_layers_that_are_read_from_elsewhere() -> None:
    """Chunks of a place are overwritten when the next layer is read."""
    torch.manual_seed(9)
    model = randomized(CASES["residual"].build())
    topology = lap_ext.trace(model, torch.randn(1, 4, dtype=torch.float64))
    masks = {"b": torch.rand(5, 4) < 0.5}
    held, place = Memory(topology, masks), Cut(topology, fits=True, masks=masks)
    for layer in topology.layers.values():
        (chunk,) = place.chunks(layer, whole=True)
        options = criteria.Lookahead(), layer
        got = exact.worths(Network(place), *options, chunk.weight, grid_of(layer, Row()))
        expected = exact.worths(Network(held), *options, layer.weight, grid_of(layer, Row()))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---- errors --------------------------------------------------------------------------------------
def test_neighbors_must_fit() -> None:
    model = randomized(CASES["chain"].build())
    place = Cut(lap_ext.trace(model, torch.randn(1, 4, dtype=torch.float64)))
    layer = place.topology.layers["2"]
    units = grid_of(layer, Row())
    with pytest.raises(ValueError, match="room for all neighbors") as info:
        exact.worths(Network(place), criteria.Lookahead(), layer, layer.weight, units)
    assert "'2'" in str(info.value) and "in memory" in str(info.value)
    exact.worths(Network(place), criteria.Criterion(), layer, layer.weight, units)


@pytest.mark.parametrize("criterion", ["magnitude_bn", "random", "wanda", "obd_lookahead"])
def test_criteria_without_a_neighborhood(criterion: str) -> None:
    net = network(randomized(CASES["chain"].build()), (1, 4))
    layer = net.topology.layers["2"]
    with pytest.raises(ValueError, match=rf"define no linear neighborhood.*got '{criterion}'"):
        exact.worths(net, criteria.of(criterion), layer, layer.weight, grid_of(layer, Row()))


def test_a_criterion_derived_from_one_is_another() -> None:
    class Own(criteria.Lookahead):
        pass

    net = network(randomized(CASES["chain"].build()), (1, 4))
    with pytest.raises(ValueError, match="define no linear neighborhood"):
        exact.neighborhood(net, Own(), net.topology.roles[0])


def test_neighbors_must_be_finite() -> None:
    model = randomized(CASES["chain"].build())
    model[0].weight.data[1, 2] = torch.inf
    for check_finite in (True, False):
        net = network(model, (1, 4), check_finite=check_finite)
        layer = net.topology.layers["2"]
        options = criteria.Lookahead(), layer, layer.weight, grid_of(layer, Row())
        if check_finite:
            with pytest.raises(ValueError, match="finite weights in layer '0'"):
                exact.worths(net, *options)
        else:
            assert not exact.worths(net, *options).isfinite().all()


def test_squares_of_a_weight_may_leave_the_range() -> None:
    model = randomized(CASES["chain"].build())
    net = network(model, (1, 4))
    layer = net.topology.layers["2"]
    for power in (-600, 600):
        plain = exact.worths(net, criteria.Lookahead(), layer, layer.weight, grid_of(layer, Row()))
        large = layer.weight.detach() * 2.0**power
        got = exact.worths(net, criteria.Lookahead(), layer, large, grid_of(layer, Row()))
        assert torch.equal(got, plain * 2.0**power) and bool(plain.any())


def test_squares_must_be_numbers() -> None:
    model = randomized(CASES["chain"].build())
    model[0].weight.data.fill_(1e200)
    net = network(model, (1, 4))
    layer = net.topology.layers["2"]
    with pytest.raises(ValueError, match=r"within float64's range from layer '2'"):
        exact.worths(net, criteria.Lookahead(), layer, layer.weight, grid_of(layer, Row()))
