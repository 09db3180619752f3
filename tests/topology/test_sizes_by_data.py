# SPDX-License-Identifier: MIT
"""Results with as many rows as the data selects: edges of a graph, tokens of an expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net, linear, randomized
from tests.helpers.topologies import pairs

EDGES = torch.tensor([[0, 1, 2, 2, 3, 5, 4], [1, 0, 3, 2, 4, 5, 5]])
NODES = torch.randn(6, 4, dtype=torch.float64)


def with_loops(edges: Tensor, n: int) -> Tensor:
    """PyTorch Geometric's add_remaining_self_loops: how many edges remain is known from data."""
    loops = torch.arange(n)[None].expand(2, n)
    return torch.cat([edges[:, edges[0] != edges[1]], loops], 1)


def gcn(layer: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
    """Its GCNConv, over normalized edges with self loops."""
    source, target = with_loops(edges, len(x))
    degree = x.new_zeros(len(x)).scatter_add(0, target, torch.ones_like(target).to(x))
    root = degree.pow(-0.5)
    root = root.masked_fill(root == torch.inf, 0.0)
    message = (root[source] * root[target])[:, None] * layer(x).index_select(0, source)
    place = target[:, None].expand_as(message)
    return x.new_zeros(len(x), message.shape[1]).scatter_add_(0, place, message)


def gat(m: Any, x: Tensor, edges: Tensor) -> Tensor:
    """Its GATConv of two heads: a softmax over the edges of a node, written out."""
    source, target = with_loops(edges, len(x))
    h = m.a(x).view(-1, 2, 3)
    logits = F.leaky_relu((h * m.s).sum(-1)[source] + (h * m.t).sum(-1)[target])
    place = target[:, None].expand_as(logits)
    largest = logits.new_zeros(len(x), 2).scatter_reduce(0, place, logits.detach(), "amax")
    weights = (logits - largest.index_select(0, target)).exp()
    total = logits.new_zeros(len(x), 2).scatter_add(0, place, weights)
    weights = weights / total.index_select(0, target)
    message = h.index_select(0, source) * weights[..., None]
    return m.b(h.new_zeros(h.shape).index_add(0, target, message).flatten(1))


def test_a_graph_network_is_its_layers() -> None:
    """Nodes are positions: the scores are those of the linear layers alone."""
    model = randomized(Net(lambda m, x, e: gcn(m.b, F.relu(gcn(m.a, x, e)), e), a=linear(5),
                           b=linear(3, 5)))  # fmt: skip
    scores = lap_ext.scores(model, (NODES, EDGES))
    expected = lap_ext.scores(nn.Sequential(model.a, nn.ReLU(), model.b), NODES)
    torch.testing.assert_close(list(scores.values()), list(expected.values()))


def test_a_graph_attention_is_followed() -> None:
    """The messages keep their channels; the logits of a head come from all of its channels."""
    model = Net(gat, a=linear(6), b=linear(2, 6))
    model.s, model.t = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    topology = lap_ext.trace(randomized(model), (NODES, EDGES))
    heads = [(i, 3 * (i // 3) + d) for i in range(6) for d in range(3)]
    assert sorted(pairs(topology, "b", "a")) == heads
    assert list(topology.layers) == ["a", "b"] and topology.others == ["s", "t"]


def by_expert(m: Any, x: Tensor) -> Tensor:
    """JetMoE: tokens sorted by expert, split where the data says, each part with its weight."""
    h = m.a(x)
    expert = (x[:, 0] > 0).long()
    order = expert.argsort()
    sizes = F.one_hot(expert, 2).sum(0).tolist()
    parts = [F.linear(y, w) for y, w in zip(h[order].split(sizes), m.w, strict=True)]
    return m.b(x.new_zeros(6, 3).index_add(0, order, torch.cat(parts)))


def test_a_split_by_data() -> None:
    """Either expert may have made a row: their squares add."""
    model = Net(by_expert, a=linear(5), b=linear(2, 3), w=nn.Parameter(torch.randn(2, 3, 5)))
    scores = lap_ext.scores(randomized(model), NODES)
    a, b, w = model.a.weight.detach(), model.b.weight.detach(), model.w.detach()
    rows = a.norm(dim=1)
    torch.testing.assert_close(scores["w"], w.abs() * rows * b.norm(dim=0)[:, None])
    torch.testing.assert_close(scores["b"], b.abs() * w.square().sum((0, 2)).sqrt())


def by_channel(m: Any, x: Tensor) -> Tensor:
    kept = m.a(x).T[x[0] > 0].T
    return m.b(torch.cat([kept, kept.new_zeros(6, 4)], 1)[:, :4])


def test_channels_that_data_selects() -> None:
    """How many there are is unknown: refused, and both ways out work."""
    model = randomized(Net(by_channel, a=linear(), b=linear(2)))
    text = r"got aten\.index\.Tensor, fed by layer 'a' \(networks\.py:\d+\)\. Pass neighbors="
    with pytest.raises(lap_ext.TopologyError, match=text):
        lap_ext.trace(model, NODES)
    with pytest.warns(UserWarning, match="it counts as a boundary"):
        topology = lap_ext.trace(model, NODES, on_unsupported="cut")
    assert [edge.kind for edge in topology.layers["a"].next] == ["boundary"]
    known = {"a": (None, "b"), "b": ("a", None)}
    assert lap_ext.trace(model, NODES, neighbors=known).stops == []
