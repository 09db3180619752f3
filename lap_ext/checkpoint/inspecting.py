# SPDX-License-Identifier: MIT
"""Lists the layers of a checkpoint directory, with their neighbors, sizes and zeros (`inspect`)."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lap_ext._text import columns, fitted, html_table, in_html, visible
from lap_ext.checkpoint.files import Checkpoint, open_directory, size_of
from lap_ext.checkpoint.reading import Buffer, Source, zeros
from lap_ext.checkpoint.structure import structure_of
from lap_ext.errors import LapValueError, calling
from lap_ext.masks import BitMasks
from lap_ext.options import Inputs, OnUnsupported
from lap_ext.progress import Progress, Step
from lap_ext.pruning.reporting import MOST_NEIGHBORS, model_bytes, neighbors
from lap_ext.topology import Layer, Topology

_STEP = "count zeros"
_NUMBERS = (3, 4)  # columns of numbers
_NAMES = (0, 5, 6)  # columns that may become narrower


@dataclass(frozen=True)
class InspectedLayer:
    """A layer and its neighbors.

    Attributes:
        name, kind, shape: those of the layer.
        dtype: the dtype of the weight in the model, for example "float32".
        weights: the number of weights.
        zeros: the number of weights that are zero (+0.0 or -0.0).
        fed_by: the layers whose outputs this layer reads, and how their channels correspond where
            that is not one-to-one.
        read_by: the layers that read the outputs of this layer, in the same way.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    zeros: int
    fed_by: tuple[str, ...]
    read_by: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """The fraction of the layer's weights that is zero."""
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "weights": self.weights,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "fed_by": list(self.fed_by),
            "read_by": list(self.read_by),
        }


