# SPDX-License-Identifier: MIT
"""Wanda, lookahead with activity, weight times gradient: against what hooks and autograd see."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext import criteria
from lap_ext.criteria.statistics.activations import active_fractions, mean_squares
from tests.helpers import paper_formulas as cases

DATA_CRITERIA = ("wanda", "lookahead_act", "weight_gradient")


def traced(net: nn.Module, *shape: int) -> lap_ext.Topology:
    return lap_ext.trace(net, torch.randn(1, *shape))


def squares(topology: lap_ext.Topology, data: Any) -> dict[str, Tensor]:
    found = mean_squares(topology, data)
    return {role.layer: x for role, x in zip(topology.roles, found, strict=True)}


def active(topology: lap_ext.Topology, data: Any) -> dict[str, Tensor | None]:
    found = active_fractions(topology, data)
    return {role.layer: x for role, x in zip(topology.roles, found, strict=True)}


class TestWanda:
    """|w| * sqrt(mean of x_i^2)."""

    def test_by_hand(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        net[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 1.0]])
        net[2].weight.data = torch.tensor([[2.0, -1.0]])
        data = [torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, 1.0]])]
        # inputs: sqrt((9 + 1 + 1) / 3), sqrt((0 + 4 + 1) / 3)
        # hidden: relu of (3, 9), (-3, 5), (-1, 4): sqrt((9 + 0 + 0) / 3), sqrt((81 + 25 + 16) / 3)
        found = lap_ext.scores(net, torch.ones(1, 2), criterion="wanda", data=data)
        a, b, c, d = ((n / 3) ** 0.5 for n in (11, 5, 9, 122))
        expected = torch.tensor([[1 * a, 2 * b], [3 * a, 1 * b]])
        torch.testing.assert_close(found["0"], expected)
        torch.testing.assert_close(found["2"], torch.tensor([[2 * c, 1 * d]]))

    def test_batches_of_any_size_are_one_mean(self) -> None:
        net = cases.conv_net()
        data = cases.pictures(3, 1, 5, 3)
        found = squares(traced(net, 2, 4, 4), data)
        for layer, x in cases.inputs_of(net, data, *cases.CONV_LAYERS).items():
            rest = [dim for dim in range(x.dim()) if dim != 1]
            torch.testing.assert_close(found[layer], x.square().mean(rest), rtol=1e-6, atol=0)
            assert found[layer].dtype == torch.float64

    def test_a_row_keeps_as_many_as_another(self) -> None:
        net, data = cases.mlp(), cases.rows(6)
        score = lap_ext.scores(net, torch.ones(1, 5), criterion="wanda", data=data)
        masks = lap_ext.prune(
            net, torch.ones(1, 5), 0.6, criterion="wanda", data=data, apply=False
        ).masks
        for name, mask in masks.items():
            kept = mask.sum(1)
            assert int(kept.max() - kept.min()) <= 1
            assert int(mask.sum()) == int(0.4 * mask.numel() + 0.5)
            for row, own, count in zip(mask, score[name], kept, strict=True):
                assert float(own[row].min()) >= float(own[~row].max()), (name, count)
        together = criteria.Wanda(per_row=False)
        masks = lap_ext.prune(
            net, torch.ones(1, 5), 0.6, criterion=together, data=data, apply=False
        ).masks
        for name, mask in masks.items():
            expected = lap_ext.topk_mask(score[name], keep=int(mask.sum()))
            assert torch.equal(mask, expected)

    @pytest.mark.parametrize("normalize", ["none", "norm", "lamp"])
    def test_one_ranking_has_no_rows(self, normalize: Any) -> None:
        """With scope="global", all weights are ranked together, whatever per_row is."""
        given: dict[str, Any] = {"criterion": "wanda", "data": cases.rows(6)}
        net, x = cases.mlp(), torch.ones(1, 5)
        score = lap_ext.scores(net, x, normalize=normalize, **given)
        found = lap_ext.prune(
            net, x, 0.5, scope="global", normalize=normalize, min_keep=0, apply=False, **given
        ).masks
        keep = sum(int(mask.sum()) for mask in found.values())
        want = lap_ext.topk_mask(list(score.values()), keep=keep)
        assert all(map(torch.equal, found.values(), want))

    def test_rows_of_tiny_scores(self) -> None:
        """Rows are ranked by the scores that `scores` returns: those that underflow are equal."""
        net = nn.Sequential(nn.Linear(4, 2, bias=False))
        net[0].weight.data = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]) * 1e-23
        data = [torch.full((1, 4), 1e-23)]
        found = lap_ext.prune(net, data[0], 0.5, criterion="wanda", data=data).masks["0"]
        assert found.tolist() == [[True, True, False, False]] * 2

    def test_an_embedding_reads_one_hot_rows(self) -> None:
        """The mean square of a token is how often it occurs."""
        net = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
        data = [torch.tensor([[0, 1, 1]]), torch.tensor([[1, 3], [0, 1]])]
        found = squares(lap_ext.trace(net, torch.tensor([[0]])), data)
        assert found["0"].tolist() == [2 / 7, 4 / 7, 0, 1 / 7]

    def test_groups_and_transposes(self) -> None:
        net = nn.Sequential(
            *(nn.Conv1d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv1d(4, 4, 1, groups=4)),
            *(nn.ReLU(), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(30, 2)),
        )
        data = [torch.randn(n, 4, 6) for n in (2, 3)]
        names = ("0", "2", "4")
        topology = traced(net, 4, 6)
        score = lap_ext.scores(net, topology=topology, criterion="wanda", data=data)
        for layer, x in cases.inputs_of(net, data, *names).items():
            root = x.square().mean((0, 2)).sqrt()
            weight = net.get_parameter(f"{layer}.weight").double().abs()
            expected = torch.zeros_like(weight)
            groups = net.get_submodule(layer).groups
            for row, column in torch.cartesian_prod(*map(torch.arange, weight.shape[:2])).tolist():
                channel = row if layer == "4" else row // (4 // groups) * weight.shape[1] + column
                expected[row, column] = weight[row, column] * root[channel]
            torch.testing.assert_close(score[layer].double(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_recurrent(self, kind: type[nn.RNNBase]) -> None:
        """Two layers, both directions, against the states of cells run by hand."""
        net = nn.Sequential(kind(3, 4, num_layers=2, bidirectional=True, batch_first=True))
        x = torch.randn(2, 5, 3)
        found = squares(lap_ext.trace(net, x), [x])
        given = x.double()
        net.double()
        for layer in range(2):
            sides = []
            for side in ("", "_reverse"):
                one = kind(given.shape[2], 4, batch_first=True).double()
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    value = getattr(net[0], f"{name}_l{layer}{side}")
                    setattr(one, f"{name}_l0", nn.Parameter(value))
                seen = given.flip(1) if side else given
                out = one(seen)[0]
                before = torch.cat([torch.zeros(2, 1, 4), out[:, :-1]], 1)
                for name, read in (("ih", seen), ("hh", before)):
                    expected = read.square().mean((0, 1)).detach()
                    got = found[f"0.weight_{name}_l{layer}{side}"]
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
                sides.append(out.flip(1) if side else out)
            given = torch.cat(sides, 2)

    def test_experts_read_their_own_rows(self) -> None:
        """Weights that data picks: each expert's mean is over the rows that it was given."""

        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(3, 4, 5))

            def forward(self, x: Tensor, expert: Tensor) -> Tensor:
                return torch.bmm(x.unsqueeze(1), self.weight[expert]).squeeze(1)

        x, expert = torch.randn(7, 4), torch.tensor([0, 2, 0, 0, 2, 0, 2])
        topology = lap_ext.trace(Experts(), (x, expert))
        found = squares(topology, [(x, expert)])["weight"].reshape(3, 4)
        for e in (0, 2):
            expected = x[expert == e].double().square().mean(0)
            torch.testing.assert_close(found[e], expected, rtol=1e-6, atol=0)
        assert found[1].tolist() == [0] * 4


