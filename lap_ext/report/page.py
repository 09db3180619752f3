# SPDX-License-Identifier: MIT
"""Makes one self-contained HTML page about a pruning from what facts.py has measured.

The page needs no font, file or request, so it can be mailed, archived and read offline. Its policy
forbids browsers all of that, and every script but its own one, which it names by its hash, should a
name ever get past the escapes.
"""

from __future__ import annotations

import os

from lap_ext._files import replacing
from lap_ext._text import in_html, shortened, some
from lap_ext.report import tables
from lap_ext.report.charts import arcs, histogram, number, percent
from lap_ext.report.facts import Facts
from lap_ext.report.script import HASH, SCRIPT
from lap_ext.report.style import STYLE

BEGIN = (  # of every page, by which one is recognized
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="generator" content="lap_ext">\n'
)
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    f"script-src '{HASH}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
)
_SHOWN = 24  # distributions of layers; the others are collapsed
_NAMED = 20  # empty layers that are named in the alarm
_DRAWN = 60  # layers of a topology that is drawn


def write(path: str | os.PathLike[str], facts: Facts) -> None:
    """Writes the page atomically: path holds either the old file or the complete new one.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write(f"{directory}/report.html", Facts("net", "lookahead", []))
        ...     print(Path(directory, "report.html").read_text()[:15])
        <!doctype html>
    """
    with replacing(path) as file:
        file.write(html(facts).encode())


def html(facts: Facts) -> str:
    """Returns the page as a string."""
    sizes, units = tables.sizes(facts), tables.units(facts)
    places = {"layers": "Layers"} | ({"units": "Units"} if units else {})
    places |= {"distributions": "Distributions", "dead": "Dead channels"}
    places |= {"topology": "Topology"} | ({"sizes": "Size on disk"} if sizes else {})
    links = "".join(f'<li><a href="#{x}">{text}</a></li>' for x, text in places.items())
    body = [
        _header(facts),
        f'<nav aria-label="Contents"><ul>{links}<li><a href="#origin">Origin</a></li></ul></nav>',
        "<main>",
        tables.layers(facts),
        units,
        _distributions(facts),
        tables.dead(facts),
        _topology(facts),
        sizes,
        _origin(facts),
        "</main>",
        f"<footer>Made by lap_ext {in_html(facts.version)}.</footer>",
    ]
    return (
        f"{BEGIN}{_POLICY}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Pruning of {in_html(facts.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{''.join(body)}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _header(facts: Facts) -> str:
    dead_rows = sum(layer.dead_rows for layer in facts.layers)
    dead_columns = sum(layer.dead_columns for layer in facts.layers)
    cards = [
        ("sparsity", percent(facts.sparsity), "of the pruned layers' weights"),
        ("weights kept", number(facts.kept), f"of {number(facts.total)}"),
        ("kept mass", percent(facts.mass), "share of the sum of squares"),
        ("layers", f"{len(facts.layers)}", f"pruned, {len(facts.empty_layers)} empty"),
        ("dead channels", f"{dead_rows + dead_columns:,}",
         f"{dead_rows:,} rows, {dead_columns:,} columns"),
    ]  # fmt: skip
    structure = ""
    if facts.structure is not None:
        structure = f", structure <code>{in_html(facts.structure)}</code>"
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in cards
    )
    return (
        f"<header><h1>Pruning of {in_html(facts.title)}</h1>"
        f'<p class="quiet">Criterion <code>{in_html(facts.criterion)}</code>{structure}</p>'
        f"{_alarm(facts)}"
        f'<dl class="cards">{tiles}</dl></header>'
    )


def _alarm(facts: Facts) -> str:
    """Says which layers keep no weight."""
    empty = facts.empty_layers
    if not empty:
        return ""
    keep, cut = ("keeps", "it") if len(empty) == 1 else ("keep", "them")
    names = in_html(shortened(some(empty, _NAMED)))
    return (
        f'<p class="alarm" role="note">Empty: {len(empty)} of {len(facts.layers)} layers {keep} '
        f"no weight ({names}). Nothing but biases and residual paths gets past {cut}. Prune with a "
        "floor for every layer (min_keep), a lower sparsity, or each layer separately (scope).</p>"
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
        mark = ' <strong class="badge">empty</strong>' if layer.empty else ""
        figures.append(f"<figure><h3>{in_html(layer.name)}{mark}</h3>{picture}{note}</figure>")
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
        '<h2 id="distributions">Distributions</h2>'
        '<p class="quiet">The number of weights by magnitude, on a logarithmic axis; the smallest '
        "0.3 % are in the first bar.</p>"
        f'<ul class="legend"><li><span class="swatch kept"></span>kept</li>'
        f'<li><span class="swatch pruned"></span>pruned</li>{lowest}</ul>'
        '<figure class="wide" role="region" aria-label="Distribution of all layers, scrollable" '
        f'tabindex="0"><h3>|weight|, all layers</h3>{together}</figure>'
        f"<h2>{'Scores' if scored else '|weight|'} by layer</h2>"
        f'<p class="quiet">{explained}</p>{grid}'
    )


def _topology(facts: Facts) -> str:
    notes = ""
    if facts.others:
        names = ", ".join(f"<code>{in_html(name)}</code>" for name in facts.others)
        notes += f"<p>Not layers, never pruned: {names}.</p>"
    for stop in facts.stops:
        notes += f'<p class="alarm">The trace stopped: {in_html(stop)}</p>'
    drawing = ""
    if 1 < len(facts.layers) <= _DRAWN:
        drawing = (
            '<figure class="wide" role="region" aria-label="Drawing of the topology, scrollable" '
            f'tabindex="0">{arcs(facts.layers)}<figcaption>An arc leads from a layer to a later '
            "one that it feeds, directly or past a residual path.</figcaption></figure>"
        )
    return (
        '<h2 id="topology">Topology</h2><p class="quiet">The layers that share a channel with each '
        "layer: lookahead scores use the norms of their weights.</p>"
        f"{notes}<details><summary>What feeds and reads each of the {len(facts.layers)} layers"
        f"</summary>{drawing}{tables.topology(facts)}</details>"
    )


def _origin(facts: Facts) -> str:
    """Writes how the result was made, and how to load it."""
    took = None if facts.seconds is None else f"{facts.seconds:.1f} s"
    versions = [f"{x} {y}" for x, y in (("lap_ext", facts.version), ("torch", facts.torch)) if y]
    known = {
        "date": facts.date,
        "versions": ", ".join(versions),
        "time taken": took,
        "command": facts.command,
        **facts.options,
    }
    rows = "".join(
        f"<dt>{in_html(what)}</dt><dd><code>{in_html(text)}</code></dd>"
        for what, text in known.items()
        if text
    )
    lines = "\n".join(map(in_html, facts.load))
    load = (
        "<h3>To load the result</h3>"
        '<pre role="region" aria-label="Python that loads the result, scrollable" tabindex="0">'
        f"<code>{lines}</code></pre>"
        if lines
        else ""
    )
    return f'<h2 id="origin">Origin</h2><dl class="origin">{rows}</dl>{load}'
