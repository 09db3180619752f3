# SPDX-License-Identifier: MIT
"""Groups of small networks, worked out by hand: the exact rows, columns and entries of each.

A member is written as the parameter and what goes of it: "a 1 :" is row 1 of a.weight, "b : 1,4"
are its columns 1 and 4, "g 2,3 0" column 0 of rows 2 and 3 (of the second group of a grouped
convolution), "a.bias 1" an entry of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

import lap_ext
from lap_ext import structures
from lap_ext.topology.coupling import CoupledGroups
from tests.helpers.coupling_oracle import Thinned
from tests.helpers.networks import Net, bn, conv, linear, randomized

Entries = frozenset[tuple[str, int]]  # (parameter, flat index)
IMAGE, ROWS = torch.randn(1, 2, 4, 4).double(), torch.randn(1, 5, 3).double()
TOKENS = torch.arange(5)[None]


def index(text: str) -> Any:
    return slice(None) if text == ":" else [int(x) for x in text.split(",")]


def written(model: nn.Module, members: str) -> Entries:
    """The entries of a group that is written down."""
    result = set()
    for text in members.split(";"):
        name, rows, *cols = text.split()
        parameters = dict(model.named_parameters())
        name = name if name in parameters else f"{name}.weight"
        numbers = torch.arange(parameters[name].numel()).reshape(parameters[name].shape)
        chosen = numbers[index(rows)]
        chosen = chosen[:, index(cols[0])] if cols else chosen
        result |= {(name, i) for i in chosen.flatten().tolist()}
    return frozenset(result)


def entries(found: CoupledGroups, number: int) -> Entries:
    """The entries that a group's mask makes zero."""
    gone = torch.arange(len(found)) == number
    masks = found.masks(gone)
    return frozenset(
        (name, i) for name, m in masks.items() for i in (~m).flatten().nonzero().flatten().tolist()
    )


def grouped(model: nn.Module, x: Any, kind: Any = "channel") -> CoupledGroups:
    """The groups, whose members are also what their masks say, and right when it is run."""
    randomized(model)
    topology = lap_ext.trace(model, x)
    found = structures.groups(topology, kind)
    layers = {layer.parameter for layer in topology.layers.values()}
    others = {n for n, _ in model.named_parameters()} - layers
    network = Thinned(model, x if isinstance(x, tuple) else (x,), vectors=others)
    for group in found:
        assert network.faults(group.members) == []
    return found


def check(
    model: nn.Module,
    x: Any,
    groups: Iterable[str],
    fixed: str,
    kind: Any = "channel",
) -> CoupledGroups:
    """All groups and all that is fixed: "layer count reason" parted by semicolons."""
    found = grouped(model, x, kind)
    expected = [written(model, members) for members in groups]
    assert {entries(found, i) for i in range(len(found))} == set(expected)
    assert len(found) == len(expected)
    reasons = sorted(text.strip() for text in fixed.split(";") if text.strip())
    assert sorted(f"{x.layer} {x.channels} {x.reason}" for x in found.fixed) == reasons
    return found


OUT = "an output of the model"


def test_residual() -> None:
    """b and c make the channels that d reads and that b reads: one group with a's."""
    model = Net(
        lambda m, x: m.d((h := F.relu(m.a(x))) + m.c(F.relu(m.b(h)))),
        a=linear(4, 3),
        b=linear(5),
        c=linear(4, 5),
        d=linear(2),
    )
    own = [f"b {i} :; b.bias {i}; c : {i}" for i in range(5)]
    stream = [f"a {i} :; a.bias {i}; c {i} :; c.bias {i}; b : {i}; d : {i}" for i in range(4)]
    found = check(model, ROWS, own + stream, f"d 2 {OUT}")
    assert {x.layers for x in found.families} == {("a", "c"), ("b",)}


def test_concatenation_and_a_channel_read_twice() -> None:
    """c reads [a, b, a]: columns 0 to 3, 4 to 6 and 7 to 10."""
    model = Net(
        lambda m, x: m.c(torch.cat([h := m.a(x), m.b(x), h.tanh()], -1)),
        a=linear(4, 3),
        b=linear(3, 3),
        c=linear(2, 11),
    )
    groups = [f"a {i} :; a.bias {i}; c : {i},{i + 7}" for i in range(4)]
    check(
        model, ROWS, groups + [f"b {i} :; b.bias {i}; c : {i + 4}" for i in range(3)], f"c 2 {OUT}"
    )


