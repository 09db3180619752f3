# SPDX-License-Identifier: MIT
"""What a run works on, in short: a resumed run compares it with what the earlier one has noted.

    a file       name, stamp (inside.py), a hash of its header and of 64 blocks of 4 KB
    the network  a hash of all but the weights that scores depend on: roles, channels and the edges
                 between them with their scales, what leaves the network, and where each layer is
                 stored

Every part is the same in each process: no ids of objects, no order of sets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor

from lap_ext import structures
from lap_ext.checkpoint import inside
from lap_ext.checkpoint.files import Checkpoint
from lap_ext.checkpoint.inside import Stamp
from lap_ext.checkpoint.reading import bytes_of
from lap_ext.checkpoint.structure import Structure
from lap_ext.criteria import Criterion
from lap_ext.pruning.coupled import Units
from lap_ext.pruning.plan import Options
from lap_ext.structures import Groups
from lap_ext.topology import Layer
from lap_ext.topology.graph import Graph

# 256 KB and at most 64 seeks of a shard, whatever its size: under 1% of reading it once. Not seen:
# bytes between the blocks that change while size, both times, inode and device stay as they were,
# which takes a clock that is set back, or a disk that loses bits.
_BLOCKS, _BLOCK = 64, 4096
_DEEPEST = 20  # values in values


def files_of(checkpoint: Checkpoint) -> list[list[Any]]:
    """Lists [name, *stamp, hash] of each file that decides the result."""
    shards = {shard.name: shard for shard in checkpoint.shards}
    rows: list[list[Any]] = []
    for name, path in _paths(checkpoint):
        shard = shards.get(name)
        head, stamp = (0, None) if shard is None else (shard.head, shard.stamp)
        rows.append([name, *_stamped(path, head, stamp)])
    return rows


def file_of(path: Path) -> list[Any]:
    """Lists [path, *stamp, hash] of a file that decides the result and is in no checkpoint."""
    return [str(path.resolve()), *_stamped(path.resolve())]


def _stamped(path: Path, head: int = 0, stamp: Stamp | None = None) -> list[Any]:
    """Lists [*stamp, hash] of a file."""
    with inside.opened(path, stamp) as file:
        facts, digest = os.fstat(file.fileno()), hashlib.sha256()
        for begin, end in _ranges(facts.st_size, head):
            digest.update(os.pread(file.fileno(), end - begin, begin))
        return [*Stamp.of(facts), digest.hexdigest()]


def criterion_of(criterion: Criterion) -> list[str]:
    """Describes a criterion: its name, its values, and a hash of a user's code.

    Not seen: global variables that the code reads, and objects of other kinds.
    """
    digest = hashlib.sha256()
    values = {x.name: getattr(criterion, x.name) for x in fields(criterion)} | vars(criterion)
    _add(digest, values)
    for kind in type(criterion).__mro__:
        if not kind.__module__.startswith("lap_ext."):
            _add(digest, {name: x for name, x in vars(kind).items() if not name.startswith("__")})
    return [type(criterion).__qualname__, criterion.name, digest.hexdigest()]


def _add(digest: Any, x: Any, depth: int = 0) -> None:
    """Adds plain values, tensors, and functions by their code; no addresses."""
    if depth > _DEEPEST:  # an object that holds itself
        return
    digest.update(type(x).__qualname__.encode() + b"\0")
    if x is None or isinstance(x, bool | int | float | str | bytes):
        digest.update(repr(x).encode())
    elif isinstance(x, Tensor):
        digest.update(f"{x.dtype} {tuple(x.shape)}\0".encode())
        digest.update(bytes_of(x.detach().cpu().contiguous()))
    else:
        for inner in _parts(x):
            _add(digest, inner, depth + 1)


def _parts(x: Any) -> list[Any]:
    """Lists what decides a container or a function."""
    if isinstance(x, Mapping):
        return [y for item in sorted(x.items(), key=lambda item: str(item[0])) for y in item]
    if isinstance(x, frozenset | set):
        return sorted(map(repr, x))
    if isinstance(x, tuple | list):
        return list(x)
    if isinstance(x, CodeType):
        return [x.co_code, x.co_names, x.co_consts]
    if isinstance(x, FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        return [x.__code__, x.__defaults__, x.__kwdefaults__, cells]
    if isinstance(x, partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, property):
        return [x.fget]
    if isinstance(x, staticmethod | classmethod | MethodType):
        return [x.__func__]
    if callable(x) and isinstance(type(x).__call__, FunctionType):
        return [type(x).__call__, getattr(x, "__dict__", None)]
    return []


def check_same(checkpoint: Checkpoint, rows: list[list[Any]]) -> None:
    """Raises unless the files are those of which files_of has given the rows."""
    stamps = {name: Stamp(*stamp) for name, *stamp, _ in rows}
    now = {name: Stamp.of(path.stat()) for name, path in _paths(checkpoint)}
    for name in sorted(stamps.keys() | now.keys()):
        if stamps.get(name) != now.get(name):
            raise inside.changed(name)


def _paths(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """Gives the name and the real path of each file that decides the result and is there."""
    for name in [shard.name for shard in checkpoint.shards] + [checkpoint.index, "config.json"]:
        path = inside.real(checkpoint.path, name) if name else Path()
        if name and path.exists():
            yield name, path


def _ranges(size: int, head: int) -> Iterator[tuple[int, int]]:
    """Gives the bytes of a file that are hashed: its head, and blocks of the rest."""
    yield 0, head
    if size - head <= _BLOCKS * _BLOCK:
        yield head, size
        return
    for number in range(_BLOCKS):
        begin = head + (size - head - _BLOCK) * number // (_BLOCKS - 1)
        yield begin, begin + _BLOCK


def network_of(structure: Structure) -> str:
    """Hashes what decides the scores beside the weights."""
    digest, topology = _Digest(), structure.topology
    for layer in topology.layers.values():
        stored = [
            (x.entry.name, x.entry.shard, x.entry.dtype, x.begin)
            for copy in structure.copies[layer.name]
            for x in copy
        ]
        digest.add(layer.name, layer.parameter, layer.kind, layer.shape, stored)
    _add_graph(digest, topology.graph, topology.tensors())
    return digest.hexdigest()


def structure_of(
    structure: structures.Structure | None, layers: Iterable[Layer]
) -> list[str] | None:
    """Describes what is removed together; hashes the groups that the user gives."""
    if structure is None:
        return None
    digest = _Digest()
    if isinstance(structure, Groups):
        for layer in layers:
            digest.add(layer.name, structure.numbers(layer.name, layer.shape))
    return [structure.spelled, digest.hexdigest()]


def units_of(units: Units, options: Options) -> list[Any]:
    """Describes what units across layers are, how many go, and what ranks them; hashes them."""
    digest, groups, sparsity = _Digest(), units.groups, units.sparsity
    for x in groups.weights:
        digest.add("weight", x.parameter, x.shape, x.groups, x.transposed, x.rows, x.cols)
    for vector in groups.vectors:
        digest.add("vector", vector.name, vector.shape, vector.zeroed, vector.entries)
    for family in groups.families:
        digest.add("family", family.name, family.layers, family.groups, family.classes)
    given: Any = str(sparsity)
    if isinstance(sparsity, Mapping):
        given = {name: str(x) for name, x in sparsity.items()}
    ranked = [options.cost, options.uniform, repr(options.min_keep)]
    return [digest.hexdigest(), given, *ranked]


def _add_graph(digest: _Digest, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
    """Adds the channels, what connects them, and the values of scales."""
    known: dict[int, Any] = {}
    for group in graph.channels.groups:
        digest.add("group", group.first, group.size, group.kind, group.name)
        for edges in group.edges:
            scale = edges.scale
            digest.add("edges", edges.child, edges.parent, edges.weight, edges.entry)
            if scale is not None:
                digest.add(scale.kind, scale.value(tensors, known))
    for role in graph.roles:
        digest.add("role", role.layer, role.parameter, role.kind, role.part)
        digest.add(*role.inputs, role.out.first, role.out.size)
    for left, right in graph.couplings:
        digest.add("coupled", left, right)
    for ids, name in graph.ends:
        digest.add("end", ids, name)


class _Digest:
    """A hash of numbers, texts, dataclasses of them, and tensors."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *values: Any) -> None:
        """Adds values; each is told from its neighbors."""
        for value in values:
            if isinstance(value, Tensor):
                whole = value.detach().cpu().contiguous()
                self._hash.update(f"{whole.dtype} {tuple(whole.shape)}\0".encode())
                self._hash.update(bytes_of(whole))
            else:
                self._hash.update(f"{value!r}\0".encode())

    def hexdigest(self) -> str:
        """Returns the hash so far."""
        return self._hash.hexdigest()