class TestLookaheadAct:
    """Lookahead with rows times sqrt(p)."""

    def test_by_hand(self) -> None:
        net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        net[0].weight.data = torch.tensor([[2.0], [-3.0]])
        net[2].weight.data = torch.tensor([[5.0, 7.0]])
        data = [torch.tensor([[1.0], [2.0], [3.0], [-1.0]])]  # unit 0: 3 of 4, unit 1: 1 of 4
        found = lap_ext.scores(net, torch.ones(1, 1), criterion="lookahead_act", data=data)
        p, q = 0.75**0.5, 0.25**0.5
        torch.testing.assert_close(found["0"], torch.tensor([[2 * 5 * p], [3 * 7 * q]]))
        torch.testing.assert_close(found["2"], torch.tensor([[5 * 2 * p, 7 * 3 * q]]))

    def test_a_chain(self) -> None:
        net = cases.conv_net()
        data = cases.pictures(4, 3)
        found = lap_ext.scores(net, torch.ones(1, 2, 4, 4), criterion="lookahead_act", data=data)
        chain = cases.conv_chain(net)
        units = cases.outputs_of(net, data, "2", "5", "9")  # behind the activation functions
        for place, x in enumerate(units.values()):
            rest = [dim for dim in range(x.dim()) if dim != 1]
            chain[place] = chain[place]._replace(active=(x > 0).double().mean(rest))
        for place, layer in enumerate(cases.CONV_LAYERS):
            expected = cases.lookahead(chain, place)
            torch.testing.assert_close(found[layer].double(), expected, rtol=1e-6, atol=0)

    def test_a_unit_that_is_never_active_is_worth_nothing(self) -> None:
        net = cases.mlp()
        net[0].bias.data[2] = -1e6
        found = lap_ext.scores(net, torch.ones(1, 5), criterion="lookahead_act", data=cases.rows(4))
        assert not found["0"][2].any()
        assert not found["2"][:, 2].any()
        assert found["0"][3].all()

    @pytest.mark.parametrize(
        ("between", "expected"),
        [
            (F.relu, True),
            (F.relu_, True),
            (lambda x: F.max_pool1d(F.dropout(x, training=False), 2).relu(), True),
            (lambda x: x.transpose(1, 2).flatten(1).relu(), True),
            (lambda x: F.gelu(x * 2.0), True),
            (lambda x: F.relu(x) + x, False),  # used twice
            (lambda x: F.relu(x + x.mean()), False),
            (lambda x: F.relu(x.chunk(2, 1)[0]), False),
            (lambda x: x * 2, False),
        ],
    )
    def test_what_follows(self, between: Callable[[Tensor], Tensor], expected: bool) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(2, 4, 1)
                x = torch.randn(1, 2, 6)
                self.outlet = nn.Linear(between(self.conv(x)).flatten(1).shape[1], 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.outlet(between(self.conv(x)).flatten(1))

        net = Net()
        data = [torch.randn(3, 2, 6), torch.randn(2, 2, 6)]
        found = active(traced(net, 2, 6), data)["conv"]
        assert (found is not None) == expected
        if found is None:
            return
        with torch.no_grad():
            values = between(net.conv(torch.cat(data)))
            pooled = values if values.dim() == 3 else values.reshape(5, 6, 4).transpose(1, 2)
        torch.testing.assert_close(found, (pooled > 0).double().mean((0, 2)))

    def test_positions_count_one_by_one(self) -> None:
        """Not by the sum of roots: p is the mean over the image."""
        net = nn.Sequential(
            nn.Conv1d(1, 1, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1)
        )
        net[0].weight.data.fill_(1.0)
        data = [torch.tensor([[[1.0, 1, 1, -1]], [[1.0, -1, -1, -1]]])]
        found = active(traced(net, 1, 4), data)
        assert found["0"] is not None
        assert found["0"].tolist() == [4 / 8]
        assert found["3"] is None


class TestWeightGradient:
    """|w * dL/dw|."""

    def test_by_hand(self) -> None:
        net = nn.Sequential(nn.Linear(2, 1, bias=False))
        net[0].weight.data = torch.tensor([[2.0, -3.0]])
        data = [torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, -6.0]])]
        # L = sum of w x: dL/dw = x, added up with their signs: 1 + 3, 4 - 6
        criterion = criteria.WeightGradient(loss=lambda model, x: model(x).sum())
        found = lap_ext.scores(net, torch.ones(1, 2), criterion=criterion, data=data)
        assert found["0"].tolist() == [[2 * 4.0, 3 * 2.0]]

    def test_cross_entropy(self) -> None:
        net = cases.conv_net()
        net.train()
        data = cases.pictures(3, 5)
        found = lap_ext.scores(net, torch.ones(1, 2, 4, 4), criterion="weight_gradient", data=data)
        net.eval()
        sum(F.cross_entropy(net(x), y) for x, y in data).backward()  # type: ignore[union-attr]
        for layer in cases.CONV_LAYERS:
            weight = net.get_parameter(f"{layer}.weight")
            assert weight.grad is not None
            torch.testing.assert_close(found[layer], (weight * weight.grad).abs().detach())

    def test_a_weight_that_the_loss_does_not_see(self) -> None:
        net = cases.mlp()
        criterion = criteria.WeightGradient(loss=lambda model, x: model[0](x).sum())
        found = lap_ext.scores(net, torch.ones(1, 5), criterion=criterion, data=[torch.ones(2, 5)])
        assert not found["4"].any()
        assert found["0"].all()

    def test_tied(self) -> None:
        """The gradient of a weight is that of all its uses, once."""

        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(3, 3))

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(F.linear(x, self.weight), self.weight.t())

        net, x = Tied(), torch.randn(2, 3)
        criterion = criteria.WeightGradient(loss=lambda model, x: model(x).square().sum())
        found = lap_ext.scores(net, x, criterion=criterion, data=[x])["weight"]
        (gradient,) = torch.autograd.grad(net(x).square().sum(), net.weight)
        torch.testing.assert_close(found, (net.weight * gradient).abs().detach())

    def test_frozen_weights(self) -> None:
        net, x, data = cases.mlp(), torch.ones(1, 5), cases.rows(3)
        net[2].weight.requires_grad_(False)
        with pytest.raises(ValueError, match=r"layer '2': .* frozen one. .* exclude=\['2'\]"):
            lap_ext.scores(net, x, criterion="weight_gradient", data=data)
        found = lap_ext.scores(net, x, criterion="weight_gradient", data=data, exclude=["2"])
        assert list(found) == ["0", "4"]
        assert not net[2].weight.requires_grad

    def test_no_graph_is_left(self) -> None:
        net, outputs = cases.mlp(), []

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            y = model(x)
            outputs.append(weakref.ref(y))
            return y.square().mean()

        data = [torch.ones(2, 5), torch.ones(3, 5)]
        found = lap_ext.scores(
            net, torch.ones(1, 5), criterion=criteria.WeightGradient(loss), data=data
        )
        assert [y() for y in outputs] == [None, None]
        assert not any(score.requires_grad for score in found.values())
        assert all(p.grad is None for p in net.parameters())

    def test_inside_no_grad(self) -> None:
        net, x, data = cases.mlp(), torch.ones(1, 5), cases.rows(3)
        expected = lap_ext.scores(net, x, criterion="weight_gradient", data=data)
        with torch.no_grad():
            found = lap_ext.scores(net, x, criterion="weight_gradient", data=data)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize(
        ("loss", "data", "error", "text"),
        [
            (None, [torch.ones(1, 5)], TypeError, r"\(inputs, target\), got Tensor"),
            (lambda model, x: model(x), [torch.ones(2, 5)], ValueError, r"scalar .* got \[2, 3\]"),
            (lambda model, x: 1.0, [torch.ones(2, 5)], ValueError, "scalar tensor, got float"),
            (lambda model, x: x.sum(), [torch.ones(2, 5)], ValueError, "loss with a gradient"),
            (
                lambda model, x: model(x).sum() * float("inf"),
                [torch.ones(2, 5)],
                ValueError,
                "layer '0': expected finite gradients, got inf or NaN",
            ),
        ],
    )
    def test_errors(self, loss: Any, data: Any, error: type[Exception], text: str) -> None:
        criterion = criteria.WeightGradient(loss)
        with pytest.raises(error, match=text):
            lap_ext.prune(cases.mlp(), torch.ones(1, 5), 0.5, criterion=criterion, data=data)