def test_batch_norm() -> None:
    """Its weight and bias are of the group; its running statistics are no parameters."""
    model = Net(
        lambda m, x: m.b(F.relu(m.n(m.a(x)))),
        a=conv(4, 2, 3, bias=False),
        n=bn(),
        b=conv(3, 4),
    )
    groups = [f"a {i} :; n {i}; n.bias {i}; b : {i}" for i in range(4)]
    check(model, IMAGE, groups, f"b 3 {OUT}")


def test_chunk_of_halves_that_are_read_apart() -> None:
    """Each half may lose a channel if the other one does: two classes of one family."""
    model = Net(
        lambda m, x: m.c((h := m.a(x).chunk(2, -1))[0]) + m.d(h[1].sin()),
        a=linear(6, 3),
        c=linear(2, 3),
        d=linear(2, 3),
    )
    groups = [f"a {i} :; a.bias {i}; c : {i}" for i in range(3)]
    groups += [f"a {i + 3} :; a.bias {i + 3}; d : {i}" for i in range(3)]
    found = check(model, ROWS, groups, f"c 2 {OUT}; d 2 {OUT}")
    (family,) = found.families
    assert len(set(family.classes.tolist())) == 2 and family.size == 3
    halves = {entries(found, i): int(c) for i, c in zip(family.groups, family.classes, strict=True)}
    assert len({halves[written(model, text)] for text in groups[:3]}) == 1
    assert len({halves[written(model, text)] for text in groups[3:]}) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_gated_linear_unit(packed: bool) -> None:
    """Row i of the gate goes with row i of what it lets through, packed or not."""
    if packed:
        model = Net(lambda m, x: m.c(F.glu(m.a(x), -1)), a=linear(8, 3), c=linear(2, 4))
        groups = [f"a {i},{i + 4} :; a.bias {i},{i + 4}; c : {i}" for i in range(4)]
    else:
        layers = {"a": linear(4, 3), "b": linear(4, 3), "c": linear(2, 4)}
        model = Net(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), **layers)
        groups = [f"a {i} :; a.bias {i}; b {i} :; b.bias {i}; c : {i}" for i in range(4)]
    check(model, ROWS, groups, f"c 2 {OUT}")
    check(model, ROWS, groups, f"c 2 {OUT}", "unit")


def test_squeeze_and_excitation() -> None:
    """A channel goes with its gate and with the column that measures it."""
    model = Net(
        lambda m, x: m.b((h := m.a(x)) * m.up(m.down(h.mean((2, 3), True)).relu()).sigmoid()),
        a=conv(4, 2, 3),
        down=conv(2),
        up=conv(4, 2),
        b=conv(3),
    )
    groups = [f"a {i} :; a.bias {i}; up {i} :; up.bias {i}; down : {i}; b : {i}" for i in range(4)]
    groups += [f"down {i} :; down.bias {i}; up : {i}" for i in range(2)]
    check(model, IMAGE, groups, f"b 3 {OUT}")


def test_depthwise() -> None:
    """Two filters a channel: an input goes with both of its outputs."""
    model = Net(
        lambda m, x: m.b(m.d(m.a(x)).relu()),
        a=conv(4, 2),
        d=conv(8, 4, 3, groups=4),
        b=conv(3, 8),
    )
    groups = [
        f"a {i} :; a.bias {i}; d {2 * i},{2 * i + 1} :; d.bias {2 * i},{2 * i + 1};"
        f" b : {2 * i},{2 * i + 1}"
        for i in range(4)
    ]
    check(model, IMAGE, groups, f"b 3 {OUT}")


def test_grouped() -> None:
    """One input of each group goes at a time, and one output of each group."""
    model = Net(
        lambda m, x: m.b(m.g(m.a(x)).relu()),
        a=conv(6, 2),
        g=conv(4, 6, 3, groups=2),
        b=conv(3),
    )
    of = ["0,1", "2,3"]  # the rows of each group
    inputs = [f"a {i} :; a.bias {i}; g {of[i // 3]} {i % 3}" for i in range(6)]
    outputs = [f"g {i} :; g.bias {i}; b : {i}" for i in range(4)]
    found = check(model, IMAGE, inputs + outputs, f"b 3 {OUT}")
    classes = [family.classes.tolist() for family in found.families]
    assert sorted(len(x) for x in classes) == [4, 6]
    for family, texts in zip(found.families, (inputs, outputs), strict=True):
        half = len(texts) // 2
        sides = [entries(found, i) for i in family.groups.tolist()]
        first = {c for s, c in zip(sides, family.classes.tolist(), strict=True)
                 if s in {written(model, t) for t in texts[:half]}}  # fmt: skip
        assert len(first) == 1 and family.classes.bincount().tolist() == [half, half]


