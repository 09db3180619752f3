# SPDX-License-Identifier: MIT
"""Finds which channels of the graph go together, which cannot go, and what must stay balanced.

    same channel        a channel and what is computed from it alone or entry by entry: activations,
                        norms, sums (a residual), products (a gate), the gates of an LSTM
    same row or column  all channels that one row or column of a weight makes or reads: a weight
                        that is used twice, a weight over positions
    coupled             a channel of q and the channel of k that it is multiplied with
    one in a group      a depthwise convolution: its input and its outputs

A channel is fixed if it is an input or an output of the model, or if an operation reads it together
with channels that would stay (a norm over channels, a softmax).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lap_ext.topology.coupling.axes import Axes, axes_of, by_parameter, differ
from lap_ext.topology.coupling.components import Components
from lap_ext.topology.coupling.obstacles import ALONE, obstacles
from lap_ext.topology.facts import Vector
from lap_ext.topology.graph import Graph


@dataclass(eq=False)
class Coupling:
    """What the channels of a graph allow.

    Attributes:
        axes: of each weight.
        label: the lowest id of the channels that each channel goes with, int64 [channels].
        reason: index in `reasons` of why each cannot go; 0 where it can.
        reasons: in words; the first is empty.
        domain: the lowest label of those that each must stay balanced with; -1: none, int64.
        classes: the class of each in its domain: one of each class goes at a time, int64.
    """

    axes: list[Axes]
    label: Tensor
    reason: Tensor
    reasons: list[str]
    domain: Tensor
    classes: Tensor

    def why(self, label: int) -> str:
        """Says why a component cannot go; empty where it can."""
        return self.reasons[int(self.reason[label])]


def coupling_of(
    graph: Graph,
    joined: Sequence[Tensor] = (),
    apart: Tensor | None = None,
    *,
    balance: bool = True,
) -> Coupling:
    """Finds what goes together.

    Args:
        graph: of the network.
        joined: further sets of channels that go together, one a row, with 0 for none: heads.
        apart: channels that are multiplied with others but stay without them: keys of all heads.
        balance: whether parts that an operation needs equal must stay equal.
    """
    axes = axes_of(graph)
    apart = torch.zeros(0, dtype=torch.int64) if apart is None else apart
    live = _live(graph)
    components = Components(graph.channels.size)
    _join_edges(graph, components, live)
    _join_weights(axes, components)
    for left, right in graph.couplings:
        both = ~(torch.isin(left, apart) | torch.isin(right, apart))
        components.join(left[both], right[both])
    for rows in joined:
        for row in rows:
            ids = row[row != 0]
            components.join(ids[1:], ids[:-1])
    if balance:  # entries that several channels share: of a norm over the channels of each head
        vectors: dict[str, list[Vector]] = {}
        for vector in graph.facts.vectors:
            vectors.setdefault(vector.name, []).append(vector)
        for given in vectors.values():
            sides = [x.entries for x in given], [x.ids for x in given]
            components.join_equal(*map(torch.cat, sides))
    label = components.labels()
    nothing = torch.zeros_like(label)
    found = Coupling(axes, label, nothing, [""], nothing - 1, nothing.clone())
    _fix(graph, found, live, joined)
    if balance:
        _fix_whole(found)
    found.label = _spread(graph, found, live)
    if balance:
        _balance(graph, found)
    return found


def _live(graph: Graph) -> Tensor:
    """Marks channels that something reads."""
    live = torch.zeros(graph.channels.size, dtype=torch.bool)
    for role in graph.roles:
        live[role.inputs[1]] = True
    for pair in graph.couplings:
        for ids in pair:
            live[ids] = True
    for ids, _ in graph.ends:
        live[ids] = True
    for ids in graph.facts.statistics:
        live[ids] = True
    for group in reversed(graph.channels.groups):
        for edges in reversed(group.edges):
            live[edges.parent[live[edges.child + group.first]]] = True
    live[0] = False
    return live


def _join_edges(graph: Graph, components: Components, live: Tensor) -> None:
    """Joins channels with those that are computed from them."""
    channels = graph.channels
    for group in channels.groups:
        if group.kind in ALONE:
            continue
        for edges in group.edges:
            child = edges.child + group.first
            used = live[child] & ~channels.of_kind(edges.parent, "zero")
            if not edges.broadcast:
                components.join(child[used], edges.parent[used])


def _join_weights(axes: Sequence[Axes], components: Components) -> None:
    """Joins what one row or column makes or reads, and what a group of one row or column does."""
    for views in by_parameter(axes):
        for sides in ([x.rows for x in views], [x.cols for x in views]):
            if not differ(views):  # a weight that is tied, or used twice
                components.join_equal(*(torch.cat(pairs) for pairs in zip(*sides, strict=True)))
        for x in views:
            height, width = x.shape[0] // max(1, x.groups), x.shape[1]
            if x.groups > 1 and 1 in (height, width):
                (row, of_rows), (col, of_cols) = x.rows, x.cols
                keys = torch.cat([row // max(1, height), col // max(1, width)])
                components.join_equal(keys, torch.cat([of_rows, of_cols]))


def _fix(graph: Graph, found: Coupling, live: Tensor, joined: Sequence[Tensor]) -> None:
    """Notes the reasons why components cannot go; the first one counts."""
    label = found.label
    for ids, reason in obstacles(graph, found.axes, label, live, joined):
        if not ids.numel():
            continue
        if reason not in found.reasons:
            found.reasons.append(reason)
        labels = torch.unique(label[ids])
        new = labels[(found.reason[labels] == 0) & (labels != 0)]
        found.reason[new] = found.reasons.index(reason)


def _fix_whole(found: Coupling) -> None:
    """Fixes components that take all outputs of a layer: nothing would be left of it."""
    for x in found.axes:
        labels = torch.unique(found.label[x.made[1]])
        if labels.numel() == 1 < x.made[1].numel() and not found.why(int(labels)):
            found.reasons.append(f"all channels of {x.layer!r} go together")
            found.reason[labels] = len(found.reasons) - 1


def _spread(graph: Graph, found: Coupling, live: Tensor) -> Tensor:
    """Gives channels that nothing reads, and reduced ones, the label of what they come from."""
    label = found.label.clone()
    for group in graph.channels.groups:
        own = group.ids
        if not group.edges or (group.kind not in ALONE and bool(live[own].all())):
            continue
        child = torch.cat([edges.child for edges in group.edges if not edges.broadcast])
        parent = torch.cat([edges.parent for edges in group.edges if not edges.broadcast])
        given = parent != 0
        child, of = child[given], label[parent[given]]
        low = torch.full((group.size,), graph.channels.size).scatter_reduce(0, child, of, "amin")
        high = torch.zeros(group.size, dtype=torch.int64).scatter_reduce(0, child, of, "amax")
        alone = label[own] == own
        if group.kind not in ALONE:
            alone &= ~live[own]
        label[own] = torch.where((low == high) & alone, low, label[own])
    return label


def _balance(graph: Graph, found: Coupling) -> None:
    """Sorts components into classes so that one of each keeps parts equal."""
    constraints = [(x.ids, x.reason, x.strict) for x in graph.facts.balanced]
    for axes in found.axes:
        height, width = axes.shape[0] // max(1, axes.groups), axes.shape[1]
        if axes.groups > 1 and 1 not in (height, width):
            sides = ((axes.rows, height), (axes.cols, width))
            for (index, ids), size in sides:
                if ids.numel() == index.unique().numel() == axes.groups * size:
                    constraints.append((ids.reshape(axes.groups, size), axes.layer, True))
    uneven = [_uneven(found, ids, strict) for ids, _, strict in constraints]
    kind, count = torch.zeros_like(found.label), 1  # of components alike in all constraints
    for labels, of, rows in uneven:
        keys = kind[labels] * rows.shape[0] + of
        values, inverse = torch.unique(keys, return_inverse=True)
        kind[labels] = count + inverse
        count += values.numel()
    profiles: dict[int, _Profile] = {}
    for number, (labels, of, rows) in enumerate(uneven):
        kinds, inverse = torch.unique(kind[labels], return_inverse=True)
        row = torch.zeros_like(kinds).scatter_(0, inverse, of)  # one for all of a kind
        for own, counts in zip(kinds.tolist(), rows[row].tolist(), strict=True):
            profiles.setdefault(own, []).append((number, counts))
    for domain in _domains(profiles):
        _classify(found, kind, domain, profiles, [reason for _, reason, _ in constraints])


_Profile: TypeAlias = list[tuple[int, list[int]]]  # (constraint, channels in each part)


def _uneven(found: Coupling, ids: Tensor, strict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the components that would make parts uneven if they went alone.

    Returns:
        (their labels, the index of the counts of each, different counts of channels by part).
    """
    parts = ids.shape[0]
    row = torch.arange(parts).repeat_interleave(ids.shape[1])
    flat = ids.flatten()
    live = (flat != 0) & (found.reason[found.label[flat]] == 0)
    base = found.label.numel()
    pairs = torch.unique(row[live] * base + flat[live])
    of_part, own = pairs // base, found.label[pairs % base]
    every = torch.unique(row * base + flat)
    sizes = torch.bincount(every // base, minlength=parts)
    labels, at = torch.unique(own, return_inverse=True)
    counts = torch.zeros(labels.numel(), parts, dtype=torch.int32)
    counts.index_put_((at, of_part), torch.ones_like(at, dtype=torch.int32), accumulate=True)
    even = (counts == counts[:, :1]).all(1)
    if not strict:
        even |= ((counts == 0) | (counts == sizes)).all(1)
    rows, of = torch.unique(counts[~even], dim=0, return_inverse=True)
    return labels[~even], of, rows


def _domains(profiles: Mapping[int, _Profile]) -> list[list[int]]:
    """Groups kinds of components that parts which must stay equal connect."""
    of: dict[int, list[int]] = {}
    for kind, entries in profiles.items():
        for number, _ in entries:
            of.setdefault(number, []).append(kind)
    domains, seen, visited = [], set[int](), set[int]()
    for start in sorted(profiles):
        if start in seen:
            continue
        domain, queue = [], [start]
        seen.add(start)
        while queue:
            kind = queue.pop()
            domain.append(kind)
            for number, _ in profiles[kind]:
                if number not in visited:
                    visited.add(number)
                    new = [x for x in of[number] if x not in seen]
                    seen.update(new)
                    queue += new
        domains.append(sorted(domain))
    return domains


def _classify(
    found: Coupling,
    kind: Tensor,
    domain: list[int],
    profiles: Mapping[int, _Profile],
    reasons: Sequence[str],
) -> None:
    """Makes each kind of a domain a class, or fixes all if no choice keeps parts equal."""
    members = torch.isin(kind, torch.tensor(domain)).nonzero().flatten()
    totals: dict[int, list[int]] = {}
    for own in domain:
        for number, counts in profiles[own]:
            known = totals.setdefault(number, [0] * len(counts))
            totals[number] = [a + b for a, b in zip(known, counts, strict=True)]
    for number, total in totals.items():
        if len(set(total)) > 1:
            reason = f"{reasons[number]} needs equal parts, which no choice keeps"
            if reason not in found.reasons:
                found.reasons.append(reason)
            found.reason[members] = found.reasons.index(reason)
            return
    first: dict[int, None] = dict.fromkeys(kind[members].tolist())  # in the order of channels
    place = torch.zeros(max(first) + 1, dtype=torch.int64)
    place[torch.tensor(list(first))] = torch.arange(len(first))
    found.domain[members] = members[0]
    found.classes[members] = place[kind[members]]
