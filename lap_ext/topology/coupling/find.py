# SPDX-License-Identifier: MIT
"""Makes the groups of a structure from what the channels of a graph allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lap_ext.topology.coupling.assign import assigned, vectors_of
from lap_ext.topology.coupling.axes import Axes
from lap_ext.topology.coupling.coupled import Coupling, coupling_of
from lap_ext.topology.coupling.experts import experts_of
from lap_ext.topology.coupling.groups import CoupledGroups, Family, Fixed
from lap_ext.topology.coupling.subject import Subject
from lap_ext.topology.facts import Heads
from lap_ext.topology.graph import Graph

_NOT_READ = "nothing reads it"
_NOT_HEAD = "it is in no head of an attention"
_NOT_INNER = "it is no inner channel of a feed-forward block"
_SHARED_KV = "all heads share one head of keys and values"


def groups_of(subject: Subject, structure: str) -> CoupledGroups:
    """Finds the groups of a structure: "channel", "head", "expert" or "unit"."""
    if structure == "expert":
        return experts_of(subject)
    graph = subject.graph
    heads = [_own_rows(x) for x in graph.facts.heads] if structure == "head" else []
    shared = torch.cat([torch.zeros(0, dtype=torch.int64), *map(_shared, graph.facts.heads)])
    apart = torch.cat([shared, graph.channels.root(shared)]) if structure == "head" else None
    coupling = coupling_of(graph, heads, apart, balance=structure != "head")
    kinds = _Kinds.of(graph, coupling, structure)
    order = {name: n for n, name in enumerate(subject.layers)}
    families, number = _families(coupling, kinds, order)
    ids = number[coupling.label]
    ids[0] = -1
    shapes = {x.parameter: subject.shapes[x.parameter] for x in coupling.axes}
    weights = [assigned(x, ids) for x in coupling.axes]
    fixed = _fixed(coupling, kinds)
    vectors = vectors_of(subject, ids)
    return CoupledGroups(structure, families, fixed, weights, vectors, shapes, ids)


def _shared(heads: Heads) -> Tensor:
    """Returns the channels that all heads share, which stay: other heads read them; not values.

    A part of the keys may be one for all heads.
    """
    first = heads.ids[0]
    if heads.ids.shape[0] == 1 or _same_rows(heads.values):
        return first[:0]
    everywhere = first[torch.stack([torch.isin(first, row) for row in heads.ids]).all(0)]
    return everywhere[everywhere != 0]


def _own_rows(heads: Heads) -> Tensor:
    """Returns the channels of each head without those that all share, and 0 for these."""
    return heads.ids.masked_fill(torch.isin(heads.ids, _shared(heads)), 0)


class _Kinds:
    """Sorts components into kinds: those of a kind are made and read by the same weights.

    Attributes:
        kind: of each component that a weight makes, by its label, int64 [channels]; 0: of others.
        why: of each kind, why it is no group; empty where it is one.
        layers: of each kind, the layers that make it.
    """

    def __init__(self, size: int) -> None:
        self.kind = torch.zeros(size, dtype=torch.int64)
        self.why: list[str] = [""]
        self.layers: list[set[str]] = [set()]

    @classmethod
    def of(cls, graph: Graph, coupling: Coupling, structure: str) -> _Kinds:
        """Sorts the components of a coupling."""
        label, kinds = coupling.label, cls(coupling.label.numel())
        made = [torch.unique(label[x.made[1]]) for x in coupling.axes]
        read = [torch.unique(label[x.read[1]]) for x in coupling.axes]
        in_heads = [_own_rows(x).flatten() for x in graph.facts.heads]
        sets = [
            torch.unique(label[torch.cat([label[:1], *ids])])
            for ids in (in_heads, [x for pair in graph.couplings for x in pair])
        ]
        shared = [
            label[x.values[:1].amax()].reshape(1)
            for x in graph.facts.heads
            if x.ids.shape[0] > 1 and _same_rows(x.values) and not _same_rows(x.ids)
        ]
        sets.append(torch.cat([label[:1], *shared]))
        kinds._refine([torch.unique(label[coupling.reason[label] > 0]), *made, *read, *sets])
        own = torch.unique(torch.cat([label[:1], *made]))
        reasons = coupling.reason[own]
        keys, of_key = torch.unique(kinds.kind[own] * (len(coupling.reasons)) + reasons,
                                    return_inverse=True)  # fmt: skip
        first = torch.full((keys.numel(),), label.numel()).scatter_reduce(0, of_key, own, "amin")
        kinds.kind = torch.zeros_like(label)
        kinds.kind[own] = of_key + 1
        kinds.kind[0] = 0
        facts = [torch.isin(first, x).tolist() for x in sets]
        makers, readers = _weights(coupling.axes, made, first), _weights(coupling.axes, read, first)
        for n, own_label in enumerate(first.tolist()):
            attended, contracted, alone = (x[n] for x in facts)
            why = coupling.why(own_label)
            if not why and not readers[n] and not contracted:
                why = _NOT_READ
            if not why and structure == "head":
                why = _SHARED_KV if alone else "" if attended else _NOT_HEAD
            if not why and structure == "unit":
                why = "" if _is_inner(makers[n], readers[n]) and not attended else _NOT_INNER
            kinds.why.append(why)
            kinds.layers.append({x.layer for x in makers[n]})
        return kinds

    def _refine(self, sets: Sequence[Tensor]) -> None:
        """Gives components that are in the same of some sets, and only these, the same kind."""
        count = 1
        for labels in sets:
            values, inverse = torch.unique(self.kind[labels], return_inverse=True)
            self.kind[labels] = inverse + count
            count += values.numel()


def _is_inner(makers: Sequence[Axes], readers: Sequence[Axes]) -> bool:
    """Whether channels lie between linear layers: one or two that make them, one that reads."""
    linear = {kind for x in (*makers, *readers) for kind in x.kinds} == {"linear"}
    return linear and len({x.parameter for x in makers}) <= 2 and len(readers) == 1


def _weights(axes: Sequence[Axes], sides: Sequence[Tensor], labels: Tensor) -> list[list[Axes]]:
    """Lists the weights that have each of some components on a side."""
    result: list[list[Axes]] = [[] for _ in range(labels.numel())]
    for x, side in zip(axes, sides, strict=True):
        for index in torch.isin(labels, side).nonzero().flatten().tolist():
            result[index].append(x)
    return result


def _same_rows(rows: Tensor) -> bool:
    return bool((rows == rows[:1]).all())


def _families(
    coupling: Coupling, kinds: _Kinds, order: Mapping[str, int]
) -> tuple[list[Family], Tensor]:
    """Makes the families, and the number of the group of each component; -1: of none."""
    family_of: dict[object, int] = {}  # what is ranked together -> its number
    layers: list[set[str]] = []

    def numbered(key: object, own: set[str]) -> int:
        if key not in family_of:
            family_of[key] = len(layers)
            layers.append(set())
        layers[family_of[key]] |= own
        return family_of[key]

    by_kind = [-1 if why or not own else numbered(frozenset(own), own)
               for why, own in zip(kinds.why, kinds.layers, strict=True)]  # fmt: skip
    family = torch.tensor(by_kind)[kinds.kind]
    balanced = ((coupling.domain >= 0) & (family >= 0)).nonzero().flatten()
    domains, of_domain = torch.unique(coupling.domain[balanced], return_inverse=True)
    for n, domain in enumerate(domains.tolist()):
        labels = balanced[of_domain == n]
        makers = (kinds.layers[x] for x in torch.unique(kinds.kind[labels]).tolist())
        family[labels] = numbered(domain, set[str]().union(*makers))
    classes = torch.where(family >= 0, coupling.classes, 0)
    number = torch.full_like(kinds.kind, -1)
    found: list[Family] = []
    every = (family >= 0).nonzero().flatten()
    every = every[torch.argsort(family[every], stable=True)]
    members = every.split(torch.bincount(family[every], minlength=len(layers)).tolist())
    ranked = sorted(
        (n for n, labels in enumerate(members) if labels.numel()),
        key=lambda n: (min(order[x] for x in layers[n]), int(members[n][0])),
    )
    count, names = 0, Counter[str]()
    for n in ranked:
        numbers = torch.arange(count, count + members[n].numel())
        number[members[n]] = numbers
        count += numbers.numel()
        own = tuple(sorted(layers[n], key=order.__getitem__))
        name = own[0] + (f" and {len(own) - 1} more" if len(own) > 1 else "")
        names[name] += 1
        name = f"{name} ({names[name]})" if names[name] > 1 else name
        found.append(Family(name, own, numbers, classes[members[n]]))
    return found, number


def _fixed(coupling: Coupling, kinds: _Kinds) -> list[Fixed]:
    """Counts the output channels of each layer that are in no group, by reason."""
    result = []
    for x in coupling.axes:
        index, ids = x.made
        own = torch.zeros(x.sizes[1] if x.transposed else x.sizes[0], dtype=torch.int64)
        own[index] = kinds.kind[coupling.label[ids]]
        counts: dict[str, int] = {}
        for kind, count in enumerate(torch.bincount(own, minlength=len(kinds.why)).tolist()):
            reason = kinds.why[kind]
            if count and reason:
                counts[reason] = counts.get(reason, 0) + count
        result += [Fixed(x.layer, count, reason) for reason, count in counts.items()]
    return result