def test_transposed() -> None:
    """Rows of its weight are inputs, and with groups the columns are the outputs of each."""
    model = Net(
        lambda m, x: m.b(m.u(m.a(x)).relu()),
        a=conv(4, 2),
        u=nn.ConvTranspose2d(4, 3, 2, 2),
        b=conv(3, 3),
    )
    groups = [f"a {i} :; a.bias {i}; u {i} :" for i in range(4)]
    groups += [f"u : {i}; u.bias {i}; b : {i}" for i in range(3)]
    check(model, IMAGE, groups, f"b 3 {OUT}")


def test_transposed_in_groups() -> None:
    model = Net(
        lambda m, x: m.b(m.u(m.a(x)).relu()),
        a=conv(4, 2),
        u=nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
        b=conv(3, 6),
    )
    groups = [f"a {i} :; a.bias {i}; u {i} :" for i in range(4)]
    of = ["0,1", "2,3"]
    groups += [f"u {of[i // 3]} {i % 3}; u.bias {i}; b : {i}" for i in range(6)]
    check(model, IMAGE, groups, f"b 3 {OUT}")


def test_channel_shuffle() -> None:
    """Position 2 i + g holds channel 3 g + i."""
    shuffle = nn.ChannelShuffle(2)
    model = Net(lambda m, x: m.b(m.s(m.a(x))), a=conv(6, 2), s=shuffle, b=conv(3, 6))
    where = {3 * g + i: 2 * i + g for g in range(2) for i in range(3)}
    groups = [f"a {c} :; a.bias {c}; b : {at}" for c, at in where.items()]
    check(model, IMAGE, groups, f"b 3 {OUT}")


def test_pixel_shuffle() -> None:
    """Four rows make one channel, of four times the positions."""
    model = Net(
        lambda m, x: m.b(m.s(m.a(x)).relu()), a=conv(12, 2), s=nn.PixelShuffle(2), b=conv(2, 3)
    )
    rows = [",".join(str(4 * i + k) for k in range(4)) for i in range(3)]
    groups = [f"a {r} :; a.bias {r}; b : {i}" for i, r in enumerate(rows)]
    check(model, IMAGE, groups, f"b 2 {OUT}")


def test_flatten() -> None:
    """Nine columns of the linear layer read one channel of 3 x 3 positions."""
    model = Net(lambda m, x: m.b(m.a(x).relu().flatten(1)), a=conv(4, 2, 2), b=linear(3, 36))
    cols = [",".join(str(9 * i + k) for k in range(9)) for i in range(4)]
    groups = [f"a {i} :; a.bias {i}; b : {c}" for i, c in enumerate(cols)]
    check(model, IMAGE, groups, f"b 3 {OUT}")


def test_a_weight_that_is_used_twice() -> None:
    """b reads a's and its own outputs: row and column i are one channel."""
    model = Net(lambda m, x: m.c(m.b(m.b(m.a(x)).tanh())), a=linear(4, 3), b=linear(), c=linear(2))
    groups = [f"a {i} :; a.bias {i}; b {i} :; b.bias {i}; b : {i}; c : {i}" for i in range(4)]
    check(model, ROWS, groups, f"c 2 {OUT}")


def test_a_weight_that_two_groups_share() -> None:
    """b reads p and q: column i reads both, so both go."""
    model = Net(
        lambda m, x: m.b(m.p(x).tanh()) + m.b(m.q(x).sin()),
        p=linear(4, 3),
        q=linear(4, 3),
        b=linear(2),
    )
    groups = [f"p {i} :; p.bias {i}; q {i} :; q.bias {i}; b : {i}" for i in range(4)]
    check(model, ROWS, groups, f"b 2 {OUT}")


