# SPDX-License-Identifier: MIT
"""Counts of thinner models: the same model built with fewer channels, run, and counted by PyTorch.

tests/topology/test_families.py counts every family of the zoo as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.nn.utils import parametrizations

import lap_ext
from lap_ext.topology import counting
from tests.helpers.flop_counts import counted
from tests.helpers.networks import Net
from tests.helpers.topologies import traced

Gone = dict[str, list[int]]  # layer -> output channels that are removed


def removed(topology: lap_ext.Topology, gone: Gone) -> Tensor:
    """Output channels of layers, and all that is computed from channels that are gone alone."""
    channels = topology.graph.channels
    result = torch.zeros(channels.size, dtype=torch.bool)
    for name, indices in gone.items():
        for role in topology.layers[name].roles:
            result[role.out.first + torch.tensor(indices, dtype=torch.int64)] = True
    zeros = [group.first for group in channels.groups if group.kind == "zero"]
    result[zeros] = True
    for group in channels.groups:
        for child in range(group.size if group.edges else 0):
            parents = [edges.parent[edges.child == child] for edges in group.edges]
            result[group.first + child] |= bool(result[torch.cat(parents)].all())
    result[zeros] = False
    return result


def compare(dense: nn.Module, thin: nn.Module, x: Any, gone: Gone) -> None:
    topology = lap_ext.trace(dense.eval(), x)
    ids = removed(topology, gone)
    args = x if isinstance(x, tuple) else (x,)
    assert counting.flops(topology, torch.zeros_like(ids)) == counted(dense, args)
    assert counting.params(topology, ids) == sum(p.numel() for p in thin.parameters())
    assert counting.flops(topology, ids) == counted(thin.eval(), args) > 0


# ---- layers --------------------------------------------------------------------------------------


def mlp(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, a), nn.BatchNorm1d(a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 2)
    )


def test_mlp() -> None:
    compare(mlp(8, 6), mlp(5, 4), torch.randn(3, 4), {"0": [0, 3, 7], "3": [1, 2]})


def test_a_layer_without_channels() -> None:
    """All of its rows are gone, and so is what reads them; biases of the next layer stay."""
    topology = lap_ext.trace(mlp(8, 6).eval(), torch.randn(3, 4))
    ids = removed(topology, {"0": list(range(8))})
    assert counting.params(topology, ids) == 6 + 6 * 2 + 2
    assert counting.flops(topology, ids) == 2 * 3 * 6 * 2


class Block(nn.Module):
    """A residual block with a projection, between a stem and a head."""

    def __init__(self, stream: int, inner: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, inner, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, stream, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stream)
        self.shortcut = nn.Conv2d(4, stream, 1, stride=2)
        self.head = nn.Linear(stream * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(y + self.shortcut(x)).flatten(1))


def test_residual_block() -> None:
    gone = {"conv1": [0, 5], "conv2": [1, 2, 6], "shortcut": [1, 2, 6]}
    compare(Block(7, 6), Block(4, 4), torch.randn(2, 3, 8, 8), gone)


def test_a_channel_of_a_sum_is_there_until_both_sides_are_gone() -> None:
    topology = lap_ext.trace(Block(7, 6).eval(), torch.randn(2, 3, 8, 8))
    before, after = (removed(topology, {"conv2": list(range(n))}) for n in (0, 2))
    rows = 2 * (6 * 9 + 2)  # of conv2 and its norm; the columns of the head stay
    assert counting.params(topology, before) - counting.params(topology, after) == rows
    assert counting.flops(topology, before) - counting.flops(topology, after) == 2 * 108 * 2 * 16


def grouped(a: int, b: int, kind: type[nn.Module] = nn.Conv2d) -> nn.Module:
    """Two groups, then one channel each."""
    return nn.Sequential(
        nn.Conv2d(3, a, 1), kind(a, b, 3, stride=2, groups=2), nn.ReLU(),
        kind(b, b, 3, groups=b), nn.Conv2d(b, 2, 1),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_grouped(kind: type[nn.Module]) -> None:
    """One channel of each group goes, of its inputs and of its outputs."""
    gone = {"0": [1, 5], "1": [0, 2, 4, 7], "3": [0, 2, 4, 7]}
    compare(grouped(6, 8, kind), grouped(4, 4, kind), torch.randn(2, 3, 9, 9), gone)


def test_groups_that_are_no_longer_equal() -> None:
    """No module is like this: the rows and columns of each group, by hand."""
    topology = lap_ext.trace(grouped(6, 8).eval(), torch.randn(1, 3, 9, 9))
    ids = removed(topology, {"0": [0, 1], "1": [0, 1, 2]})  # of the first group of both
    nothing = torch.zeros_like(ids)
    less = counting.flops(topology, nothing) - counting.flops(topology, ids)
    # rows of 0 at 81 positions; of 1: 24 - 13 pairs at 16; columns of depthwise 3 stay with rows
    assert less == 2 * (2 * 3 * 81 + (24 - (1 * 1 + 4 * 3)) * 9 * 16 + 3 * 9 * 4)


class Blurred(nn.Module):
    """A fixed filter for each channel between two convolutions."""

    kernel: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, width, 3), nn.Conv1d(width, 2, 3)
        self.register_buffer("kernel", torch.ones(width, 1, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(self.a(x), self.kernel, stride=2, groups=len(self.kernel))
        return self.b(x)


def test_fixed_filter() -> None:
    compare(Blurred(5), Blurred(3), torch.randn(2, 2, 17), {"a": [0, 4]})


class Projected(nn.Module):
    """A fixed matrix over channels: as many columns, whatever it reads."""

    matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, width), nn.Linear(4, 3)
        self.register_buffer("matrix", torch.randn(4, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(self.a(x), self.matrix))


def test_fixed_matrix() -> None:
    compare(Projected(6), Projected(4), torch.randn(3, 5, 2), {"a": [2, 3]})


# ---- recurrent layers ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: Any, width: int) -> None:
        super().__init__()
        self.inlet, self.rnn = nn.Linear(3, 4), kind(4, width, batch_first=True)
        self.fc = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.inlet(x))[0])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent(kind: Any, gates: int) -> None:
    rows = [gate * 5 + unit for gate in range(gates) for unit in (1, 4)]
    gone = {"rnn.weight_ih_l0": rows, "rnn.weight_hh_l0": rows}
    compare(Recurrent(kind, 5), Recurrent(kind, 3), torch.randn(2, 6, 3), gone)


class Step(nn.Module):
    """Three steps of a cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.fc, self.width = nn.GRUCell(3, width), nn.Linear(width, 2), width

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(2, self.width)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.fc(h)


