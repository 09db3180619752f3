# SPDX-License-Identifier: MIT
"""Weights in files as a place, without a trace: one tensor per layer, or one per slice of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import save_file

from lap_ext.checkpoint.files import Entry, Slice, open_directory
from lap_ext.checkpoint.memory import parsed
from lap_ext.checkpoint.plan import plan_of
from lap_ext.checkpoint.state import working
from lap_ext.checkpoint.structure import Structure
from lap_ext.checkpoint.weights import Files
from lap_ext.places import readable
from lap_ext.places.place import row_length
from lap_ext.pruning.plan import options_of
from lap_ext.structures import StructureLike
from lap_ext.topology import Topology
from tests.helpers.cut_place import Cuts


@contextmanager
def files_of(
    topology: Topology,
    directory: Path,
    memory: int | str = "4GB",
    slices: Cuts = lambda _: [0],
    criterion: str = "lookahead",
    structure: StructureLike | None = None,
) -> Iterator[Files]:
    """Writes the layers of a model in memory, stored in slices of rows, and opens their place."""
    source = directory / "weights"
    copies: dict[str, list[tuple[str, int]]] = {}
    tensors = {}
    for name, layer in topology.layers.items():
        flat, length = readable(layer).contiguous().flatten(), row_length(layer)
        begins = sorted(
            {0, *(row * length for row in slices(layer) if 0 < row * length < len(flat))}
        )
        for begin, end in zip(begins, [*begins[1:], len(flat)], strict=True):
            tensors[f"{name}.{begin}"] = flat[begin:end].clone()
            copies.setdefault(name, []).append((f"{name}.{begin}", begin))
    if not source.exists():
        source.mkdir()
        save_file(tensors, source / "model.safetensors")
    opened = open_directory(source)
    entries: dict[str, Entry] = opened.entries
    stored = {
        name: [tuple(Slice(entries[x], begin) for x, begin in parts)]
        for name, parts in copies.items()
    }
    network = Structure(topology, stored, stored.__getitem__)
    options = options_of(criterion, layers="*", structure=structure)
    _, place = plan_of(network, opened, options, parsed(memory))
    shapes = {name: layer.shape for name, layer in topology.layers.items()}
    with working(directory / "out", {}, False) as work:
        place.use(work, shapes)
        try:
            yield place
        finally:
            place.close()


def least_memory(
    topology: Topology, directory: Path, slices: Cuts, structure: StructureLike | None = None
) -> int:
    """Reads the smallest budget from the error of one that is too small."""
    with pytest.raises(ValueError, match=r"memory of [\d,]+ bytes or more") as caught:
        with files_of(topology, directory, 1, slices, structure=structure):
            pass
    match = re.search(r"memory of ([\d,]+) bytes", str(caught.value))
    assert match
    return int(match[1].replace(",", ""))