def test_tied_embedding() -> None:
    """Columns of the embedding are columns of the head; its rows are outputs of the model."""
    model = Net(
        lambda m, x: m.head((h := m.embed(x)) + m.a(h).tanh()),
        embed=nn.Embedding(7, 4),
        a=linear(),
        head=nn.Linear(4, 7, bias=False),
    )
    model.head.weight = model.embed.weight
    groups = [f"embed : {i}; a {i} :; a.bias {i}; a : {i}" for i in range(4)]
    check(model, TOKENS, groups, f"embed 7 {OUT}")


def test_tied_without_a_stream() -> None:
    """Column i is made by the embedding and read by the head, with what is between: one group."""
    model = Net(
        lambda m, x: m.head(m.b(m.a(m.embed(x)).tanh())),
        embed=nn.Embedding(7, 4),
        a=linear(3, 4),
        b=linear(4, 3),
        head=nn.Linear(4, 7, bias=False),
    )
    model.head.weight = model.embed.weight
    groups = [f"embed : {i}; a : {i}; b {i} :; b.bias {i}" for i in range(4)]
    groups += [f"a {i} :; a.bias {i}; b : {i}" for i in range(3)]
    check(model, TOKENS, groups, f"embed 7 {OUT}")


def test_a_weight_and_its_transpose() -> None:
    """A tied autoencoder: column i reads a's channel i and makes the one that b reads."""
    weight = nn.Parameter(torch.zeros(3, 4))
    model = Net(
        lambda m, x: m.b(F.linear(F.linear(m.a(x), m.w).tanh(), m.w.t()).sin()),
        a=linear(4, 3),
        w=weight,
        b=linear(2),
    )
    randomized(model)
    found = structures.groups(lap_ext.trace(model, ROWS), "channel")
    expected = [f"a {i} :; a.bias {i}; w : {i}; b : {i}" for i in range(4)]
    expected += [f"w {i} :" for i in range(3)]
    got = {entries(found, i) for i in range(len(found))}
    assert got == {written(model, text) for text in expected}


def test_long_short_term_memory() -> None:
    """Row j of all four gates, of both weights and biases, and the columns that read unit j."""
    model = Net(
        lambda m, x: m.head(m.rnn(m.a(x))[0]),
        a=linear(5, 3),
        rnn=nn.LSTM(5, 4, batch_first=True),
        head=linear(2),
    )
    gates = [f"{i},{i + 4},{i + 8},{i + 12}" for i in range(4)]
    groups = [
        f"rnn.weight_ih_l0 {g} :; rnn.weight_hh_l0 {g} :; rnn.weight_hh_l0 : {i};"
        f" rnn.bias_ih_l0 {g}; rnn.bias_hh_l0 {g}; head : {i}"
        for i, g in enumerate(gates)
    ]
    groups += [f"a {i} :; a.bias {i}; rnn.weight_ih_l0 : {i}" for i in range(5)]
    check(model, ROWS, groups, f"head 2 {OUT}")


def test_gated_recurrent_unit() -> None:
    """Two layers: the second reads the first's units."""
    rnn = nn.GRU(3, 2, num_layers=2, batch_first=True)
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=rnn, head=linear(2, 2))
    groups = []
    for layer in range(2):
        for i in range(2):
            g = f"{i},{i + 2},{i + 4}"
            reader = "head" if layer else "rnn.weight_ih_l1"
            groups.append(
                f"rnn.weight_ih_l{layer} {g} :; rnn.weight_hh_l{layer} {g} :; rnn.bias_ih_l{layer}"
                f" {g}; rnn.bias_hh_l{layer} {g}; rnn.weight_hh_l{layer} : {i}; {reader} : {i}"
            )
    check(model, ROWS, groups, f"head 2 {OUT}")


class Attention(nn.Module):
    """Two heads of two channels, and a stream that nothing normalizes."""

    def __init__(self, heads: int = 2, kv: int = 2) -> None:
        super().__init__()
        self.heads, self.kv = heads, kv
        self.a, self.head = linear(4, 3), linear(2)
        self.q, self.k, self.v = linear(2 * heads), linear(2 * kv), linear(2 * kv)
        self.o = linear(4, 2 * heads)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        q, k, v = (
            y.unflatten(-1, (-1, 2)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x))
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kv)
        return self.head(x + self.o(y.transpose(1, 2).flatten(2)))


