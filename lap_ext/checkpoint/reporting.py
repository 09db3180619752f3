# SPDX-License-Identifier: MIT
"""The facts of a report about a pruning of a checkpoint directory, in one pass over its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lap_ext.checkpoint.files import DTYPES, open_directory, size_of
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.checkpoint.structure import structure_of
from lap_ext.checkpoint.usage import loading
from lap_ext.errors import LapValueError, calling
from lap_ext.masks import BitMasks
from lap_ext.options import Inputs, OnUnsupported
from lap_ext.progress import Progress, Step
from lap_ext.pruning.reporting import Pruned, facts_of, layer_weights, layers_of
from lap_ext.report import Facts, Histogram
from lap_ext.report.gather import Chunk, LayerWeights, gather
from lap_ext.topology import Layer

_STEP = "measure"


class PrunedFiles(Pruned, Protocol):
    """What the facts need of a result on disk."""

    @property
    def directory(self) -> Path:
        """The pruned checkpoint."""

    @property
    def masks_file(self) -> Path | None:
        """Its masks, if they were saved."""

    @property
    def scores(self) -> Mapping[str, Histogram]:
        """Layer name -> its scores, as far as they were counted."""


@calling("checkpoint_facts")
def checkpoint_facts(
    directory: str | os.PathLike[str],
    result: PrunedFiles,
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
        result: of `checkpoint.prune`, with its masks saved, or one that is stored. Its scores, if
            they were counted, are in the report.
        options: option -> value, as the report shows them.
        example_inputs: as in `checkpoint.prune`.
        model: as in `checkpoint.prune`.
        on_unsupported: as in `checkpoint.prune`.
        on_progress: called with a `Progress` after each chunk of rows.

    Raises:
        ValueError: the masks were not saved; or as `checkpoint.prune`.
        TypeError, TopologyError: as `checkpoint.prune`.

    Example:
        >>> import tempfile, torch, lap_ext
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
            units = result.units.get(layer.name)
            return layer_weights(layer, item, len(copies), chunks, scores, units)

        name, how = os.fspath(directory), masks.structure
        facts = facts_of(name, result, options, structure.topology, how)
        facts.bytes_before, facts.bytes_after = before.size, after.size
        facts.load = loading(result.directory, structure.topology.model)
        layers = layers_of(structure.topology, masks.shapes)
        total = sum(size_of(structure.copies[layer.name][0]) for layer in layers)
        return gather(facts, map(weights, layers), Step(on_progress, _STEP, total).read)
