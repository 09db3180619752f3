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

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lap_ext.topology.coupling.axes import Axes, axes_of, by_parameter, differ
from lap_ext.topology.coupling.components import Components
from lap_ext.topology.coupling.obstacles import ALONE, obstacles
from lap_ext.topology.graph import Graph


@dataclass(eq=False)
class Coupling:
    """What the channels of a graph allow.

    Attributes:
        axes: of each weight.
        label: the lowest id of the channels that each channel goes with, int64 [channels].
        reason: index in `reasons` of why each cannot go; 0 where it can.
        reasons: in words; the first is empty.
        classes: label -> (domain, class): one of each class of a domain goes at a time.
    """

    axes: list[Axes]
    label: Tensor
    reason: Tensor
    reasons: list[str]
    classes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def why(self, label: int) -> str:
        """Says why a component cannot go; empty where it can."""
        return self.reasons[int(self.reason[label])]


def coupling_of(graph: Graph, joined: Sequence[Tensor] = (), *, balance: bool = True) -> Coupling:
    """Finds what goes together.

    Args:
        graph: of the network.
        joined: further sets of channels that go together, one a row, with 0 for none: heads.
        balance: whether parts that an operation needs equal must stay equal.
    """
    axes = axes_of(graph)
    live = _live(graph)
    components = Components(graph.channels.size)
    _join_edges(graph, components, live)
    _join_weights(axes, components)
    in_heads = torch.cat([torch.zeros(1, dtype=torch.int64), *(x.flatten() for x in joined)])
    for left, right in graph.couplings:
        # what all heads share is in none of them
        both = torch.isin(left, in_heads) == torch.isin(right, in_heads)
        components.join(left[both], right[both])
    for rows in joined:
        for row in rows:
            ids = row[row != 0]
            components.join(ids[1:], ids[:-1])
    if balance:  # entries that several channels share: of a norm over the channels of each head
        for vector in graph.facts.vectors:
            components.join_equal(vector.entries, vector.ids)
    label = components.labels()
    found = Coupling(axes, label, torch.zeros_like(label), [""])
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
    profiles: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # label -> (constraint, counts)
    for number, (ids, _, strict) in enumerate(constraints):
        for label, counts in _uneven(found, ids, strict).items():
            profiles.setdefault(label, []).append((number, counts))
    for domain in _domains(profiles):
        _classify(found, domain, profiles, constraints)


def _uneven(found: Coupling, ids: Tensor, strict: bool) -> dict[int, tuple[int, ...]]:
    """Counts the channels of components in each part, where they alone would make it uneven."""
    parts = ids.shape[0]
    row = torch.arange(parts).repeat_interleave(ids.shape[1])
    flat = ids.flatten()
    live = (flat != 0) & (found.reason[found.label[flat]] == 0)
    base = found.label.numel()
    pairs = torch.unique(row[live] * base + flat[live])
    row, own = pairs // base, found.label[pairs % base]
    sizes = torch.zeros(parts, dtype=torch.int64)
    every = torch.unique(torch.arange(parts).repeat_interleave(ids.shape[1]) * base + flat)
    sizes += torch.bincount(every // base, minlength=parts)
    labels, at = torch.unique(own, return_inverse=True)
    counts = torch.zeros(labels.numel(), parts, dtype=torch.int64)
    counts.index_put_((at, row), torch.ones_like(at), accumulate=True)
    even = (counts == counts[:, :1]).all(1)
    if not strict:
        even |= ((counts == 0) | (counts == sizes)).all(1)
    return {
        label: tuple(own)
        for label, own in zip(labels[~even].tolist(), counts[~even].tolist(), strict=True)
    }


def _domains(profiles: dict[int, list[tuple[int, tuple[int, ...]]]]) -> list[list[int]]:
    """Groups components that parts which must stay equal connect."""
    of: dict[int, list[int]] = {}
    for label, entries in profiles.items():
        for number, _ in entries:
            of.setdefault(number, []).append(label)
    domains, seen = [], set[int]()
    for start in sorted(profiles):
        if start in seen:
            continue
        domain, queue, visited = [], [start], set[int]()
        seen.add(start)
        while queue:
            label = queue.pop()
            domain.append(label)
            for number, _ in profiles[label]:
                if number in visited:
                    continue
                visited.add(number)
                new = [x for x in of[number] if x not in seen]
                seen.update(new)
                queue += new
        domains.append(sorted(domain))
    return domains


def _classify(
    found: Coupling,
    domain: list[int],
    profiles: dict[int, list[tuple[int, tuple[int, ...]]]],
    constraints: Sequence[tuple[Tensor, str, bool]],
) -> None:
    """Gives each component of a domain its class, or fixes all if no choice keeps parts equal."""
    signatures = {label: tuple(profiles[label]) for label in domain}
    order = {signature: n for n, signature in enumerate(dict.fromkeys(signatures.values()))}
    totals: dict[int, list[int]] = {}
    for signature in order:
        for number, counts in signature:
            known = totals.setdefault(number, [0] * len(counts))
            totals[number] = [a + b for a, b in zip(known, counts, strict=True)]
    for number, total in totals.items():
        if len(set(total)) > 1:
            reason = f"{constraints[number][1]} needs equal parts, which no choice keeps"
            if reason not in found.reasons:
                found.reasons.append(reason)
            found.reason[torch.tensor(domain)] = found.reasons.index(reason)
            return
    for label, signature in signatures.items():
        found.classes[label] = domain[0], order[signature]
