# SPDX-License-Identifier: MIT
"""What fits into a budget: how much of a layer is in memory at a time.

Counted: everything that pruning allocates itself: buffers, what operators need beside them, masks,
energies and factors of all channels, samples, candidates of a ranking. Not counted: the interpreter,
the libraries and the traced model, which are there before the first weight is read.

    whole   a layer in one piece: its bytes, its mask (n bytes); read ahead: the next one's bytes too;
            written behind: and the bytes and mask of the one before
    run     rows of a layer: bytes, scores, and float64 numbers on the way to them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lap_ext._files import parsed_size
from lap_ext.checkpoint.files import DTYPES, FUNCTION, Copy, wrong
from lap_ext.checkpoint.layer_scores import row_length
from lap_ext.criteria import Criterion, Random
from lap_ext.ops import native
from lap_ext.topology import Layer, Topology

_RUN = 1 << 18  # weights of a run, if they fit: its scores stay in the cache
_SCRATCH = 48  # bytes a weight of a run beside itself: float64 sums over roles, keys, a mask
_FALLBACK = 16  # bytes a weight that pure PyTorch needs for the mask of a whole layer
_FOLDED = 16  # the same for norms of weights times their batch norm, in float64
_KEY, _SAMPLED = 24, 64  # bytes for a candidate of a ranking, for a weight of a sample
_SORTED = 48  # bytes for a score that is sorted: itself, the sorted one, its place, merging, slack
_CHANNEL = 40  # bytes for a channel in the two sweeps
_SHARE = 8  # candidates and samples get one part in so many, each


@dataclass(frozen=True)
class Limits:
    """What may be in memory at a time."""

    run: dict[str, int]  # layer name -> weights of a run: whole rows
    measured_whole: frozenset[str]  # layers whose energies are taken in one piece
    masked_whole: frozenset[str]  # layers that the fused mask takes
    ahead: bool  # whether the next layer is read while one is worked on
    behind: bool  # and the one before is written
    room: int  # candidates of a ranking
    sample: int  # weights of a sample
    sorted: int  # scores that are sorted at a time


def parsed(memory: int | str) -> int:
    """Bytes of "4GB" (10^9), "512MiB" (2^20) or a number.

    Example:
        >>> parsed("4GB"), parsed("1.5 MiB"), parsed(1000)
        (4000000000, 1572864, 1000)
    """
    if isinstance(memory, int) and not isinstance(memory, bool):
        count = memory
    elif isinstance(memory, str):
        found = parsed_size(memory)
        if found is None:
            raise wrong('memory such as "4GB", "512MiB" or a number of bytes', repr(memory))
        count = found
    else:
        kind = type(memory).__name__
        raise TypeError(f"{FUNCTION}: expected memory to be a string or a number, got {kind}.")
    if count <= 0:
        raise wrong("memory > 0", repr(memory))
    return count


def limits(
    memory: int, topology: Topology, copies: Mapping[str, list[Copy]], criterion: Criterion, bn: str
) -> Limits:
    """The limits of a budget; ValueError where it is too small for anything."""
    channels = sum(sum(role.part.channels) for role in topology.roles)
    left = memory - _CHANNEL * topology.graph.channels.size - 4 * 8 * channels
    layers = topology.layers.values()
    needed = {x.name: row_length(x) * (_SCRATCH + _itemsize(copies[x.name])) for x in layers}
    if isinstance(criterion, Random):  # scores all weights of a layer at once
        needed = {x.name: needed[x.name] + 8 * _count(x) for x in layers}
    if needed and 2 * max(needed.values()) > left:
        name = max(needed, key=lambda x: needed[x])
        least = memory - left + 2 * needed[name]
        raise wrong(
            f"memory of {least:,} bytes or more (a row of layer {name!r} and the factors of all "
            "channels must fit)",
            f"{memory:,}",
        )
    run = {}
    for x in layers:
        width = row_length(x)
        fitting = min(_RUN, left // 4 // (_SCRATCH + _itemsize(copies[x.name])))
        run[x.name] = max(1, fitting // width) * width
    rest = left // 2  # for whole layers; the other half: a run, candidates, samples
    sizes = {x.name: _count(x) * _itemsize(copies[x.name]) for x in layers}
    folded = _FOLDED if bn == "fold" else 0
    measured = {x.name: sizes[x.name] + folded * _count(x) for x in layers}
    beside = 1 + (0 if native.info().native else _FALLBACK) + 8 * isinstance(criterion, Random)
    masked = {x.name: sizes[x.name] + beside * _count(x) for x in layers}
    fits_measured = {name for name, need in measured.items() if need <= rest}
    fits_masked = {name for name, need in masked.items() if need <= rest}
    ahead = _largest(sizes, fits_measured) + _largest(measured, fits_measured) <= rest
    writing = _largest(sizes, fits_masked) + _largest(masked, fits_masked)
    before = _largest({x.name: sizes[x.name] + _count(x) for x in layers}, fits_masked)
    return Limits(
        run,
        frozenset(fits_measured),
        frozenset(fits_masked),
        ahead and writing <= rest,
        ahead and writing + before <= rest,
        left // _SHARE // _KEY,
        left // _SHARE // _SAMPLED,
        max(1, rest // _SORTED),
    )


def _largest(needs: dict[str, int], fits: set[str]) -> int:
    return max((needs[name] for name in fits), default=0)


def _count(layer: Layer) -> int:
    count = 1
    for size in layer.shape:
        count *= size
    return count


def _itemsize(copies: list[Copy]) -> int:
    return DTYPES[copies[0][0].entry.dtype].itemsize
