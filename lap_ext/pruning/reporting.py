# SPDX-License-Identifier: MIT
"""The facts of a report about a pruning, from a module in memory that has all its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lap_ext import __version__
from lap_ext._text import some
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.masks import Masks
from lap_ext.options import Inputs, OnUnsupported
from lap_ext.progress import Progress, Step
from lap_ext.pruning.families import FamilyResult, fixed_notes
from lap_ext.pruning.plan import vector_shapes
from lap_ext.report import Facts, Histogram, LayerFacts, write
from lap_ext.report.gather import Chunk, LayerWeights, gather
from lap_ext.topology import Edge, Layer, Topology, trace
from lap_ext.topology.coupling import Fixed

_STEP = "measure"
MOST_NEIGHBORS = 4  # named in a cell


class Pruned(Protocol):
    """What the facts need of a result."""

    @property
    def masks(self) -> Masks:
        """The masks."""

    @property
    def criterion(self) -> str:
        """The name of the criterion."""

    @property
    def units(self) -> Mapping[str, tuple[int, int]]:
        """Layer name -> how many units of the structure are kept, and how many there are."""

    @property
    def families(self) -> Sequence[FamilyResult]:
        """How many units across layers are kept."""

    @property
    def fixed(self) -> Sequence[Fixed]:
        """Which channels cannot be removed."""


def write_report(
    path: str | os.PathLike[str],
    result: Pruned,
    original: object,
    example_inputs: Inputs | None,
    on_unsupported: OnUnsupported,
) -> None:
    """Writes the page of `PruneResult.report`."""
    if isinstance(original, nn.Module):
        original = trace(original, example_inputs, on_unsupported=on_unsupported)
    if not isinstance(original, Topology):
        raise LapTypeError(
            "{argument} to be a torch.nn.Module or its topology",
            type(original).__name__,
            argument="original",
        )
    _check_original(original, result.masks)
    title = type(original.model).__name__
    write(path, model_facts(original, result, {}, title=title))


def _check_original(topology: Topology, masks: Masks) -> None:
    """Raises unless the model has the layers of the masks, and weights that they prune."""
    pruned = alive = 0
    vectors = vector_shapes(topology)
    for name, mask in masks.items():
        layer = topology.layers.get(name)
        if vectors.get(name) == tuple(mask.shape):  # a bias, a norm or the like
            continue
        if layer is None or layer.shape != tuple(mask.shape):
            raise LapValueError(
                f"{{argument}} with a layer {name!r} of shape {list(mask.shape)}",
                "none" if layer is None else list(layer.shape),
                argument="original",
            )
        gone = layer.effective[~mask.to(layer.weight.device)]
        pruned, alive = pruned + gone.numel(), alive + int(gone.count_nonzero())
    if pruned and not alive:
        raise LapValueError(
            "{argument} with the weights before the pruning",
            "a model whose pruned weights are all zero",
            "Copy the model before you prune it, or report with apply=False.",
            argument="original",
        )


def model_facts(
    topology: Topology,
    result: Pruned,
    scores: Mapping[str, Tensor],
    *,
    title: str,
    options: Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], Any] | None = None,
) -> Facts:
    """Measures what a pruning of a module in memory does, while the module has all its weights.

    Args:
        topology: of the module.
        result: of `lap_ext.prune(..., apply=False)`, or one that is stored.
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
    masks, units = result.masks, result.units

    def weights(layer: Layer) -> LayerWeights:
        def chunks(_most: int) -> Iterator[Chunk]:  # all are in memory already
            yield layer.effective, masks[layer.name], scores.get(layer.name)

        size = layer.weight.element_size()
        return layer_weights(layer, size, 1, chunks, units=units.get(layer.name))

    facts = facts_of(title, result, options, topology, masks.structure)
    facts.bytes_before = facts.bytes_after = model_bytes(topology.model)
    layers = layers_of(topology, masks)
    step = Step(on_progress, _STEP, sum(layer.weight.nbytes for layer in layers))
    return gather(facts, map(weights, layers), step.read)


def layers_of(topology: Topology, masks: Iterable[str]) -> list[Layer]:
    """Lists the layers that have masks, without the biases, norms and the like that have some."""
    vectors = vector_shapes(topology)
    return [topology.layers[name] for name in masks if name not in vectors]


def model_bytes(model: nn.Module) -> int:
    """Counts the bytes of all parameters and buffers; tied ones count once."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def neighbors(edges: Iterable[Edge]) -> tuple[str, ...]:
    """Names the ends of edges, and how channels correspond where it is not one-to-one."""
    marks = {"coupled": "coupled with "}
    names = [f"{marks.get(edge.kind, '')}{edge.name}{edge.how}" for edge in edges]
    return tuple(dict.fromkeys(names))


def facts_of(
    title: str,
    result: Pruned,
    options: Mapping[str, str] | None,
    topology: Topology,
    structure: str | None = None,
) -> Facts:
    """Gathers what is known before a weight is measured."""
    return Facts(
        title,
        result.criterion,
        [],
        options or {},
        topology.others,
        topology.stops,
        version=__version__,
        torch=torch.__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        structure=structure,
        families=[(x.name, x.kept, x.total) for x in result.families],
        fixed=fixed_notes(result.fixed),
    )


def layer_weights(
    layer: Layer,
    itemsize: int,
    copies: int,
    chunks: Callable[[int], Iterator[Chunk]],
    scores: Histogram | None = None,
    units: tuple[int, int] | None = None,
) -> LayerWeights:
    """Describes a layer and how its weights are read."""
    facts = LayerFacts(
        layer.name,
        layer.kind,
        layer.shape,
        some(neighbors(layer.prev), MOST_NEIGHBORS),
        some(neighbors(layer.next), MOST_NEIGHBORS),
        scores=scores,
        units=units,
    )
    names = (edge.name for edge in layer.prev if edge.kind == "layer")
    facts.producers = tuple(dict.fromkeys(names))
    return LayerWeights(facts, layer.roles[0].part.shape, layer.groups, itemsize, copies, chunks)
