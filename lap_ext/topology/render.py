# SPDX-License-Identifier: MIT
"""Layers and their neighbors for people: a table, and a graph for Graphviz."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lap_ext._text import columns, some
from lap_ext.topology.edges import Edge

_MOST, _WIDEST = 4, 48  # neighbors shown in a row, and their letters


class Row(NamedTuple):
    """A layer as it is shown."""

    name: str
    kind: str
    shape: tuple[int, ...]
    prev: list[Edge]
    next: list[Edge]


def table(layers: Sequence[Row], others: Sequence[str], stops: Sequence[str]) -> str:
    """One row a layer: name, kind, shape, what feeds it, what reads it.

    "..mlp.up" is a neighbor whose name begins as the layer's own does, by two parts or more.
    """
    rows = [("layer", "kind", "shape", "fed by", "read by")]
    for layer in layers:
        shape = "x".join(map(str, layer.shape))
        around = (_list(layer.name, layer.prev), _list(layer.name, layer.next))
        rows.append((layer.name, layer.kind, shape, *around))
    lines = [columns(rows)]
    if others:
        lines.append(f"no layers, never pruned: {', '.join(others)}")
    return "\n".join([*lines, *(f"stopped at: {text}" for text in stops)])


def _list(name: str, edges: list[Edge]) -> str:
    parts = []
    for edge in edges:
        mark = "x " if edge.kind == "coupled" else ""
        parts.append(f"{mark}{_short(edge.name, name)}{edge.how}")
    parts = list(dict.fromkeys(parts))
    ends = itertools.accumulate(len(part) + 2 for part in parts)
    shown = max(1, sum(end <= _WIDEST + 2 for end in list(ends)[:_MOST]))
    return some(parts, shown)


def _short(name: str, row: str) -> str:
    """A name without the parts that it begins with as the row's does, if there are several."""
    parts = name.split(".")
    both = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(parts, row.split("."), strict=False)
    )
    shared = min(len(list(both)), len(parts) - 1)
    return name if shared < 2 else ".." + ".".join(parts[shared:])


def dot(layers: Sequence[Row]) -> str:
    """Draws an arrow from every producer to every consumer, labeled with the channel map."""
    lines = ["digraph topology {", "  rankdir=LR; node [shape=box, fontname=Helvetica];"]
    names = {layer.name: f"n{place}" for place, layer in enumerate(layers)}
    for layer in layers:
        shape = "x".join(map(str, layer.shape))
        label = f"{_escaped(layer.name)}\\n{layer.kind} {shape}"
        lines.append(f'  {names[layer.name]} [label="{label}"];')
    outside: dict[str, str] = {}
    coupled: set[frozenset[str]] = set()  # drawn: each pair once

    def node(name: str, inside: bool) -> str:
        return names[name] if inside else outside.setdefault(name, f"o{len(outside)}")

    for layer in layers:
        own = names[layer.name]
        for edge in layer.prev:
            source = node(edge.name, edge.kind == "layer")
            lines.append(f'  {source} -> {own} [label="{_escaped(edge.channel_map)}"];')
        for edge in layer.next:
            pair = frozenset((layer.name, edge.name))
            if edge.kind == "coupled" and pair not in coupled:
                coupled.add(pair)
                other = node(edge.name, edge.name in names)
                lines.append(f"  {own} -> {other} [style=dotted, dir=none];")
            elif edge.kind in ("output", "boundary"):
                lines.append(f"  {own} -> {node(edge.name, inside=False)};")
    lines += [f'  {node} [label="{_escaped(name)}", shape=ellipse];'
              for name, node in outside.items()]  # fmt: skip
    return "\n".join([*lines, "}"])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
