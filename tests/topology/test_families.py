# SPDX-License-Identifier: MIT
"""Every family of the zoo: what is pruned, how much of it, and that edges and norms agree.

The norms of a role come from two passes over the channel graph (topology/propagate.py). The edges
that a user sees are computed separately, one walk per role (topology/edges.py). Each norm must be
the sum over the edges of scale^2 * the squared norm of the neighbor's channel, which is computed
here from the weights.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from lap_ext.criteria.context import Network
from lap_ext.places import Memory
from lap_ext.topology import counting
from lap_ext.topology.edges import Edge, consumers, producers
from lap_ext.topology.roles import Role
from tests import zoo
from tests.helpers import coupled_zoo
from tests.helpers.flop_counts import counted as counted_flops
from tests.helpers.topologies import ENTRIES, pairs, traced

SWIN = "swin.encoder.layers"
BIAS = "attention.relative_position_bias.relative_position_bias_table"
GRN = "convnextv2.encoder.stages"

# Parameters of two dimensions or more that are added, multiplied with or never used: no layers.
OTHERS: dict[str, list[str]] = {
    **{f"vit_{kind}": ["cls_token", "pos_embed"] for kind in ("sdpa", "by_hand", "mha")},
    "swin": [f"stage{i}.attn.bias_table" for i in ("1.0", "1.1", "2")],
    **{f"transformer_encoder{kind}": ["position"] for kind in ("", "_prenorm")},
    "cross_attention": ["queries"],
    "hf_t5_gated": ["shared.weight"],  # untied: encoder and decoder have embeddings of their own
    "hf_whisper": ["model.decoder.embed_positions.weight"],  # a slice of it is added
    "hf_vit": ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"],
    "hf_deit": [
        f"deit.embeddings.{name}"
        for name in ("cls_token", "position_embeddings", "distillation_token")
    ],
    "hf_dinov2": [
        f"dinov2.embeddings.{name}" for name in ("cls_token", "mask_token", "position_embeddings")
    ],
    "hf_siglip": ["head.probe"],
    "hf_swin": [f"{SWIN}.{i}.{BIAS}" for i in ("0.blocks.0", "0.blocks.1", "1.blocks.0")],
    "hf_convnextv2": [
        f"{GRN}.{block}.grn.{name}"
        for block in ("0.layers.0", "1.layers.0", "1.layers.1")
        for name in ("weight", "bias")
    ],
}


each = pytest.mark.parametrize("name", [entry.name for entry in zoo.ENTRIES])


@each
def test_what_is_a_layer(name: str) -> None:
    """Every parameter of two dimensions or more, but for the ones listed above."""
    topology = traced(name)
    assert topology.others == OTHERS.get(name, [])
    matrices = {n for n, p in topology.model.named_parameters() if p.dim() > 1}
    layers = {layer.parameter for layer in topology.layers.values()}
    assert layers == matrices - set(topology.others)
    assert not topology.stops
    for layer in topology.layers.values():
        assert layer.name == layer.parameter.removesuffix(".weight")
        assert layer.shape == tuple(layer.weight.shape)


@each
def test_half_of_every_layer(name: str) -> None:
    """All scores are finite and none is negative; (n + 1) // 2 weights of n are kept."""
    topology = traced(name)
    scores = lap_ext.scores(topology.model, topology=topology, layers="*")
    assert list(scores) == list(topology.layers)
    for layer, score in scores.items():
        assert score.shape == topology.layers[layer].shape
        assert score.isfinite().all() and (score >= 0).all() and score.any()
    result = lap_ext.prune(
        topology.model, None, 0.5, topology=topology, layers="*", apply=False, masks={}
    )
    for row in result.layers:
        assert row.kept == (row.total + 1) // 2 == int(result.masks[row.name].sum())
        assert row.shape == topology.layers[row.name].shape
    assert [row.name for row in result.layers] == list(topology.layers)


@each
def test_parameters_and_flops(name: str) -> None:
    """The dense model counts as PyTorch does while it runs."""
    topology = traced(name)
    nothing = torch.zeros(topology.graph.channels.size, dtype=torch.bool)
    total = sum(p.numel() for p in topology.model.parameters())
    assert counting.params(topology, nothing) == total
    _, args, kwargs = ENTRIES[name].make()
    assert counting.flops(topology, nothing) == counted_flops(topology.model, args, kwargs)


# ---- edges and norms -----------------------------------------------------------------------------
Walk = tuple[Role, list[Edge], list[Edge]]  # a role, what feeds it, what reads it


@cache
def walked(name: str) -> list[Walk]:
    topology = traced(name)
    walker = topology.walker()
    return [(r, producers(walker, [r]), consumers(walker, [r])) for r in topology.roles]


