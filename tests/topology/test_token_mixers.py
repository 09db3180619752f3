# SPDX-License-Identifier: MIT
"""Edges of networks whose layers read positions: as many pairs as there are, and no more.

A ResMLP of 196 positions and 384 channels took more than 12 GB for the names of its neighbors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lap_ext

C, SIDE = 12, 4  # channels; positions: SIDE * SIDE
P = SIDE * SIDE


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, C)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class Block(nn.Module):
    """As timm's resmlp: a linear layer over positions, then two over channels, both scaled."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = Affine(), Affine()
        self.tokens, self.fc1, self.fc2 = nn.Linear(P, P), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.ls1, self.ls2 = nn.Parameter(torch.full((C,), 0.5)), nn.Parameter(torch.ones(C))
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:  # by the mean of all channels at a position
            x = x * x.mean(2, keepdim=True)
        x = x + self.ls1 * self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.ls2 * self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class ResMLP(nn.Module):
    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, C, 2, 2), Affine(), nn.Linear(C, 5)
        self.blocks = nn.Sequential(Block(gated), Block(gated))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def traced(gated: bool = False) -> lap_ext.Topology:
    return lap_ext.trace(ResMLP(gated), torch.randn(1, 3, 2 * SIDE, 2 * SIDE))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_names_need_one_pass_over_the_graph(gated: bool) -> None:
    topology = traced(gated)
    most = max(e.child.numel() for g in topology.graph.channels.groups for e in g.edges)
    with Largest() as largest:
        shown = {
            name: ([edge.name for edge in x.prev], [edge.name for edge in x.next])
            for name, x in topology.layers.items()
        }
    assert shown["blocks.1.tokens"][0] == ["stem", "blocks.0.tokens", "blocks.0.fc2"]
    readers = ["blocks.0.fc1", "blocks.1.tokens", "blocks.1.fc1", "head"]
    assert shown["blocks.0.tokens"][1] == readers
    known = topology.graph.channels.size  # index tables have an entry for each channel
    assert largest.size <= 2 * most + known, (largest.size, most)


def test_pairs_are_counted_once() -> None:
    """A scale per channel after a token mixer has C parallel edges for each position."""
    topology = traced()
    most = max(e.child.numel() for g in topology.graph.channels.groups for e in g.edges)
    with Largest() as largest:
        text = str(topology)
    assert f"stem ({C * P} pairs)" in text
    assert largest.size <= 2 * most + topology.graph.channels.size, (largest.size, most)
    edge = next(e for e in topology.layers["blocks.0.tokens"].next if e.name == "blocks.1.tokens")
    assert edge.channel_map == "same" and edge.scale is not None
    # the mean of ls1^2 over the channels of a position, C times: each feeds the next mixer
    torch.testing.assert_close(edge.scale, torch.full((P,), 0.5 * C**0.5).double())


def test_pairs_are_found_when_they_are_read_and_then_kept() -> None:
    topology = traced()
    edge = topology.layers["head"].prev[0]
    assert edge.here is edge.here and edge.channel_map == "same"


def test_short_texts_of_single_things() -> None:
    topology = traced()
    layer = topology.layers["blocks.0.fc1"]
    assert repr(layer) == "Layer('blocks.0.fc1', linear 48x12)"
    assert repr(layer.next) == "[Edge(layer 'blocks.0.fc2')]"
    group = topology.graph.channels.groups[1]
    for thing in (layer.roles, group, group.edges, layer.roles[0].out):
        assert "tensor" not in repr(thing) and len(repr(thing)) < 200
