# SPDX-License-Identifier: MIT
"""The plot of time against size: the rows of bench_size.py, ours and the baselines, log-log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import replace
from benchmarks.rows import Row

OURS = "lap_ext.mask_from_norms"
FLOOR = "torch.gt, threshold known"
STYLE: dict[str, dict[str, Any]] = {
    OURS: {"color": "tab:red", "marker": "o", "linewidth": 2.5, "zorder": 3},
    FLOOR: {"color": "tab:gray", "marker": ".", "linestyle": "--"},
}


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Writes a PNG; the shaded band of a line is between its quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[int, float, float, float]]] = {OURS: []}
    for row in rows:
        lines[OURS].append((row.n, row.time.median, row.time.q1, row.time.q3))
        for baseline in row.baselines:
            name = FLOOR if baseline.name == "torch.gt" else f"eager score + {baseline.name}"
            time = baseline.time
            lines.setdefault(name, []).append((row.n, time.median, time.q1, time.q3))
    figure, axes = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    for name, points in lines.items():
        n, middle, low, high = ([float(x) for x in column] for column in zip(*points, strict=True))
        style = STYLE.get(name, {"marker": "."})
        (drawn,) = axes.loglog(n, middle, label=name, **style)
        axes.fill_between(n, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("weights (float32)")
    axes.set_ylabel("seconds for an exact mask of 10 %")
    axes.set_title(title, fontsize=10)
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False)
    replace(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    pyplot.close(figure)
