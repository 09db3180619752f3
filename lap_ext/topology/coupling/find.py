# SPDX-License-Identifier: MIT
"""Makes the groups of a structure from what the channels of a graph allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lap_ext.topology.coupling.assign import assigned, vectors_of
from lap_ext.topology.coupling.axes import Axes
from lap_ext.topology.coupling.coupled import Coupling, coupling_of
from lap_ext.topology.coupling.experts import experts_of
from lap_ext.topology.coupling.groups import CoupledGroups, Family, Fixed
from lap_ext.topology.coupling.subject import Subject

_NOT_READ = "nothing reads it"
_NOT_HEAD = "it is in no head of an attention"
_NOT_INNER = "it is no inner channel of a feed-forward block"
_SHARED_KV = "all heads share one head of keys and values"


def groups_of(subject: Subject, structure: str) -> CoupledGroups:
    """Finds the groups of a structure: "channel", "head", "expert" or "unit"."""
    if structure == "expert":
        return experts_of(subject)
    graph = subject.graph
    heads = graph.facts.heads if structure == "head" else ()
    coupling = coupling_of(graph, [x.ids for x in heads], balance=structure != "head")
    why = _reasons(subject, coupling, structure)
    return _made(subject, coupling, structure, why)


def _reasons(subject: Subject, coupling: Coupling, structure: str) -> Mapping[int, str]:
    """Says of each component that a layer makes why it is no group; empty where it is one."""
    graph, label = subject.graph, coupling.label
    made, read = _sides(coupling)
    coupled = torch.cat(
        [torch.zeros(0, dtype=torch.int64), *(x for p in graph.couplings for x in p)]
    )
    in_attention = torch.cat(
        [torch.zeros(0, dtype=torch.int64)] + [x.ids.flatten() for x in graph.facts.heads]
    )
    attended = set(torch.unique(label[in_attention[in_attention != 0]]).tolist())
    contracted = set(torch.unique(label[coupled]).tolist())
    shared = {
        int(label[x.values[0].amax()])
        for x in graph.facts.heads
        if x.ids.shape[0] > 1 and _same_rows(x.values) and not _same_rows(x.ids)
    }
    result = {}
    for own, layers in made.items():
        why = coupling.why(own)
        if not why and own not in read and own not in contracted:
            why = _NOT_READ
        if not why and structure == "head":
            why = "" if own in attended else _NOT_HEAD
            why = _SHARED_KV if own in shared else why
        if not why and structure == "unit":
            linear = {kind for x in (*layers, *read.get(own, ())) for kind in x.kinds} == {"linear"}
            few = len({x.parameter for x in layers}) <= 2 and len(read.get(own, ())) == 1
            why = "" if linear and few and own not in attended else _NOT_INNER
        result[own] = why
    return result


def _same_rows(rows: Tensor) -> bool:
    return bool((rows == rows[:1]).all())


def _sides(coupling: Coupling) -> tuple[dict[int, list[Axes]], dict[int, list[Axes]]]:
    """Lists the weights that make, and those that read, the channels of each component."""
    made: dict[int, list[Axes]] = {}
    read: dict[int, list[Axes]] = {}
    for x in coupling.axes:
        for side, known in ((x.made, made), (x.read, read)):
            for own in torch.unique(coupling.label[side[1]]).tolist():
                known.setdefault(own, []).append(x)
    return made, read


def _made(
    subject: Subject, coupling: Coupling, structure: str, why: Mapping[int, str]
) -> CoupledGroups:
    order = {name: n for n, name in enumerate(subject.layers)}
    producers: dict[int, set[str]] = {}
    for x in coupling.axes:
        for own in torch.unique(coupling.label[x.made[1]]).tolist():
            producers.setdefault(own, set()).add(x.layer)
    members: dict[tuple[object, ...], list[int]] = {}
    for own in sorted(why):
        if not why[own]:
            domain = coupling.classes.get(own)
            key = ("d", domain[0]) if domain else (*sorted(producers[own], key=order.__getitem__),)
            members.setdefault(key, []).append(own)
    number = torch.full((subject.graph.channels.size,), -1)
    families: list[Family] = []
    count = 0
    ranked = sorted(members.values(), key=lambda own: (_first(own, producers, order), own))
    for own in ranked:
        labels = torch.tensor(own)
        numbers = torch.arange(count, count + len(own))
        number[labels] = numbers
        count += len(own)
        layers = sorted({x for label in own for x in producers[label]}, key=order.__getitem__)
        classes = torch.tensor([coupling.classes.get(label, (0, 0))[1] for label in own])
        name = _named(layers)
        same = sum(x.layers == tuple(layers) for x in families)
        name = f"{name} ({same + 1})" if same else name
        families.append(Family(name, tuple(layers), numbers, classes))
    ids = number[coupling.label]
    ids[0] = -1
    fixed = _fixed(coupling, why)
    shapes = {x.parameter: subject.shapes[x.parameter] for x in coupling.axes}
    weights = [assigned(x, ids) for x in coupling.axes]
    vectors = vectors_of(subject, ids)
    return CoupledGroups(structure, families, fixed, weights, vectors, shapes, ids)


def _first(own: Sequence[int], producers: Mapping[int, set[str]], order: Mapping[str, int]) -> int:
    return min(order[name] for label in own for name in producers[label])


def _named(layers: Sequence[str]) -> str:
    """Names a family by its layers."""
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return layers[0] + more


def _fixed(coupling: Coupling, why: Mapping[int, str]) -> list[Fixed]:
    """Counts the output channels of each layer that are in no group, by reason."""
    result = []
    for x in coupling.axes:
        counts: dict[str, int] = {}
        index, ids = x.made
        own = torch.full((x.sizes[1] if x.transposed else x.sizes[0],), 0)
        own[index] = coupling.label[ids]
        for label, count in zip(*(y.tolist() for y in own.unique(return_counts=True)), strict=True):
            reason = why.get(label, _NOT_READ) if label else ""
            if reason:
                counts[reason] = counts.get(reason, 0) + count
        result += [Fixed(x.layer, count, reason) for reason, count in counts.items()]
    return result
