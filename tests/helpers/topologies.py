# SPDX-License-Identifier: MIT
"""Topologies of the zoo's models, and what is read off their edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext.topology import Edge
from tests import zoo

HF = {entry.name for entry in zoo.HF} | {"hf_mamba"}

ENTRIES = {entry.name: entry for entry in [*zoo.ENTRIES, *zoo.HARD]}


@cache
def traced(name: str) -> lap_ext.Topology:
    """The topology of an entry, once for all tests."""
    if name in HF:
        pytest.importorskip("transformers", minversion="5")
    model, args, kwargs = ENTRIES[name].make()
    return lap_ext.trace(model, args or kwargs)


def pairs(topology: lap_ext.Topology, layer: str, producer: str) -> list[tuple[int, int]]:
    """(input channel, producer's channel) pairs."""
    (edge,) = [edge for edge in topology.layers[layer].prev if edge.name == producer]
    return list(zip(edge.here.tolist(), edge.there.tolist(), strict=True))


def agree(edges: list[Edge], expected: Iterable[str]) -> None:
    """Edges against their descriptions, in this order."""
    rows = [row.split(" via ") for row in expected]
    shown = [f"{e.name}: {e.channel_map}{'' if e.scale is None else ' scaled'}" for e in edges]
    assert shown == [row[0] for row in rows]
    for edge, row in zip(edges, rows, strict=True):
        rest = iter(edge.via)
        passed = [operation for operation in row[1].split() if operation in rest] if row[1:] else []
        assert passed == (row[1].split() if row[1:] else []), (edge.name, edge.via)


def check(topology: lap_ext.Topology, layer: str, prev: str, following: str) -> None:
    """The edges of a layer; several are parted by semicolons."""
    agree(topology.layers[layer].prev, [row.strip() for row in prev.split(";") if row.strip()])
    agree(topology.layers[layer].next, [row.strip() for row in following.split(";") if row.strip()])


def followed(topology: lap_ext.Topology) -> dict[tuple[int, int], float]:
    """(Input of b, channel of a) -> factor, as the edge says."""
    edges = [edge for edge in topology.layers["b"].prev if edge.name == "a"]
    result: dict[tuple[int, int], float] = {}
    for edge in edges:
        scale = torch.ones(edge.here.shape) if edge.scale is None else edge.scale
        triples = zip(edge.here.tolist(), edge.there.tolist(), scale.tolist(), strict=True)
        result |= {(here, there): factor for here, there, factor in triples if factor}
    return result


W, V = torch.arange(6.0) / 3 - 1.1, torch.arange(1.0, 7.0)  # V: no zero


class Weighted(nn.Module):
    """An operation with a parameter of its own."""

    def __init__(self, weight: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(weight.clone()), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


E, C, H = 3, 4, 5  # experts, width of the stream, hidden channels


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up