@dataclass(frozen=True)
class Inspection:
    """The layers of a model; print it for a table.

    Attributes:
        topology: how the layers are connected.
        layers: one row per layer, in the order of the network.
        bytes: the size of the files with the weights; for a module, that of its parameters and
            buffers.
        structure: what was removed together, as the masks beside the weights say; None for single
            weights, and without masks.
    """

    topology: Topology
    layers: Sequence[InspectedLayer]
    bytes: int
    structure: str | None = None

    @property
    def weights(self) -> int:
        """The number of weights in all layers."""
        return sum(row.weights for row in self.layers)

    @property
    def zeros(self) -> int:
        """The number of weights in all layers that are zero."""
        return sum(row.zeros for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON."""
        return {
            "bytes": self.bytes,
            "structure": self.structure,
            "weights": self.weights,
            "zeros": self.zeros,
            "layers": [row.to_dict() for row in self.layers],
            "others": list(self.topology.others),
            "stops": list(self.topology.stops),
        }

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int | None = None, most: int = MOST_NEIGHBORS) -> str:
        """Makes the table.

        Args:
            width: letters of a line, in which long names lose their middle and lists are wrapped;
                None leaves the lines as long as they are.
            most: how many neighbors of a layer are named; the others are counted.
        """
        rows, notes = self._rows(most), self._notes()
        if width is not None:
            rows = fitted(rows, _NAMES, width)
            notes = [line for note in notes for line in textwrap.wrap(note, max(width, 20))]
        return "\n".join([columns(rows, right=_NUMBERS), *notes])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{in_html(note)}</p>" for note in self._notes())
        return html_table(self._rows(MOST_NEIGHBORS), right=_NUMBERS) + notes

    def _rows(self, most: int) -> list[Sequence[str]]:
        """Makes the rows: a head, a row a layer, the sums."""
        rows: list[Sequence[str]] = [
            ("layer", "kind", "shape", "weights", "zeros", "fed by", "read by")
        ]
        for row in self.layers:
            shape = "x".join(map(str, row.shape))
            counts = f"{row.weights:,}", f"{row.sparsity:.2%}"
            names = _first(row.fed_by, most), _first(row.read_by, most)
            rows.append((row.name, row.kind, shape, *counts, *names))
        share = self.zeros / max(1, self.weights)
        rows.append(("all", "", "", f"{self.weights:,}", f"{share:.2%}", "", ""))
        return rows

    def _notes(self) -> list[str]:
        """Lists what the table leaves out."""
        notes = []
        if self.topology.others:
            notes.append(f"no layers, never pruned: {', '.join(self.topology.others)}")
        notes += [f"stopped at: {text}" for text in self.topology.stops]
        notes += [] if self.structure is None else [f"pruned with structure {self.structure}"]
        return [*map(visible, notes), f"{self.bytes:,} bytes"]


@calling("checkpoint.inspect")
def inspect(
    directory: str | os.PathLike[str],
    *,
    example_inputs: Inputs | None = None,
    model: nn.Module | None = None,
    on_unsupported: OnUnsupported = "raise",
    on_progress: Callable[[Progress], Any] | None = None,
) -> Inspection:
    """Traces a checkpoint that may be larger than memory and counts the zeros in its layers.

    Args:
        directory: as in `checkpoint.prune`; a single file does not say how its weights are
            connected.
        example_inputs: as in `checkpoint.prune`.
        model: as in `checkpoint.prune`.
        on_unsupported: as in `lap_ext.trace`.
        on_progress: called with a `Progress` after each tensor.

    Returns:
        An `Inspection` with `.topology`, `.layers` and `.bytes`; print it for a table.

    Raises:
        ValueError, TypeError, TopologyError: as in `checkpoint.prune`.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> net[0].weight.data = torch.tensor([[0., 1.], [2., 0.]])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_file(net.state_dict(), Path(directory) / "model.safetensors")
        ...     result = inspect(directory, model=net, example_inputs=torch.ones(1, 2))
        >>> [(row.name, row.weights, row.zeros, row.fed_by, row.read_by) for row in result.layers]
        [('0', 4, 2, ('input',), ('2',)), ('2', 2, 0, ('0',), ('output',))]
    """
    files = open_directory(Path(directory))
    structure = structure_of(files, model, example_inputs, on_unsupported)
    first = {name: copies[0] for name, copies in structure.copies.items()}
    step = Step(on_progress, _STEP, sum(map(size_of, first.values())))
    source, buffer = Source(files), Buffer()

    def count(layer: Layer) -> int:
        total = 0
        for stored in first[layer.name]:
            total += zeros(source, stored.entry, buffer)
            step.read(layer.name, stored.entry.size)
        return total

    return _inspected(structure.topology, count, files.size, _structure(files))


def inspect_model(
    topology: Topology, on_progress: Callable[[Progress], Any] | None = None
) -> Inspection:
    """Counts the zeros in the layers of a traced module.

    Example:
        >>> import torch, lap_ext
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> _ = net[0].weight.data.fill_(0)
        >>> print(inspect_model(lap_ext.trace(net, torch.ones(1, 2))))
        layer  kind    shape  weights    zeros  fed by  read by
        -----  ------  -----  -------  -------  ------  -------
        0      linear  1x2          2  100.00%  input   output
        all                         2  100.00%
        12 bytes
    """
    step = Step(on_progress, _STEP, sum(x.weight.nbytes for x in topology.layers.values()))

    def count(layer: Layer) -> int:
        total = layer.weight.numel() - int(layer.effective.count_nonzero())
        step.read(layer.name, layer.weight.nbytes)
        return total

    return _inspected(topology, count, model_bytes(topology.model))


def _first(names: Sequence[str], most: int) -> str:
    """Enumerates the first names, and counts the others as one more item."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _structure(files: Checkpoint) -> str | None:
    """Reads the structure of the masks beside the weights, unless they are damaged."""
    if files.masks is not None:
        with suppress(LapValueError), BitMasks(files.masks) as masks:
            return masks.structure
    return None


def _inspected(
    topology: Topology,
    count: Callable[[Layer], int],
    size: int,
    structure: str | None = None,
) -> Inspection:
    rows = [
        InspectedLayer(
            layer.name,
            layer.kind,
            layer.shape,
            str(layer.weight.dtype).removeprefix("torch."),
            layer.weight.numel(),
            count(layer),
            neighbors(layer.prev),
            neighbors(layer.next),
        )
        for layer in topology.layers.values()
    ]
    return Inspection(topology, rows, size, structure)
