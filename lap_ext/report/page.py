# SPDX-License-Identifier: MIT
"""Makes one self-contained HTML page about a pruning from what facts.py has measured.

The page needs no script, font or request, so it can be mailed, archived and read offline. Its
policy forbids browsers all of that, should a name ever get past the escapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from lap_ext._files import replacing
from lap_ext._text import in_html
from lap_ext.report.charts import bar, histogram, number, percent, size
from lap_ext.report.facts import Facts, LayerFacts
from lap_ext.report.style import STYLE

BEGIN = (  # of every page, by which one is recognized
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="generator" content="lap_ext">\n'
)
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
)
_SHOWN = 24  # distributions of layers; the others are collapsed


def write(path: str | os.PathLike[str], facts: Facts) -> None:
    """Writes the page atomically: path holds either the old file or the complete new one."""
    with replacing(path) as file:
        file.write(html(facts).encode())


def html(facts: Facts) -> str:
    """Returns the page as a string."""
    body = [
        _header(facts),
        "<main>",
        _layers(facts),
        _distributions(facts),
        _dead(facts),
        _topology(facts),
        _sizes(facts),
        "</main>",
        f"<footer>Made by lap_ext {in_html(facts.version)}.</footer>",
    ]
    return (
        f"{BEGIN}{_POLICY}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Pruning of {in_html(facts.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{''.join(body)}\n</body>\n</html>\n"
    )


def _header(facts: Facts) -> str:
    dead_rows = sum(layer.dead_rows for layer in facts.layers)
    dead_columns = sum(layer.dead_columns for layer in facts.layers)
    cards = [
        ("sparsity", percent(facts.sparsity), "of the pruned layers' weights"),
        ("weights kept", number(facts.kept), f"of {number(facts.total)}"),
        ("kept mass", percent(facts.mass), "share of the sum of squares"),
        ("layers", f"{len(facts.layers)}", "pruned"),
        ("dead channels", f"{dead_rows + dead_columns:,}",
         f"{dead_rows:,} rows, {dead_columns:,} columns"),
    ]  # fmt: skip
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in cards
    )
    options = ", ".join(f"{in_html(k)} <code>{in_html(v)}</code>" for k, v in facts.options.items())
    options = f'<p class="quiet">{options}</p>' if options else ""
    return (
        f"<header><h1>Pruning of {in_html(facts.title)}</h1>{options}"
        f'<dl class="cards">{tiles}</dl></header>'
    )


def _layers(facts: Facts) -> str:
    rows = [
        f'<tr><th scope="row">{in_html(layer.name)}</th><td>{in_html(layer.kind)}</td>'
        f'<td class="num">{_shape(layer)}</td><td class="num">{layer.kept:,}</td>'
        f'<td class="num">{layer.total:,}</td>'
        f'<td class="barred">{bar(layer.sparsity, "pruned")}</td>'
        f'<td class="barred">{bar(layer.mass, "mass")}</td></tr>'
        for layer in facts.layers
    ]
    foot = (
        f'<tfoot><tr><th scope="row">all</th><td></td><td></td><td class="num">{facts.kept:,}</td>'
        f'<td class="num">{facts.total:,}</td><td class="barred">{bar(facts.sparsity, "pruned")}'
        f'</td><td class="barred">{bar(facts.mass, "mass")}</td></tr></tfoot>'
    )
    head = ("layer", "kind", "#shape", "#kept", "#weights", "sparsity", "kept mass")
    return (
        '<h2>Layers</h2><p class="quiet">Sparsity is the share of weights removed; kept mass the '
        "share of the layer's sum of squares that is left.</p>" + _table(head, rows, foot)
    )


def _distributions(facts: Facts) -> str:
    scored = any(layer.scores for layer in facts.layers)
    lowest = '<li><span class="swatch threshold"></span>lowest score kept</li>' if scored else ""
    what = "score" if scored else "|weight|"
    figures = []
    for layer in facts.layers:
        shown = layer.scores or layer.weights
        picture = histogram(shown, f"{layer.name}, {what}", layer.threshold)
        zeros = shown.zeros_kept + shown.zeros_pruned
        note = f"<figcaption>{zeros:,} are zero</figcaption>" if zeros else ""
        figures.append(f"<figure><h3>{in_html(layer.name)}</h3>{picture}{note}</figure>")
    grid = f'<div class="grid">{"".join(figures[:_SHOWN])}</div>'
    if figures[_SHOWN:]:
        grid += (
            f"<details><summary>{len(figures) - _SHOWN} more layers</summary>"
            f'<div class="grid">{"".join(figures[_SHOWN:])}</div></details>'
        )
    together = histogram(facts.distribution(), "all layers, |weight|", width=1000, height=220)
    explained = (
        "Weights with a score below the line of their layer (with one ranking over all layers, the "
        "common line) are pruned."
        if scored
        else "Where kept and pruned weights overlap, the score ranks them differently from the "
        "magnitude."
    )
    return (
        "<h2>Distributions</h2>"
        '<p class="quiet">The number of weights by magnitude, on a logarithmic axis; the smallest '
        "0.3 % are in the first bar.</p>"
        f'<ul class="legend"><li><span class="swatch kept"></span>kept</li>'
        f'<li><span class="swatch pruned"></span>pruned</li>{lowest}</ul>'
        f'<figure class="wide"><h3>|weight|, all layers</h3>{together}</figure>'
        f"<h2>{'Scores' if scored else '|weight|'} by layer</h2>"
        f'<p class="quiet">{explained}</p>{grid}'
    )


def _dead(facts: Facts) -> str:
    title = "<h2>Dead channels</h2>"
    dead = [layer for layer in facts.layers if layer.dead_rows or layer.dead_columns]
    if not dead:
        return f"{title}<p>None: no row and no column of a pruned weight is all zero.</p>"
    rows = [
        f'<tr><th scope="row">{in_html(layer.name)}</th>'
        f'<td class="barred">{_dead_bar(layer.dead_rows, layer.rows)}</td>'
        f'<td class="barred">{_dead_bar(layer.dead_columns, layer.columns)}</td></tr>'
        for layer in dead
    ]
    return (
        f'{title}<p class="quiet">Rows and columns of a weight that are all zero: '
        "apart from biases, removing them would not change the output.</p>"
        + _table(("layer", "rows", "columns"), rows)
    )


def _dead_bar(dead: int, total: int) -> str:
    return bar(dead / total if total else 0.0, "pruned", f"{dead:,} of {total:,}")


def _topology(facts: Facts) -> str:
    rows = [
        f'<tr><th scope="row">{in_html(layer.name)}</th><td>{in_html(layer.fed_by)}</td>'
        f"<td>{in_html(layer.read_by)}</td></tr>"
        for layer in facts.layers
    ]
    notes = ""
    if facts.others:
        names = ", ".join(f"<code>{in_html(name)}</code>" for name in facts.others)
        notes += f"<p>Not layers, never pruned: {names}.</p>"
    for stop in facts.stops:
        notes += f'<p class="alarm">The trace stopped: {in_html(stop)}</p>'
    return (
        '<h2>Topology</h2><p class="quiet">The layers that share a channel with each layer: '
        "lookahead scores use the norms of their weights.</p>"
        + _table(("layer", "fed by", "read by"), rows)
        + notes
    )


def _sizes(facts: Facts) -> str:
    rows = [
        ("before", facts.bytes_before, "kept"),
        ("after, zeros stored", facts.bytes_after, "kept"),
        ("after, kept values and one bit a weight (computed)", facts.bytes_sparse, "mass"),
    ]
    known = [(name, count, kind) for name, count, kind in rows if count is not None]
    if not known:
        return ""
    most = max(count for _, count, _ in known) or 1
    cells = [
        f'<tr><th scope="row">{name}</th><td class="barred">{bar(count / most, kind, size(count))}'
        f'</td><td class="num">{count:,} bytes</td></tr>'
        for name, count, kind in known
    ]
    return (
        '<h2>Size on disk</h2><p class="quiet">A pruned checkpoint stores its zeros, so that every '
        "tool can read it; the last row is the size in a sparse format.</p>"
        + _table(("", "size", "#exactly"), cells)
    )


def _table(head: Sequence[str], rows: Iterable[str], foot: str = "") -> str:
    """Writes a table; a column whose head begins with # holds numbers."""
    cells = "".join(
        f'<th scope="col"{" class=num" if name.startswith("#") else ""}>{name.lstrip("#")}</th>'
        for name in head
    )
    return (
        f'<div class="panel" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>{foot}</table></div>"
    )


def _shape(layer: LayerFacts) -> str:
    return " × ".join(map(str, layer.shape))