def squared_norms(weight: Tensor, role: Role) -> tuple[Tensor, Tensor]:
    """Squared norms of a role's inputs and outputs, at their indices in the full weight."""
    part = role.part
    block = part.of(weight.detach().double()).square()
    rows = block.flatten(1).sum(1)
    columns = block.reshape(part.groups, -1, block.shape[1], block[0, 0].numel()).sum((1, 3))
    into, out = (rows, columns.flatten()) if part.transposed else (columns.flatten(), rows)
    first_in, first_out = part.first
    return F.pad(into, (first_in, 0)), F.pad(out, (first_out, 0))


def counted(topology: lap_ext.Topology, edge: Edge, side: int) -> list[Tensor]:
    """The squared norms of the neighbor's channels: inputs (side 0) or outputs (1).

    A weight that is tied or used in parts has several roles, and an edge does not say which: all
    roles that it may be.
    """
    if edge.kind not in ("layer", "coupled"):
        return [torch.ones(edge.there.shape, dtype=torch.float64)]
    layer = topology.layers[edge.name]
    known = [squared_norms(layer.weight, role)[side] for role in layer.roles]
    most = int(edge.there.max()) + 1
    if len({role.part.transposed for role in layer.roles}) > 1:
        known = [x for x in known if x.numel() == most]
    longest = max(x.numel() for x in known)
    total = torch.stack([F.pad(x, (0, longest - x.numel())) for x in known]).amax(0)
    counts = [x[edge.there] for x in [total, *known] if x.numel() >= most]
    return list({tuple(x.tolist()): x for x in counts}.values())


def check_sum(
    topology: lap_ext.Topology, edges: list[Edge], side: int, first: int, expected: Tensor
) -> None:
    """Expected is the sum over edges of scale^2 * what the neighbor's channel counts."""
    sides = [1 if edge.kind == "coupled" else side for edge in edges]
    choices = [counted(topology, edge, s) for edge, s in zip(edges, sides, strict=True)]
    total = torch.zeros(0)
    for choice in itertools.product(*choices):
        total = torch.zeros(expected.shape, dtype=torch.float64)
        for edge, squared_norm in zip(edges, choice, strict=True):
            squares = squared_norm if edge.scale is None else squared_norm * edge.scale.square()
            total.index_add_(0, edge.here - first, squares)
        if torch.allclose(total, expected, rtol=1e-12, atol=0):
            return
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


@each
def test_edges_add_up(name: str) -> None:
    topology = traced(name)
    network = Network(Memory(topology))
    for role, fed, read in walked(name):
        in_norm, out_norm = network.norms(role)
        constant = torch.ones(in_norm.shape, dtype=torch.bool)
        constant[role.inputs[0]] = False
        assert (in_norm[constant] == 1).all()
        in_norm[constant] = 0.0
        first_in, first_out = role.part.first
        check_sum(topology, fed, 1, first_in, in_norm.square())
        if read:
            check_sum(topology, read, 0, first_out, out_norm.square())
        else:
            assert (out_norm == 1).all()


@each
def test_every_edge_has_a_way_back(name: str) -> None:
    """What feeds a layer is read by it: the same pairs of channels with the same scale."""
    fed: dict[Any, float] = {}
    read: dict[Any, float] = {}
    coupled = set()
    for role, before, after in walked(name):
        for edge in before:
            collect(fed, edge, lambda here, there, e=edge, at=role: (e.name, there, at.layer, here))
        for edge in after:
            collect(
                read, edge, lambda here, there, e=edge, at=role: (at.layer, here, e.name, there)
            )
            if edge.kind == "coupled":
                there = zip(edge.here.tolist(), edge.there.tolist(), strict=True)
                coupled |= {(role.layer, i, edge.name, j) for i, j in there}
    assert fed.keys() == read.keys()
    assert all(math.isclose(read[pair], fed[pair], rel_tol=1e-12) for pair in fed)
    assert coupled == {(b, j, a, i) for a, i, b, j in coupled}


def collect(totals: dict[Any, float], edge: Edge, key: Callable[[int, int], Any]) -> None:
    """Squared scales of the pairs of an edge between layers."""
    if edge.kind == "layer":
        squares = (
            torch.ones(edge.here.shape) if edge.scale is None else edge.scale.square()
        ).tolist()
        for here, there, square in zip(
            edge.here.tolist(), edge.there.tolist(), squares, strict=True
        ):
            totals[key(here, there)] = totals.get(key(here, there), 0.0) + square