def test_attention() -> None:
    """v with o's columns, q with k, and the stream; a channel of every head goes at a time."""
    stream = [
        f"a {i} :; a.bias {i}; q : {i}; k : {i}; v : {i}; o {i} :; o.bias {i}; head : {i}"
        for i in range(4)
    ]
    values = [f"v {i} :; v.bias {i}; o : {i}" for i in range(4)]
    logits = [f"q {i} :; q.bias {i}; k {i} :; k.bias {i}" for i in range(4)]
    found = check(Attention(), ROWS, stream + values + logits, f"head 2 {OUT}")
    classes = {x.layers: x.classes.tolist() for x in found.families}
    assert classes[("v",)] == classes[("q", "k")] == [0, 0, 1, 1]
    assert classes[("a", "o")] == [0] * 4


def test_heads() -> None:
    """Everything of a head: rows of q, k and v, columns of o."""
    groups = []
    for h in ("0,1", "2,3"):
        rows = "; ".join(f"{x} {h} :; {x}.bias {h}" for x in "qkv")
        groups.append(f"{rows}; o : {h}")
    found = grouped(Attention(), ROWS, "head")
    model = Attention()
    assert {entries(found, i) for i in range(2)} == {written(model, text) for text in groups}
    assert len(found) == 2
    assert {(x.layer, x.channels) for x in found.fixed} == {("a", 4), ("o", 4), ("head", 2)}


def test_grouped_queries() -> None:
    """Two query heads and the one of keys and values that both read."""
    found = grouped(Attention(heads=4, kv=2), ROWS, "head")
    model = Attention(heads=4, kv=2)
    groups = [
        f"q {q} :; q.bias {q}; k {k} :; k.bias {k}; v {k} :; v.bias {k}; o : {q}"
        for q, k in (("0,1,2,3", "0,1"), ("4,5,6,7", "2,3"))
    ]
    assert {entries(found, i) for i in range(len(found))} == {written(model, t) for t in groups}


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.Softmax(-1), nn.LogSoftmax(-1)]
)
def test_what_reads_all_channels_at_once(norm: nn.Module) -> None:
    model = Net(lambda m, x: m.b(m.n(m.a(x))), a=linear(4, 3), n=norm, b=linear(2))
    name = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm", "LogSoftmax": "log_softmax"}
    name = name.get(type(norm).__name__, "softmax")
    check(model, ROWS, [], f"a 4 {name} in 'n' reads all channels at once; b 2 {OUT}")


def test_group_norm() -> None:
    """A set of channels that are normalized together could go; but the groups must stay equal."""
    model = Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(6, 2, 3), n=nn.GroupNorm(3, 6), b=conv(3, 6))
    check(model, IMAGE, [], f"a 6 group_norm in 'n' reads all channels at once; b 3 {OUT}")


def test_inputs_and_outputs() -> None:
    """x + a(x) has the model's inputs as channels; b's outputs leave it."""
    model = Net(lambda m, x: m.b(x + m.a(x)), a=linear(3, 3), b=linear(2, 3))
    check(model, ROWS, [], f"a 3 an input of the model; b 2 {OUT}")


def test_everything_reaches_the_output() -> None:
    """A stream that is returned: all that adds to it is fixed, what is inside the branch is not."""
    model = Net(
        lambda m, x: (h := m.a(x)) + m.c(m.b(h).relu()),
        a=linear(4, 3),
        b=linear(5),
        c=linear(4, 5),
    )
    groups = [f"b {i} :; b.bias {i}; c : {i}" for i in range(5)]
    check(model, ROWS, groups, f"a 4 {OUT}; c 4 {OUT}")


def test_a_group_of_one() -> None:
    """A single channel between two layers."""
    model = Net(lambda m, x: m.b(m.a(x).relu()), a=linear(1, 3), b=linear(2, 1))
    check(model, ROWS, ["a 0 :; a.bias 0; b : 0"], f"b 2 {OUT}")


def test_nothing_reads_it() -> None:
    """b reads channels 0 to 2 of a; the last one has no reader."""
    model = Net(lambda m, x: m.b(m.a(x)[..., :3]), a=linear(4, 3), b=linear(2, 3))
    groups = [f"a {i} :; a.bias {i}; b : {i}" for i in range(3)]
    check(model, ROWS, groups, f"a 1 nothing reads it; b 2 {OUT}")
