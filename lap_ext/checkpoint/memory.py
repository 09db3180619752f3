# SPDX-License-Identifier: MIT
"""How much of a layer fits into a memory budget at a time.

The budget covers everything that pruning itself allocates: buffers, the temporary memory of
operators, masks, squared norms and norms of all channels, samples, candidates of a ranking. It does
not cover the interpreter, the libraries and the traced model, which are loaded before any weight;
nor what has the same size for any checkpoint, about 4 MB (histograms, Python objects); nor blocks
that are freed and that the C library keeps, some tens of MB in glibc before 2.38.

    full    a full layer: its bytes, its mask (n bytes); if the next one is read ahead, that one's
            bytes; if the one before is written back in the background, its bytes and its mask
    chunk   rows of a layer: their bytes, scores, and float64 intermediate results
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lap_ext._files import parsed_size
from lap_ext.checkpoint.files import DTYPES, Copy
from lap_ext.criteria import Criterion
from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.ops.reference.common import score_dtype
from lap_ext.ops.reference.norms import SEGMENT_ROWS
from lap_ext.options import BatchNorm, Normalize
from lap_ext.places.place import row_length
from lap_ext.topology import Layer, Topology
from lap_ext.topology.coupling import CoupledGroups

_CHUNK = 1 << 18  # weights of a chunk, if they fit: its scores stay in the cache
_SCRATCH = 48  # bytes per weight of a chunk beside itself: float64 sums over roles, keys, a mask
_KEY, _SAMPLED = 24, 64  # bytes per candidate of a ranking, per weight of a sample
_SUMS = 24  # bytes per column of a layer whose squared norms are taken in chunks
_CHANNEL = 40  # bytes per channel in the two passes over the channel graph
_LINE, _UNIT = 16, 64  # bytes per row or column that units have, and per unit
# bytes per score that normalizing needs beside it, all of a layer at once
_NORMALIZING: dict[Normalize, int] = {"none": 0, "norm": 16, "lamp": 64}
_SHARE = 8  # candidates and samples get 1/8 of the budget each


@dataclass(frozen=True)
class Limits:
    """What may be in memory at a time."""

    chunk: dict[str, int]  # layer name -> weights of a chunk, a multiple of the rows together
    rest: int  # bytes for full layers; the other half: a chunk, candidates, samples
    candidates: int  # keys that a ranking may hold
    sample: int  # weights of a sample


def parsed(memory: int | str) -> int:
    """Converts "4GB" (units of 10^9), "512MiB" (units of 2^20) or a number to bytes.

    Example:
        >>> parsed("4GB"), parsed("1.5 MiB"), parsed(1000)
        (4000000000, 1572864, 1000)
    """
    if isinstance(memory, int) and not isinstance(memory, bool):
        count = memory
    elif isinstance(memory, str):
        size = parsed_size(memory)
        if size is None:
            raise LapValueError(
                '{argument} such as "4GB", "512MiB" or a number of bytes',
                repr(memory),
                argument="memory",
            )
        count = size
    else:
        kind = type(memory).__name__
        raise LapTypeError("{argument} to be a string or a number", kind, argument="memory")
    if count <= 0:
        raise LapValueError("{argument} > 0", repr(memory), argument="memory")
    return count


def limits(
    memory: int,
    topology: Topology,
    copies: Mapping[str, list[Copy]],
    criterion: Criterion,
    batch_norm: BatchNorm,
    held: int = 0,
    together: Mapping[str, int] | None = None,
    sums: int = 0,
) -> Limits:
    """Computes the limits of a budget, of which scores that the caller holds take some bytes.

    Args:
        memory: the budget.
        topology: of the model.
        copies: layer name -> where it is stored.
        criterion: scores the weights.
        batch_norm: as in `lap_ext.prune`.
        held: bytes of scores that the caller holds.
        together: layer name -> how many rows, from a multiple of that on, a chunk must not part.
        sums: bytes that units across layers need.

    Raises:
        LapValueError: it is too small for such rows of the layer with the longest ones.
    """
    channels = sum(sum(role.part.channels) for role in topology.roles)
    left = memory - held - sums - _CHANNEL * topology.graph.channels.size - 4 * 8 * channels
    layers = topology.layers.values()
    if criterion.reads_norms:
        left -= max((_segments(x, copies[x.name], batch_norm) for x in layers), default=0)
    rows = {x.name: row_length(x) * (together or {}).get(x.name, 1) for x in layers}
    needed = {x.name: rows[x.name] * (_SCRATCH + _itemsize(copies[x.name])) for x in layers}
    if needed and 2 * max(needed.values()) > left:
        name = max(needed, key=lambda x: needed[x])
        least = memory - left + 2 * needed[name]
        scores = f"{held:,} bytes of scores of two layers, " if held else ""
        scores += f"{sums:,} bytes of sums over units, " if sums else ""
        raise LapValueError(
            f"{{argument}} of {least:,} bytes or more ({scores}a row of layer {name!r} and the "
            "norms of all channels must fit)",
            f"{memory:,}",
            argument="memory",
        )
    chunk = {}
    for x in layers:
        width = rows[x.name]
        fitting = min(_CHUNK, left // 4 // (_SCRATCH + _itemsize(copies[x.name])))
        chunk[x.name] = max(1, fitting // width) * width
    return Limits(chunk, left // 2, left // _SHARE // _KEY, left // _SHARE // _SAMPLED)


def _segments(layer: Layer, copies: list[Copy], batch_norm: BatchNorm) -> int:
    """Counts the bytes of sums over columns, and of the rows that wait to be added to them."""
    held = SEGMENT_ROWS * (8 if batch_norm == "fold" else _itemsize(copies))
    widths = ((x.part.groups, torch.Size(x.part.block[1:]).numel()) for x in layer.roles)
    return sum((held + _SUMS * groups) * width for groups, width in widths)


def held_by_scores(
    layers: Sequence[Layer], copies: Mapping[str, list[Copy]], normalize: Normalize
) -> int:
    """Counts the bytes of one layer's scores, and of those before it, which the caller still holds.

    The largest sum of any two layers in a row.
    """
    most = before = 0
    for layer in layers:
        score = score_dtype(DTYPES[copies[layer.name][0][0].entry.dtype]).itemsize
        most = max(most, before + math.prod(layer.shape) * (score + _NORMALIZING[normalize]))
        before = math.prod(layer.shape) * (score if normalize == "none" else torch.float64.itemsize)
    return most


def held_by_units(groups: CoupledGroups) -> int:
    """Counts the bytes that ranking units across layers needs: sums of rows, columns and units."""
    lines = sum(x.rows.numel() + x.cols.numel() for x in groups.weights)
    return _LINE * lines + _UNIT * len(groups)


def _itemsize(copies: list[Copy]) -> int:
    return DTYPES[copies[0][0].entry.dtype].itemsize
