# SPDX-License-Identifier: MIT
"""Layers and their neighbors for people: a table as text and HTML, a graph for Graphviz."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lap_ext._text import columns, html_table, in_html, some, visible
from lap_ext.topology.edges import Edge

_MOST, _WIDEST = 4, 48  # neighbors shown in a row, and their letters


class Row(NamedTuple):
    """A layer as it is shown."""

    name: str
    kind: str
    shape: tuple[int, ...]
    prev: list[Edge]
    next: list[Edge]


def table(layers: Iterable[Row], notes: Sequence[str]) -> str:
    """Writes one row per layer, name, kind, shape, what feeds it, what reads it; then the notes.

    "..mlp.up" is a neighbor whose name shares its first two parts or more with the layer's own.
    """
    return "\n".join([columns(_rows(layers)), *map(visible, notes)])


def html_of(layers: Iterable[Row], notes: Sequence[str]) -> str:
    """Writes the rows of `table` and the notes in HTML, for notebooks."""
    return "".join([html_table(_rows(layers)), *(f"<p>{in_html(note)}</p>" for note in notes)])


def _rows(layers: Iterable[Row]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("layer", "kind", "shape", "fed by", "read by")]
    for layer in layers:
        shape = "x".join(map(str, layer.shape))
        around = (_list(layer.name, layer.prev), _list(layer.name, layer.next))
        rows.append((layer.name, layer.kind, shape, *around))
    return rows


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
    """Drops the first parts that a name shares with the row's, if there are several."""
    parts = name.split(".")
    both = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(parts, row.split("."), strict=False)
    )
    shared = min(len(list(both)), len(parts) - 1)
    return name if shared < 2 else ".." + ".".join(parts[shared:])


def dot(layers: Iterable[Row]) -> str:
    """Draws an arrow from every producer to every consumer, labeled with the channel map."""
    layers = list(layers)
    lines = ["digraph topology {", "  rankdir=LR; node [shape=box, fontname=Helvetica];"]
    names = {layer.name: f"n{index}" for index, layer in enumerate(layers)}
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
    lines += [
        f'  {node} [label="{_escaped(name)}", shape=ellipse];' for name, node in outside.items()
    ]
    return "\n".join([*lines, "}"])


def _escaped(text: str) -> str:
    """Writes a text as a part of a label, where Graphviz also reads the entities of HTML."""
    return visible(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
