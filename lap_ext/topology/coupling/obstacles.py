# SPDX-License-Identifier: MIT
"""Lists what stands in the way of removing channels: where they come from, go to, and who reads.

Each obstacle is a set of channels and a reason in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lap_ext.topology.coupling.axes import Axes, by_parameter, differ
from lap_ext.topology.graph import Graph

Obstacle: TypeAlias = tuple[Tensor, str]  # channel ids, why they cannot go

ALONE = {"reduce", "zero"}  # kinds of groups whose channels are not their parents' channels
_SOURCES = {"input": "an input of the model", "boundary": "an operation that is not followed"}
_ENDS = {"output": "an output of the model", "attention": "it becomes attention weights"}


def obstacles(
    graph: Graph, axes: Sequence[Axes], label: Tensor, live: Tensor, joined: Sequence[Tensor]
) -> Iterator[Obstacle]:
    """Lists all obstacles.

    Args:
        graph: of the network.
        axes: of each weight.
        label: of each channel: what goes together has the same.
        live: which channels something reads.
        joined: further channels that go together: heads.
    """
    for group in graph.channels.groups:
        if group.kind in _SOURCES:
            yield group.ids[live[group.ids]], _SOURCES[group.kind]
    yield from _ends(graph, label, joined)
    for group in graph.channels.groups:
        for edges in group.edges:
            if edges.broadcast and group.kind not in ALONE:
                used = live[edges.child + group.first]
                yield edges.parent[used], f"one channel beside many ({group.name})"
    for views in by_parameter(axes):
        for x in views:
            if x.partial or differ(views):
                how = "in part" if x.partial else "as different matrices"
                yield torch.cat([x.rows[1], x.cols[1]]), f"{x.layer!r} is used {how}"
    for ids, name in graph.facts.large:
        yield ids, f"{name!r} has too many entries to be followed"
    yield from _together(graph, label, live)


def _ends(graph: Graph, label: Tensor, joined: Sequence[Tensor]) -> Iterator[Obstacle]:
    """Lists the channels that leave the network; the biases of heads go with them."""
    in_heads = torch.unique(torch.cat([label[:1], *(label[x.flatten()] for x in joined)]))
    for ids, name in graph.ends:
        ends = ids[~torch.isin(label[ids], in_heads)] if name == "attention" else ids
        yield ends, _ENDS.get(name, f"{name} reads it")


def _together(graph: Graph, label: Tensor, live: Tensor) -> Iterator[Obstacle]:
    """Lists the channels that an operation reads together with others that would stay."""
    for fact in graph.facts.together:
        ids = _parted(label, fact.row, fact.ids)
        yield ids, f"{fact.reason} reads all channels at once"
    for group in graph.channels.groups:
        if group.kind == "reduce" and group.edges:
            child = torch.cat([edges.child for edges in group.edges])
            parent = torch.cat([edges.parent for edges in group.edges])
            used = live[child + group.first]
            ids = _parted(label, child[used], parent[used])
            yield ids, f"a {group.name} over channels reads it with others"


def _parted(label: Tensor, row: Tensor, ids: Tensor) -> Tensor:
    """Returns the channels of sets in which not all go together."""
    if not ids.numel():
        return ids
    own = label[ids]
    size = int(row.max()) + 1
    low = torch.full((size,), int(own.max()) + 1).scatter_reduce(0, row, own, "amin")
    high = torch.zeros(size, dtype=torch.int64).scatter_reduce(0, row, own, "amax")
    return ids[low[row] != high[row]]