def test_cell() -> None:
    """Its weights have a role for each step."""
    rows = [gate * 5 + unit for gate in range(3) for unit in (0, 2)]
    gone = {"cell.weight_ih": rows, "cell.weight_hh": rows}
    compare(Step(5), Step(3), torch.randn(2, 3, 3), gone)


# ---- products of activations ---------------------------------------------------------------------


class Attention(nn.Module):
    """Heads of 4 channels; groups of heads share keys and values."""

    def __init__(self, heads: int, kv_heads: int, how: str, width: int = 4) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, heads * width), nn.Linear(6, kv_heads * width)
        self.v, self.o = nn.Linear(6, kv_heads * width), nn.Linear(heads * width, 6)
        self.heads, self.kv_heads, self.how = heads, kv_heads, how

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(n, length, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(n, length, self.kv_heads, -1).transpose(1, 2)
        if self.how == "native":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, 1) for z in (k, v))
            if self.how == "fused":
                y = F.scaled_dot_product_attention(q, k, v)
            elif self.how == "einsum":
                a = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
                y = torch.einsum("bhij,bhjd->bhid", a, v)
            else:
                y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, length, -1))


HOW = ["native", "fused", "einsum", "written"]


@pytest.mark.parametrize("how", HOW)
def test_fewer_heads(how: str) -> None:
    """Key head 1 goes, with the queries 2 and 3 that read it."""
    gone = {"q": list(range(8, 16)), "k": [4, 5, 6, 7], "v": [4, 5, 6, 7]}
    compare(Attention(6, 3, how), Attention(4, 2, how), torch.randn(2, 5, 6), gone)


@pytest.mark.parametrize("how", HOW)
def test_narrower_heads(how: str) -> None:
    """Channel 1 of each head of q and k, and of v."""
    every, shared = [1, 5, 9, 13], [1, 5]
    gone = {"q": every, "k": shared, "v": shared}
    compare(Attention(4, 2, how), Attention(4, 2, how, 3), torch.randn(2, 5, 6), gone)


