# SPDX-License-Identifier: MIT
"""The facts of a report, from a module in memory or from a folder, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import lap_ext
from lap_ext.checkpoint.files import DTYPES, MASKS, Copy, Folder, open_folder
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.checkpoint.structure import Structure, structure_of
from lap_ext.cli import weights
from lap_ext.cli.output import Progress
from lap_ext.masks.file import BitMasks
from lap_ext.report import Facts, Histogram, LayerFacts, Measure
from lap_ext.topology import Layer, Topology

_MOST = 4  # neighbors named in a cell


def neighbors(edges: Iterable[Any]) -> str:
    """The names at the ends of edges, with how channels correspond if it is not one to one."""
    names = []
    for edge in edges:
        how = "" if edge.channel_map in ("same", "all") else f" ({edge.channel_map})"
        names.append(f"{'coupled with ' if edge.kind == 'coupled' else ''}{edge.name}{how}")
    names = list(dict.fromkeys(names))
    more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


def structure(folder: Folder, unknown: str) -> Structure:
    """A traced folder."""
    return structure_of(folder, None, None, unknown)


def of_model(
    facts: Facts,
    topology: Topology,
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    progress: Progress,
) -> Facts:
    """The facts of a module that still has all its weights."""
    progress.step("measure", sum(mask.numel() for mask in masks.values()))
    found, saved = [], 0
    for name, mask in masks.items():
        layer = topology.layers[name]
        measure = _measure(layer)
        measure.add(layer.weight, mask, scores.get(name))
        measure.finish()
        found.append(measure.facts)
        saved += _saved(measure.facts, layer.weight.element_size())
        progress.advance(mask.numel())
    return _whole(facts, topology, found, saved)


def of_folder(
    facts: Facts, topology: Topology, copies: Mapping[str, list[Copy]], out: Path,
    scores: Mapping[str, Histogram], progress: Progress,
) -> Facts:  # fmt: skip
    """The facts of a folder and of what it was pruned to; scores: counted while it was pruned."""
    before, after = open_folder(Path(facts.title)), open_folder(out)
    source, buffer, found, saved = Source(before.path), Buffer(), [], 0
    with BitMasks(out / MASKS) as masks:
        progress.step("measure", sum(topology.layers[x].weight.numel() for x in masks.shapes))
        for name in masks.shapes:
            layer, pieces = topology.layers[name], copies[name][0]
            measure = _measure(layer)
            for first, part in source.runs(pieces, measure.step, buffer):
                measure.add(part, masks.part(name, first, part.numel()))
                progress.advance(part.numel())
            measure.finish()
            measure.facts.scores = scores.get(name)
            found.append(measure.facts)
            item = DTYPES[pieces[0].entry.dtype].itemsize
            saved += len(copies[name]) * _saved(measure.facts, item)
    facts.bytes_before, facts.bytes_after = weights.size(before), weights.size(after)
    return _whole(facts, topology, found, saved)


def _measure(layer: Layer) -> Measure:
    facts = LayerFacts(
        layer.name, layer.kind, layer.shape, neighbors(layer.prev), neighbors(layer.next)
    )
    return Measure(facts, layer.roles[0].part.shape, layer.groups)


def _saved(facts: LayerFacts, item: int) -> int:
    """Bytes that a sparse format saves: those of the pruned weights, less one bit a weight."""
    return (facts.total - facts.kept) * item - (facts.total + 7) // 8


def _whole(facts: Facts, topology: Topology, layers: list[LayerFacts], saved: int) -> Facts:
    facts.layers = layers
    facts.others, facts.stops = topology.others, topology.stops
    facts.version = lap_ext.__version__
    if facts.bytes_before is not None:
        facts.bytes_sparse = facts.bytes_before - saved
    return facts
