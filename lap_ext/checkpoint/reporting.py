# SPDX-License-Identifier: MIT
"""The facts of a report about a pruning, from a checkpoint directory or from a module in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.checkpoint.files import DTYPES, open_directory, size_of
from lap_ext.checkpoint.inspecting import model_bytes, neighbors
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.checkpoint.result import CheckpointResult
from lap_ext.checkpoint.structure import structure_of
from lap_ext.checkpoint.usage import loading
from lap_ext.errors import LapValueError, calling
from lap_ext.masks import BitMasks
from lap_ext.options import Inputs, OnUnsupported
from lap_ext.progress import Progress, Step
from lap_ext.pruning.result import PruneResult
from lap_ext.report import Facts, Histogram, LayerFacts
from lap_ext.report.gather import Chunk, LayerWeights, gather
from lap_ext.topology import Layer, Topology

_STEP = "measure"


@calling("checkpoint_facts")
def checkpoint_facts(
    directory: str | os.PathLike[str],
    result: CheckpointResult,
    *,
    options: Mapping[str, str] | None = None,
    example_inputs: Inputs | None = None,
    model: nn.Module | None = None,
    on_unsupported: OnUnsupported = "raise",
    on_progress: Callable[[Progress], Any] | None = None,
) -> Facts:
    """Measures what a pruning of a checkpoint did, in one pass over the original's layers.

    Args:
        directory: the original checkpoint, which is also the report's title.
        result: of `checkpoint.prune`, with its masks saved. Its scores, if they were counted, are
            in the report.
        options: option -> value, as the report shows them.
        example_inputs: as in `checkpoint.prune`.
        model: as in `checkpoint.prune`.
        on_unsupported: as in `checkpoint.prune`.
        on_progress: called with a `Progress` after each chunk of rows.

    Raises:
        ValueError: the masks were not saved; or as `checkpoint.prune`.
        TypeError, TopologyError: as `checkpoint.prune`.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> net[0].weight.data = torch.tensor([[3., 1.]])
        >>> given = {"model": net, "example_inputs": torch.ones(1, 2)}
        >>> with tempfile.TemporaryDirectory() as root:
        ...     source = Path(root) / "dense"
        ...     source.mkdir()
        ...     save_file(net.state_dict(), source / "model.safetensors")
        ...     result = lap_ext.checkpoint.prune(source, Path(root) / "pruned", 0.5, **given)
        ...     facts = checkpoint_facts(source, result, **given)
        >>> facts.kept, facts.mass                           # 9 / 10
        (1, 0.9)
    """
    if result.masks_file is None:
        raise LapValueError("a result with its masks saved", "none")
    with BitMasks(result.masks_file) as masks:
        before, after = open_directory(Path(directory)), open_directory(result.directory)
        structure = structure_of(before, model, example_inputs, on_unsupported)
        source, buffer = Source(before), Buffer()

        def weights(layer: Layer) -> LayerWeights:
            copies = structure.copies[layer.name]
            item = DTYPES[copies[0][0].entry.dtype].itemsize

            def chunks(most: int) -> Iterator[Chunk]:
                for first, chunk in source.chunks(copies[0], most, buffer):
                    yield chunk, masks.chunk(layer.name, first, chunk.numel()), None

            scores = result.scores.get(layer.name)
            return _weights(layer, item, len(copies), chunks, scores)

        facts = _facts(os.fspath(directory), result, options, structure.topology)
        facts.bytes_before, facts.bytes_after = before.size, after.size
        facts.load = loading(result.directory, structure.topology.model)
        layers = [structure.topology.layers[name] for name in masks.shapes]
        total = sum(size_of(structure.copies[layer.name][0]) for layer in layers)
        return gather(facts, map(weights, layers), Step(on_progress, _STEP, total).read)


def model_facts(
    topology: Topology,
    result: PruneResult,
    scores: Mapping[str, Tensor],
    *,
    title: str,
    options: Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], Any] | None = None,
) -> Facts:
    """Measures what a pruning of a module in memory does, while the module has all its weights.

    Args:
        topology: of the module.
        result: of `lap_ext.prune(..., apply=False)`.
        scores: layer name -> the scores that ranked its weights; empty to show none.
        title: of the report.
        options: option -> value, as the report shows them.
        on_progress: called with a `Progress` after each layer.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> net[0].weight.data = torch.tensor([[3., 1.]])
        >>> topology = lap_ext.trace(net, torch.ones(1, 2))
        >>> result = lap_ext.prune(net, None, 0.5, topology=topology, apply=False)
        >>> facts = model_facts(topology, result, {}, title="net")
        >>> facts.kept, facts.mass, facts.bytes_before       # 9 / 10
        (1, 0.9, 8)
    """

    def weights(layer: Layer) -> LayerWeights:
        def chunks(_most: int) -> Iterator[Chunk]:  # all are in memory already
            yield layer.weight, result.masks[layer.name], scores.get(layer.name)

        return _weights(layer, layer.weight.element_size(), 1, chunks)

    facts = _facts(title, result, options, topology)
    facts.bytes_before = facts.bytes_after = model_bytes(topology.model)
    layers = [topology.layers[name] for name in result.masks]
    step = Step(on_progress, _STEP, sum(layer.weight.nbytes for layer in layers))
    return gather(facts, map(weights, layers), step.read)


def _facts(
    title: str, result: PruneResult, options: Mapping[str, str] | None, topology: Topology
) -> Facts:
    """Gathers what is known before a weight is measured."""
    return Facts(
        title,
        result.criterion,
        [],
        options or {},
        topology.others,
        topology.stops,
        version=lap_ext.__version__,
        torch=torch.__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _weights(
    layer: Layer,
    itemsize: int,
    copies: int,
    chunks: Callable[[int], Iterator[Chunk]],
    scores: Histogram | None = None,
) -> LayerWeights:
    facts = LayerFacts(
        layer.name,
        layer.kind,
        layer.shape,
        neighbors(layer.prev),
        neighbors(layer.next),
        scores=scores,
    )
    names = (edge.name for edge in layer.prev if edge.kind == "layer")
    facts.producers = tuple(dict.fromkeys(names))
    return LayerWeights(facts, layer.roles[0].part.shape, layer.groups, itemsize, copies, chunks)