class OverChannels(nn.Module):
    """Attention between channels: each of q meets each of k, at all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.q(x).transpose(1, 2) @ self.k(x)  # [N, width, width]
        return self.o(x) + logits.mean()


def test_every_channel_meets_every_channel() -> None:
    gone = {"q": [0, 1], "k": [2, 3]}
    compare(OverChannels(5), OverChannels(3), torch.randn(2, 7, 4), gone)


# ---- experts -------------------------------------------------------------------------------------


class Experts(nn.Module):
    """One expert for each token: all of them on all tokens, or its weights picked for each."""

    def __init__(self, experts: int, hidden: int, picked: bool) -> None:
        super().__init__()
        self.router = nn.Linear(4, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, 4))
        self.down = nn.Parameter(torch.randn(experts, 4, hidden))
        self.picked = picked

    def forward(self, x: Tensor) -> Tensor:
        chance = self.router(x).softmax(-1)
        if self.picked:
            best, index = chance.max(-1)
            y = F.relu(torch.bmm(self.up[index], x[:, :, None]))
            return torch.bmm(self.down[index], y)[:, :, 0] * best[:, None]
        y = F.relu(torch.einsum("tc,ehc->teh", x, self.up))
        y = torch.einsum("teh,eoh->teo", y, self.down)
        return (y * chance[..., None]).sum(1)


@pytest.mark.parametrize("picked", [False, True])
def test_fewer_experts(picked: bool) -> None:
    """Expert 1 of 3; where each token has its own, there is as much work as before."""
    gone = {"router": [1], "up": [5, 6, 7, 8, 9], "down": [4, 5, 6, 7]}
    dense, thin = Experts(3, 5, picked), Experts(2, 5, picked)
    compare(dense, thin, torch.randn(6, 4), gone)


@pytest.mark.parametrize("picked", [False, True])
def test_thinner_experts(picked: bool) -> None:
    gone = {"up": [0, 3, 6, 8, 10, 12]}  # two of each
    compare(Experts(3, 5, picked), Experts(3, 3, picked), torch.randn(6, 4), gone)


def test_experts_of_different_sizes() -> None:
    """6 tokens, each with one of 3 experts of 2, 5 and 5 units: 4 on average."""
    topology = lap_ext.trace(Experts(3, 5, True).eval(), torch.randn(6, 4))
    ids = removed(topology, {"up": [0, 1, 2]})
    assert counting.flops(topology, ids) == 2 * 6 * (3 * 4 + 4 * 4 + 4 * 4)


# ---- parameters ----------------------------------------------------------------------------------


def test_tied_weight_is_counted_once() -> None:
    """A column of it is a channel of the embedding and an input of the head."""
    topology = traced("nano_gpt")
    gone = removed(topology, {})
    dense = counting.params(topology, gone)
    embedding, *_, head = (r for r in topology.roles if r.parameter == "wte.weight")
    assert embedding.kind == "embedding" and embedding.positions == 0
    gone[embedding.out.ids[:3]] = True
    assert counting.params(topology, gone) == dense  # the head still reads these columns
    gone[head.inputs[1][head.inputs[0] < 3]] = True
    assert counting.params(topology, gone) < dense - 3 * 11 + 1


def test_shared_layer() -> None:
    """A row is gone with its channels in both uses, and a column too: the input's, here, stays."""
    shared = nn.Linear(4, 4, bias=False)
    model = Net(lambda m, x: m.b(m.a(F.relu(m.a(x)))), a=shared, b=nn.Linear(4, 2, bias=False))
    topology = lap_ext.trace(model, torch.randn(3, 4))
    first, second = (r.out.ids for r in topology.layers["a"].roles)
    gone = torch.zeros(topology.graph.channels.size, dtype=torch.bool)
    gone[second[:1]] = True
    assert counting.params(topology, gone) == 16 + 8 - 2
    assert counting.flops(topology, gone) == 2 * 3 * (16 + 16 + 6)
    gone[first[:1]] = True
    assert counting.params(topology, gone) == 12 + 8 - 2
    assert counting.flops(topology, gone) == 2 * 3 * (12 + 12 + 6)


def test_weight_that_is_seen_as_two_matrices_counts_in_full() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        whole = F.conv1d(x, m.a.weight, groups=2)
        return m.b(F.relu(whole) + F.conv1d(x[:, :2], m.a.weight))

    model = Net(forward, a=nn.Conv1d(4, 4, 3, groups=2, bias=False), b=nn.Conv1d(4, 2, 1))
    topology = lap_ext.trace(model, torch.randn(2, 4, 8))
    assert {role.part.groups for role in topology.layers["a"].roles} == {1, 2}
    assert counting.params(topology, removed(topology, {"a": [0, 1]})) == 4 * 2 * 3 + 2 * 2 + 2


def test_packed_weight_in_parts() -> None:
    """Rows 0 to 4 and 5 to 9 are two uses of one weight; both lose rows."""

    def forward(m: Any, x: Tensor) -> Tensor:
        gate, up = F.linear(x, m.a.weight[:5]), F.linear(x, m.a.weight[5:])
        return m.b(F.silu(gate) * up)

    model = Net(forward, a=nn.Linear(3, 10, bias=False), b=nn.Linear(5, 2, bias=False))
    topology = lap_ext.trace(model, torch.randn(4, 3))
    ids = removed(topology, {"a": [1, 4]})
    assert counting.params(topology, ids) == 6 * 3 + 3 * 2
    assert counting.flops(topology, ids) == 2 * 4 * (18 + 6)