# ---- what goes together --------------------------------------------------------------------------
@each
def test_groups_by_running_without_them(name: str) -> None:
    """Producers and consumers of what is gone may have any values; see coupling_oracle.py."""
    if name not in coupled_zoo.ONE_FOR_TWO:
        assert [*coupled_zoo.checked(name), *coupled_zoo.masks_differ(name)] == []
    assert bool(len(coupled_zoo.groups(name, "channel"))) != (name in coupled_zoo.NOTHING)


@each
def test_no_channel_is_left_out(name: str) -> None:
    """Every output channel of a layer is in a group, or cannot go for a reason in words."""
    for kind in coupled_zoo.KINDS:
        found = coupled_zoo.groups(name, kind)
        for fixed in found.fixed:
            assert fixed.channels > 0 and fixed.layer in traced(name).layers
            assert len(fixed.reason.split()) >= 3 and fixed.reason == fixed.reason.strip()
        gone = sum(group.channels for group in found)
        assert gone + sum(fixed.channels for fixed in found.fixed) == coupled_zoo.rows_of(name)


# ---- what is hard ------------------------------------------------------------------------------
REFUSED = {
    "local_response_norm": "got aten.avg_pool3d.default in module 'function', fed by layer "
    "'conv1' (",
    "running_sum": "got aten.cumsum.default, fed by layer 'conv1' (hard.py:",
    "fnet": "got aten.fft_fft2.default, fed by layer 'inlet' (hard.py:",
    "bilinear": "got aten.bilinear.default in module 'bilinear', fed by layers 'left' and 'right' ",
}
FOLLOWED = {"dropped_add", "assigned_slice", "softmax_channels", "cbam", "sorted_channels"}
FOLLOWED |= {"standardized", "weight_norm", "pruned"}  # tests/pruning/test_computed_weights.py
FOLLOWED |= {"hf_mamba"}


def test_all_that_is_hard_is_here() -> None:
    assert {entry.name for entry in zoo.HARD} == REFUSED.keys() | FOLLOWED


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name(name: str) -> None:
    with pytest.raises(lap_ext.TopologyError, match=re.escape(REFUSED[name])):
        traced(name)


def test_written_in_place() -> None:
    """An unnamed in-place result: x + x.roll() has the same channels, and so has the ReLU."""
    topology = traced("dropped_add")
    assert pairs(topology, "conv2", "conv1") == [(i, i) for i in range(6)]
    (edge,) = topology.layers["conv2"].prev
    assert {"add", "roll", "relu"} <= set(edge.via) and edge.scale is None


def test_assigned_slice() -> None:
    """y[:, :3] = x[:, 3:]: channels 0 to 2 of conv1 are read no more, 3 to 5 twice."""
    topology = traced("assigned_slice")
    assert pairs(topology, "conv2", "conv1") == [(0, 3), (1, 4), (2, 5), (3, 3), (4, 4), (5, 5)]
    weight = topology.layers["conv2"].weight.double()
    columns = weight.square().sum((0, 2, 3))
    read = torch.cat([torch.zeros(3), columns[:3] + columns[3:]])
    scores = lap_ext.scores(topology.model, topology=topology)["conv1"]
    expected = topology.layers["conv1"].weight.abs() * read.sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-6, atol=0)


def test_softmax_of_channels() -> None:
    """An activation, as everywhere: its sum is a statistic over the very channels it divides."""
    assert pairs(traced("softmax_channels"), "conv2", "conv1") == [(i, i) for i in range(6)]


def test_channels_in_an_order_that_data_says() -> None:
    """Any channel may come to any position: each of them counts there."""
    every = [(i, c) for i in range(6) for c in range(6)]
    assert pairs(traced("sorted_channels"), "conv2", "conv1") == every


def test_gates_of_positions_and_of_channels() -> None:
    """CBAM: mean and maximum over the channels feed one layer, a sliding window feeds another."""
    topology = traced("cbam")
    norm = topology.model.conv1[1]
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert pairs(topology, "spatial", "conv1.0") == [(i, c) for i in (0, 1) for c in range(6)]
    (edge,) = topology.layers["spatial"].prev
    torch.testing.assert_close(edge.scale, torch.cat([gain / 6, gain]).abs())  # mean: 1 of 6
    assert pairs(topology, "eca", "conv1.0") == [(0, c) for c in range(6)]
    assert pairs(topology, "eca", "spatial") == [(0, 0)]
    assert pairs(topology, "conv2", "conv1.0") == [(c, c) for c in range(6)]
    assert pairs(topology, "conv2", "spatial") == [(c, 0) for c in range(6)]
    assert pairs(topology, "conv2", "eca") == [(c, 0) for c in range(6)]
