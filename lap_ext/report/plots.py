# SPDX-License-Identifier: MIT
"""Draws the plots of a report for notebooks and papers.

It needs matplotlib (pip install "lap_ext[plot]").
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from lap_ext._files import replacing
from lap_ext._text import visible
from lap_ext.errors import LapImportError, LapValueError
from lap_ext.report.facts import STEPS, Facts, Histogram, binned

_KEPT, _PRUNED, _MASS = "#1b6ca8", "#b45309", "#1f7a66"  # as on the page
_NAMED = 60  # layers whose names can still be read on an axis
_LONGEST = 64  # letters of a name
_LARGEST = 1e300  # on an axis: matplotlib's ticks beyond it overflow
_PLAIN = {"parse_math": False, "usetex": False}  # of texts with names: no letter is a command


class Row(Protocol):
    """The counts of a layer: a row of a PruneResult, or LayerFacts."""

    name: str
    kept: int
    total: int

    @property
    def sparsity(self) -> float: ...  # noqa: D102 (the fraction removed)


def layers(rows: Sequence[Any], title: str = "") -> Any:
    """Draws the sparsity and the weights of each layer, or the kept mass, where rows have it.

    Args:
        rows: `PruneResult.layers` or `Facts.layers` (see `Row`).
        title: the text above the figure.

    Returns:
        A matplotlib Figure, which a notebook displays.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure_of = _matplotlib()
    mass = bool(rows) and hasattr(rows[0], "mass")
    height = max(1.6, 0.24 * min(len(rows), _NAMED) + 1.2)
    figure = figure_of(figsize=(9, height), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    positions = range(len(rows))
    left.barh(positions, [100 * row.sparsity for row in rows], color=_PRUNED, height=0.7)
    left.set_xlim(0, 100)
    left.set_xlabel("sparsity (%)")
    if mass:
        right.barh(positions, [100 * row.mass for row in rows], color=_MASS, height=0.7)
        right.set_xlim(0, 100)
        right.set_xlabel("kept mass (% of the sum of squares)")
    else:
        right.barh(
            positions, [row.total for row in rows], color="0.88", height=0.7, label="removed"
        )
        right.barh(positions, [row.kept for row in rows], color=_KEPT, height=0.7, label="kept")
        right.set_xlabel("weights")
        right.legend(frameon=False, fontsize=8)
    if len(rows) <= _NAMED:
        left.set_yticks(positions, [_short(row.name) for row in rows], fontsize=8, **_PLAIN)
    else:
        left.set_ylabel("layer")
    left.invert_yaxis()
    _plain(left, right)
    if title:
        figure.suptitle(_short(title), fontsize=11, **_PLAIN)
    return figure


def distributions(facts: Facts, most: int = 24) -> Any:
    """Draws the distributions of the scores (or magnitudes) of at most so many layers.

    The figure says how many layers are left out; `distributions(facts, len(facts.layers))` draws
    all.
    """
    figure_of = _matplotlib()
    shown = list(facts.layers)[:most]
    columns = min(3, max(1, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    size = 3 * columns, 2.1 * lines + 0.5
    figure = figure_of(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, layer in zip(panels, shown, strict=False):
        _bars(panel, layer.scores or layer.weights)
        if layer.threshold:
            panel.axvline(layer.threshold, color="0.1", ls="--", lw=1)
        panel.set_title(_short(layer.name), fontsize=8, **_PLAIN)
        panel.set_xlabel("score" if layer.scores else "|weight|", fontsize=8)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    _plain(*panels)
    if panels[0].patches:
        panels[0].legend(frameon=False, fontsize=7)
    if left := len(facts.layers) - len(shown):
        text = f"The first {len(shown)} of {len(facts.layers)} layers; {left} are left out."
        figure.suptitle(text, fontsize=9)
    return figure


def save(path: str | os.PathLike[str], figure: Any) -> None:
    """Writes a figure atomically, in the format that the suffix names (.png, .pdf, .svg)."""
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a script that the font lacks
        figure.savefig(file, format=Path(path).suffix.lstrip(".") or "png")


def check(path: Path) -> None:
    """Checks that matplotlib is installed and can write the format that the suffix names.

    It draws a plot without layers in this format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib cannot write this format.
    """
    figure, known = layers([]), "a name that ends in .png, .pdf, .svg"
    if path.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise LapValueError(known, repr(str(path)))
    try:
        figure.savefig(BytesIO(), format=path.suffix.lstrip("."))
    except Exception as error:  # .pgf needs LaTeX
        why = " ".join(str(error).split()).rstrip(".")
        raise LapValueError(known, f"{str(path)!r}: {why}", "Use one of these.") from None


def _bars(panel: Any, counts: Histogram) -> None:
    edges, kept, pruned = binned(counts)
    if not edges:
        return
    widths = [high - low for low, high in pairwise(edges)]
    style = {"align": "edge", "linewidth": 0}
    panel.bar(edges[:-1], pruned, widths, color=_PRUNED, label="pruned", **style)
    panel.bar(edges[:-1], kept, widths, bottom=pruned, color=_KEPT, label="kept", **style)
    panel.set_xscale("log")
    panel.set_xlim(edges[0], min(edges[-1] * 2 ** (1 / STEPS), sys.float_info.max))
    if edges[-1] > _LARGEST:
        panel.set_xticks([])
        panel.set_xticks([], minor=True)
    panel.set_yticks([])


def _short(name: str) -> str:
    """Makes a name visible, and leaves out the middle of a long one, as matplotlib is slow then."""
    half = _LONGEST // 2
    return visible(name if len(name) <= _LONGEST else f"{name[:half]}…{name[-half:]}")


def _plain(*panels: Any) -> None:
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)


def _matplotlib() -> Any:
    """Imports the Figure of matplotlib, without pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise LapImportError(
            "the matplotlib package (it draws)",
            "none",
            'Run: pip install "lap_ext[plot]".',
            name="matplotlib",
        ) from None

    class Picture(Figure):
        """A figure that a notebook displays, though pyplot does not know it."""

        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return Picture