def test_blocks_of_columns() -> None:
    """Columns 0 to 4 read one layer, columns 5 to 9 another."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.c.weight
        return F.linear(m.a(x), w[:, :5]) + F.linear(m.b(x), w[:, 5:])

    layers = {name: nn.Linear(3, 5, bias=False) for name in "ab"}
    model = Net(forward, c=nn.Linear(10, 2, bias=False), **layers)
    topology = lap_ext.trace(model, torch.randn(4, 3))
    ids = removed(topology, {"a": [0, 2], "b": [0]})
    assert counting.params(topology, ids) == 3 * 3 + 4 * 3 + 2 * 7
    assert counting.flops(topology, ids) == 2 * 4 * (9 + 12 + 14)


def test_part_of_a_grouped_weight_counts_in_full() -> None:
    """The first 4 of 6 rows, in two groups: rows 4 and 5 have no group."""
    model = Net(
        lambda m, x: m.b(F.conv1d(x, m.a.weight[:4], groups=2)),
        a=nn.Conv1d(4, 6, 3, groups=2, bias=False),
        b=nn.Conv1d(4, 2, 1, bias=False),
    )
    topology = lap_ext.trace(model, torch.randn(2, 4, 8))
    ids = removed(topology, {"a": [0, 2]})
    assert counting.params(topology, ids) == 6 * 2 * 3 + 2 * 2
    assert counting.flops(topology, ids) == 2 * 2 * 6 * (2 * 2 * 3 + 2 * 2)


@pytest.mark.parametrize(
    ("wrap", "left"),
    [
        (nn.utils.spectral_norm, 0),
        (nn.utils.weight_norm, 5),
        (parametrizations.weight_norm, 5),  # the lengths of rows: a parameter of its own, in full
        (parametrizations.spectral_norm, 0),
        (lambda layer: layer, 0),
    ],
)
def test_computed_weight(wrap: Callable[[nn.Module], nn.Module], left: int) -> None:
    """What a weight is computed from in its shape is as thin as the weight."""
    model = nn.Sequential(wrap(nn.Linear(3, 5)), nn.ReLU(), nn.Linear(5, 2))
    topology = lap_ext.trace(model.eval(), torch.randn(4, 3))
    nothing = removed(topology, {})
    assert counting.params(topology, nothing) == sum(p.numel() for p in model.parameters())
    ids = removed(topology, {"0": [1, 2]})
    assert counting.params(topology, ids) == left + 3 * 3 + 3 + 2 * 3 + 2


# ---- one after the other -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet_basic", "decoder_gqa", "moe_einsum", "nano_gpt", "picked"]
)
def test_counter(name: str) -> None:
    """In any order, and in steps of any size, it counts what is left from the start."""
    made = name == "picked"
    topology = lap_ext.trace(Experts(3, 5, True), torch.randn(6, 4)) if made else traced(name)
    counter, gone = counting.Counter(topology), removed(topology, {})
    order = torch.randperm(gone.numel())
    while order.numel():
        step, order = order.split([min(5, order.numel()), max(order.numel() - 5, 0)])
        gone[step] = True
        ahead = counter.params_without(step), counter.flops_without(step)
        counter.remove(torch.cat([step, step[:2]]))
        counter.remove(step)  # they are gone already
        assert ahead == (counter.params, counter.flops)
        if order.numel() % 7 == 0:
            assert counter.params == counting.params(topology, gone)
            assert counter.flops == counting.flops(topology, gone)
    left = counter.params, counter.flops
    counter.remove(torch.arange(gone.numel()))
    assert (counter.params, counter.flops) == left


def test_flops_that_the_data_decides() -> None:
    """Rows that a mask selects: how many is known in a run only; parameters are counted."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return x.index_add(0, *chosen(m, x))

    def chosen(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        (rows,) = torch.where(x[:, 0] > 0)
        return rows, m.b(F.relu(m.a(x[rows])))

    model = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 4))
    topology = lap_ext.trace(model, torch.randn(6, 4))
    counter = counting.Counter(topology)
    counter.remove(topology.layers["a"].roles[0].out.ids[:3])
    assert counter.params == 5 * 4 + 5 + 4 * 5 + 4
    said = (
        "expected a model whose FLOPs follow from the shapes of its inputs, got aten.linear.default"
    )
    with pytest.raises(lap_ext.LapError, match=re.escape(said)):
        _ = counter.flops
    with pytest.raises(lap_ext.LapError, match=re.escape(said)):
        counting.flops(topology, removed(topology, {}))
