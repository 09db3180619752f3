# SPDX-License-Identifier: MIT
"""The charts of a page: bars in the cells of a table, and histograms, as HTML and inline SVG.

Colors come from the style sheet of the page, so that they follow a dark color scheme and printing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lap_ext._text import in_html
from lap_ext.report.facts import STEPS, Histogram, LayerFacts, binned

_LONGEST = 72  # letters of a name in a picture
_SUFFIXES = ("", "k", "M", "G", "T")


def number(x: float) -> str:
    """Writes a number in a few characters.

    Example:
        >>> number(0), number(950), number(12_345), number(7.24e9), number(0.00123)
        ('0', '950', '12.3k', '7.24G', '0.00123')
    """
    if x == 0 or abs(x) < 1000:
        return f"{x:.3g}"
    power = min(int(math.log10(abs(x)) / 3), len(_SUFFIXES) - 1)
    return f"{x / 1000**power:.3g}{_SUFFIXES[power]}"


def percent(share: float) -> str:
    """Writes a share in per cent, with two digits, never rounded to 0 or 100.

    Example:
        >>> percent(0.9), percent(1.0), percent(0.99999), percent(0.00001)
        ('90.00 %', '100 %', '> 99.99 %', '< 0.01 %')
    """
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if share > 0.9999:
        return "> 99.99 %"
    return "< 0.01 %" if share < 0.0001 else f"{100 * share:.2f} %"


def size(count: float) -> str:
    """Writes a number of bytes, in powers of 1000.

    Example:
        >>> size(12), size(1_530_000), size(13.5e9)
        ('12 B', '1.53 MB', '13.5 GB')
    """
    power = min(int(math.log10(count) / 3), 4) if count >= 1 else 0
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{count / 1000**power:.3g} {unit}"


def bar(share: float, kind: str, text: str | None = None) -> str:
    """Writes the content of a cell: the number, and a bar of that share below it."""
    width = f"{100 * min(1.0, max(0.0, share)):.2f}%"
    label = percent(share) if text is None else in_html(text)
    return (
        f'<span class="value">{label}</span><span class="track" aria-hidden="true">'
        f'<span class="fill {kind}" style="width:{width}"></span></span>'
    )


def histogram(
    counts: Histogram,
    what: str,
    threshold: float | None = None,
    width: int = 320,
    height: int = 150,
) -> str:
    """Draws kept above pruned weights by magnitude or score, with a line at the threshold."""
    edges, kept, pruned = binned(counts)
    if not edges:
        return '<p class="quiet">no weight but zeros</p>'
    top, base, left = 18, height - 22, 2
    wide = (width - 2 * left) / len(kept)
    most = max(k + p for k, p in zip(kept, pruned, strict=True))
    parts = []
    for index, (k, p) in enumerate(zip(kept, pruned, strict=True)):
        x, y = left + index * wide, float(base)
        for count, kind in ((p, "pruned"), (k, "kept")):
            if count:
                tall = count / most * (base - top)
                y -= tall
                parts.append(
                    f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" '
                    f'width="{max(wide - 0.6, 0.4):.2f}" height="{tall:.2f}"/>'
                )
    parts.append(f'<line class="axis" x1="0" y1="{base}" x2="{width}" y2="{base}"/>')
    low, scale = math.log2(edges[0]), wide * STEPS

    def at(value: float) -> float:
        return left + (math.log2(value) - low) * scale

    for power in _ticks(edges[0], edges[-1]):
        x = at(10.0**power)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>')
        anchor = "start" if x < 16 else "end" if x > width - 16 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">{_power(power)}</text>'
        )
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        parts += _threshold_line(at(threshold), threshold, width, top, base)
    label = f"{what}: {sum(kept):,} kept, {sum(pruned):,} pruned"
    if threshold is not None:
        label += f", lowest kept {threshold:.3g}"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{in_html(label)}">'
        f"<title>{in_html(label)}</title>{''.join(parts)}</svg>"
    )


def arcs(layers: Sequence[LayerFacts], row: int = 20, reach: int = 240) -> str:
    """Draws the layers one below the other, with an arc from each to those that it feeds."""
    places = {layer.name: row * index + row / 2 for index, layer in enumerate(layers)}
    parts = []
    for layer in layers:
        y = places[layer.name]
        for before in layer.producers:
            start = places.get(before, y)
            bend = reach - max(12, reach * abs(y - start) / (row * len(layers)))
            if start != y:
                parts.append(
                    f'<path class="arc" d="M{reach} {start:g}C{bend:.0f} {start:g} '
                    f'{bend:.0f} {y:g} {reach} {y:g}"/>'
                )
        kind = "alarm-dot" if layer.empty else "dot"
        parts.append(f'<circle class="{kind}" cx="{reach}" cy="{y:g}" r="4"/>')
        half = _LONGEST // 2
        long = len(layer.name) > _LONGEST
        shown = f"{layer.name[:half]}…{layer.name[-half:]}" if long else layer.name
        text = in_html(f"{shown}, empty" if layer.empty else shown)
        parts.append(f'<text x="{reach + 10}" y="{y + 4:g}">{text}</text>')
    label = f"{len(layers)} layers and what feeds them"
    return (
        f'<svg viewBox="0 0 {reach + 520} {row * len(layers)}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
    )


def _threshold_line(x: float, threshold: float, width: int, top: int, base: int) -> list[str]:
    """Draws the line of the lowest kept score, with its value on the side that has space."""
    right = x < width * 0.6
    near, anchor = (x + 4, "start") if right else (x - 4, "end")
    return [
        f'<line class="threshold" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{base}"/>',
        f'<text class="threshold-label" x="{near:.1f}" y="{top - 6}" text-anchor="{anchor}">'
        f"lowest kept {threshold:.3g}</text>",
    ]


def _ticks(low: float, high: float) -> list[int]:
    """Chooses powers of ten between two values: every n-th, so that about four remain."""
    powers = list(range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1))
    step = math.ceil(len(powers) / 5) or 1
    return powers[::step]


def _power(power: int) -> str:
    """Writes a power of ten as the label of a tick.

    Example:
        >>> [_power(p) for p in (-5, -2, 0, 1, 4)]
        ['1e-5', '0.01', '1', '10', '1e4']
    """
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power}"