class TestData:
    """What a batch may be."""

    @pytest.mark.parametrize("name", DATA_CRITERIA)
    @pytest.mark.parametrize(
        ("data", "error", "text"),
        [
            (None, ValueError, "expected data for criterion '{name}'"),
            ([], ValueError, "one batch or more, got none"),
            (torch.ones(2, 5), TypeError, r"iterable of batches, got Tensor. Pass \[batch\]"),
            ({"x": torch.ones(2, 5)}, TypeError, "iterable of batches, got dict"),
        ],
    )
    def test_errors(self, name: str, data: Any, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text.format(name=name)):
            lap_ext.prune(cases.mlp(), torch.ones(1, 5), 0.5, criterion=name, data=data)

    def test_a_batch_is_a_tensor_a_tuple_or_a_dict(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return torch.cat([self.a(x), self.b(y)], 1)

        x, y = torch.randn(4, 2), torch.randn(4, 2)
        topology = lap_ext.trace(Net(), (x, y))
        one = squares(topology, [(x, y)])
        torch.testing.assert_close(one["b"], y.double().square().mean(0))
        for batch in ([x, y], {"y": y, "x": x}, (x, y, torch.zeros(4))):  # the last one: a target
            other = squares(topology, [batch])
            assert all(torch.equal(other[name], one[name]) for name in one)
        with pytest.raises(TypeError, match=r"a batch to be a tensor, .* got int"):
            squares(topology, [3])

    def test_a_generator_is_read_once(self) -> None:
        net, data = cases.mlp(), cases.rows(3, 2)
        expected = lap_ext.scores(net, torch.ones(1, 5), criterion="wanda", data=data)
        found = lap_ext.scores(net, torch.ones(1, 5), criterion="wanda", data=iter(data))
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_not_finite(self) -> None:
        data = [torch.full((2, 5), float("inf"))]
        with pytest.raises(ValueError, match="inf or NaN in the input of layer '0'"):
            lap_ext.prune(cases.mlp(), torch.ones(1, 5), 0.5, criterion="wanda", data=data)

    def test_batches_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"^expected batches of data that the model"):
            squares(traced(cases.mlp(), 5), [torch.ones(2, 6)])

    def test_another_way_through_the_model(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x) if len(x) == 1 else self.b(x)

        with pytest.raises(ValueError, match=r"the same path .* operation linear of layer 'a'"):
            squares(traced(Net(), 2), [torch.ones(2, 2)])
