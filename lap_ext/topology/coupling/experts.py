# SPDX-License-Identifier: MIT
"""Finds the experts of mixtures: all weights of an expert, and its row of the router.

packed       parameters [experts, ...] of one module, as transformers has them
module list  modules of the same structure in a list, which are used for tokens that data picks
router       the layer with an output for each expert whose outputs a top-k chooses from
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn

from lap_ext.topology.coupling.assign import assigned, vectors_of
from lap_ext.topology.coupling.axes import axes_of
from lap_ext.topology.coupling.groups import (
    Assigned,
    AssignedVector,
    CoupledGroups,
    Family,
    Fixed,
)
from lap_ext.topology.coupling.subject import Subject
from lap_ext.topology.graph import Graph
from lap_ext.topology.roles import Role

_NO_EXPERT = "it belongs to no expert"
_NO_ROUTER = "no top-k chooses among its experts"


@dataclass(frozen=True)
class _Experts:
    """The experts of one module: each parameter of an expert, and how it is cut."""

    path: str
    count: int
    packed: tuple[str, ...]  # parameters [experts, ...]
    listed: tuple[tuple[str, ...], ...]  # parameters of each expert of a module list


def experts_of(subject: Subject) -> CoupledGroups:
    """Finds the experts of a model."""
    graph, shapes = subject.graph, subject.shapes
    routers = list(_routers(graph))
    ids = torch.full((graph.channels.size,), -1)
    families: list[Family] = []
    found: dict[str, Tensor] = {}  # parameter -> the group of each entry of its first dimension
    alone: dict[str, str] = {}  # layer -> why its experts are no groups
    count = 0
    layer_of = {parameter: name for name, (parameter, _) in subject.layers.items()}
    for experts in _mixtures(subject):
        layers = [layer_of[x] for x in _all(experts) if x in layer_of]
        router = _nearest(routers, experts)
        if router is None:
            alone |= dict.fromkeys(layers if experts.packed else (), _NO_ROUTER)
            continue
        numbers = torch.arange(count, count + experts.count)
        count += experts.count
        for name in experts.packed:
            found[name] = numbers
        for number, names in zip(numbers.tolist(), experts.listed, strict=False):
            for name in names:
                found[name] = torch.full((shapes[name][0] if shapes[name] else 1,), number)
        ids[router.out.ids] = numbers
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        classes = torch.zeros_like(numbers)
        families.append(Family(f"{layers[0]}{more}", tuple(layers), numbers, classes))
    return _made(subject, families, found, ids, alone)


def _made(
    subject: Subject,
    families: Sequence[Family],
    found: dict[str, Tensor],
    ids: Tensor,
    alone: dict[str, str],
) -> CoupledGroups:
    weights, fixed = [], []
    shapes = {parameter: subject.shapes[parameter] for parameter, _ in subject.layers.values()}
    for x in axes_of(subject.graph):
        if x.parameter in found:
            rows = _spread(found[x.parameter], x.shape[0])
            cols = torch.full((x.groups, x.shape[1]), -1)
            own = Assigned(x.layer, x.parameter, x.shape, x.groups, rows, cols, x.transposed)
        else:
            own = assigned(x, ids)
            outputs = x.sizes[1] if x.transposed else x.sizes[0]
            left = outputs - int((own.cols if x.transposed else own.rows).ge(0).count_nonzero())
            if left:
                fixed.append(Fixed(x.layer, left, alone.get(x.layer, _NO_EXPERT)))
        weights.append(own)
    vectors = vectors_of(subject, ids)
    for name, numbers in found.items():
        if name not in shapes:
            shape = subject.shapes[name]
            entries = _spread(numbers, torch.Size(shape).numel())
            vectors = [x for x in vectors if x.name != name]
            vectors.append(AssignedVector(name, shape, entries, True, False))
    return CoupledGroups("expert", families, fixed, weights, vectors, shapes)


def _spread(numbers: Tensor, size: int) -> Tensor:
    """Repeats the group of each entry of a first dimension for all rows in it."""
    return numbers.repeat_interleave(size // max(1, numbers.numel()))


def _all(experts: _Experts) -> Iterator[str]:
    yield from experts.packed
    for names in experts.listed:
        yield from names


def _routers(graph: Graph) -> Iterator[Role]:
    """Finds the roles whose outputs a top-k chooses from."""
    roles = {role.out.first: role for role in graph.roles}
    for choice in graph.facts.choices:
        seen, queue = set[int](), torch.unique(graph.channels.group_index(choice)).tolist()
        while queue:
            index = queue.pop()
            if index < 0 or index in seen:
                continue
            seen.add(index)
            group = graph.channels.groups[index]
            role = roles.get(group.first)
            if role is not None and group.kind == "role":
                yield role
                continue
            for edges in group.edges:
                queue += torch.unique(graph.channels.group_index(edges.parent)).tolist()


def _mixtures(subject: Subject) -> Iterator[_Experts]:
    """Finds the modules that hold experts, in the network's order."""
    packed: dict[str, int] = {}
    for role in subject.graph.roles:
        shape = subject.shapes[role.parameter]
        if len(shape) == 3 and role.kind == "linear" and role.part.groups == shape[0] > 1:
            packed[role.parameter.rpartition(".")[0]] = shape[0]
    for path, count in packed.items():
        owned = subject.model.get_submodule(path).named_parameters(prefix=path, recurse=False)
        names = tuple(name for name, x in owned if x.dim() and x.shape[0] == count)
        yield _Experts(path, count, names, ())
    known = {parameter for parameter, _ in subject.layers.values()}
    for path, module in subject.model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        each = [_parameters(path, index, x) for index, x in enumerate(module)]
        kinds = {
            tuple((n.partition(".")[2], x.shape) for n, x in m.named_parameters()) for m in module
        }
        if len(kinds) == 1 and all(any(name in known for name in names) for names in each):
            yield _Experts(path, len(each), (), tuple(each))


def _parameters(path: str, index: int, module: nn.Module) -> tuple[str, ...]:
    start = f"{path}.{index}" if path else str(index)
    return tuple(name for name, _ in module.named_parameters(prefix=start))


def _nearest(routers: Sequence[Role], experts: _Experts) -> Role | None:
    """Returns the router with an output for each expert in the module around the experts."""
    around = experts.path.rpartition(".")[0]
    fitting = [x for x in routers if x.out.size == experts.count]
    own = [x for x in fitting if _within(x.parameter, around)]
    own = [x for x in own if not _within(x.parameter, experts.path)]
    if not own:
        return None
    return max(own, key=lambda x: _shared(x.parameter, experts.path))


def _shared(a: str, b: str) -> int:
    """Counts the modules that two paths have in common."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _within(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")
