# SPDX-License-Identifier: MIT
"""Finished cells to tables, sentences and a plot; trains nothing.

mean ± deviation    over the seeds (sample standard deviation)
gain over MP        seed by seed: both start from the same dense net, and what differs between
seeds drops out
ahead, behind       0 is outside the 95 % interval of the mean gain (Student's t)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.methods import METHODS
from benchmarks.paper.store import Cell, Key, Store
from benchmarks.report import replace

BASELINE = "mp"
DRAWN = ("mp", "lap", "lfp", "lbp", "lap-5", "obd", "obd-lap", "lamp", "lap-lamp", "rp")
BOLD = ("mp", "lap")
LEVEL_OF_TRUST = 0.95
ENOUGH = 3  # seeds for an interval
FULL_COLOR = 25  # points
Values = dict[int, float]  # seed -> accuracy


@dataclass(frozen=True)
class Gain:
    """Accuracy of a method minus the baseline's, over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """In points."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """The deviation over seeds, 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def verdict(self) -> str:
        """Ahead or behind, "" where chance may have made the difference, "?" with too few seeds."""
        n = len(self.values)
        if n < ENOUGH:
            return "?"
        from scipy import stats

        half = stats.t.ppf((1 + LEVEL_OF_TRUST) / 2, n - 1) * self.spread / math.sqrt(n)
        return "ahead" if self.mean > half else "behind" if self.mean < -half else ""

    def __str__(self) -> str:
        text = f"{self.mean:+.1f}"
        return f"{text} ± {self.spread:.1f}" if len(self.values) > 1 else text


@dataclass(frozen=True)
class Part:
    """The finished cells of one net."""

    net: str
    dense: Values
    kept: dict[int, float]  # level -> per cent
    tuned: dict[str, dict[int, Values]]  # method -> level -> accuracies after fine-tuning
    pruned: dict[str, dict[int, Values]]  # and right after pruning

    def gain(self, method: str, level: int, tuned: bool = True) -> Gain | None:
        """Returns the gain over the baseline, on the seeds that both have."""
        found = self.tuned if tuned else self.pruned
        ours = found.get(method, {}).get(level, {})
        theirs = found.get(BASELINE, {}).get(level, {})
        values = tuple(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))
        return Gain(values) if values else None


def parts(store: Store, keys: Iterable[Key]) -> list[Part]:
    """Collects what is finished of these cells, a part for each net."""
    nets: dict[str, list[Cell]] = {}
    for key in keys:
        if key in store:
            nets.setdefault(key.net, []).append(store.cells[key])
    return [_part(net, cells) for net, cells in nets.items()]


def _part(net: str, cells: Sequence[Cell]) -> Part:
    part = Part(net, {}, {}, {}, {})
    for cell in cells:
        key = cell.key
        if key.level == 0:
            part.dense[key.seed] = cell.tuned
            continue
        part.kept[key.level] = cell.kept
        for values, value in ((part.tuned, cell.tuned), (part.pruned, cell.pruned)):
            values.setdefault(key.method, {}).setdefault(key.level, {})[key.seed] = value
    return part


def show(values: Mapping[int, float]) -> str:
    """Writes the mean, with the deviation where there are several seeds."""
    found = list(values.values())
    mean = f"{statistics.mean(found):.1f}"
    return f"{mean} ± {statistics.stdev(found):.1f}" if len(found) > 1 else mean


def per_cent(kept: float) -> str:
    """Writes two decimals, for less than 0.1 % two digits."""
    return f"{kept:.2f}" if kept >= 0.1 else f"{kept:.2g}"


def accuracies(part: Part, tuned: bool = True) -> tuple[list[str], list[list[str]]]:
    """Makes (head, rows): methods down, levels across; ** marks the best mean of a level."""
    found = part.tuned if tuned else part.pruned
    head = ["kept %", *map(per_cent, part.kept.values())]
    best = {
        level: max(statistics.mean(m[level].values()) for m in found.values() if level in m)
        for level in part.kept
    }
    rows = []
    for method, levels in found.items():
        row = [METHODS[method].name]
        for level in part.kept:
            text = show(levels[level]) if level in levels else ""
            top = level in levels and statistics.mean(levels[level].values()) == best[level]
            row.append(f"**{text}**" if top else text)
        rows.append(row)
    return head, rows


def against(part: Part, method: str) -> tuple[list[str], list[list[str]]]:
    """Makes (head, rows): a method and the baseline, level by level."""
    names = [METHODS[name].name for name in (BASELINE, method)]
    head = ["kept %", *names, "gain", "seeds ahead", "verdict"]
    rows = []
    for level, kept in part.kept.items():
        gain = part.gain(method, level)
        if gain is None:
            continue
        cells = [show(part.tuned[name][level]) for name in (BASELINE, method)]
        ahead = f"{sum(value > 0 for value in gain.values)} of {len(gain.values)}"
        rows.append([per_cent(kept), *cells, str(gain), ahead, gain.verdict or "no difference"])
    return head, rows


def title(part: Part) -> str:
    """Says what the numbers are."""
    seeds = len(part.dense)
    what = f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"
    return f"{part.net}: test accuracy in %, {what}, dense {show(part.dense)}"


def print_tables(found: Sequence[Part], console: Any) -> None:
    """Prints all accuracies after fine-tuning, and lookahead against the baseline."""
    from rich.table import Table

    for part in found:
        tables = [(title(part), accuracies(part))]
        if {"lap", BASELINE} <= part.tuned.keys():
            tables.append((f"{part.net}: LAP against MP, seed by seed", against(part, "lap")))
        for heading, (head, rows) in tables:
            console.print(f"\n[bold]{heading}[/]", soft_wrap=True, highlight=False)
            table = Table(header_style="")  # a title would be wrapped to the table's width
            for name in head:
                table.add_column(name, justify="left" if name == "kept %" else "right")
            for row in rows:
                table.add_row(*(_bold(cell) for cell in row))
            console.print(table)


def _bold(cell: str) -> str:
    return f"[bold]{cell[2:-2]}[/]" if cell.startswith("**") else cell


def markdown(found: Sequence[Part]) -> str:
    """Makes the same tables for a README, and the accuracies before fine-tuning."""
    lines: list[str] = []
    for part in found:
        tables = [("", accuracies(part)), (" (right after pruning)", accuracies(part, tuned=False))]
        if {"lap", BASELINE} <= part.tuned.keys():
            tables.append((" (LAP against MP, seed by seed)", against(part, "lap")))
        for extra, (head, rows) in tables:
            lines += [f"{title(part)}{extra}", "", "| " + " | ".join(head) + " |"]
            lines += ["|" + "---|" * len(head)]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def draw(found: Sequence[Part], path: Path) -> None:
    """Draws accuracy against kept weights, and below each method's gain over the baseline."""
    from matplotlib.figure import Figure

    tall = max(len(part.tuned) for part in found)
    figure = Figure(figsize=(7 * len(found), 4 + 0.32 * tall), dpi=130, layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False, height_ratios=(4, 0.32 * tall))
    for column, part in enumerate(found):
        _curves(panels[0][column], part)
        _gains(panels[1][column], part)
    figure.suptitle("Lookahead pruning, one-shot, fine-tuned with the masks kept")
    replace(path, lambda file: figure.savefig(file, format="png"))


def _curves(panel: Any, part: Part) -> None:
    from matplotlib.ticker import NullLocator

    for method in DRAWN:
        levels = part.tuned.get(method, {})
        if not levels:
            continue
        kept = [part.kept[level] for level in levels]
        mean = [statistics.mean(values.values()) for values in levels.values()]
        error = [Gain(tuple(values.values())).spread for values in levels.values()]
        style: dict[str, Any] = {"lw": 1.2, "alpha": 0.8, "color": f"C{DRAWN.index(method)}"}
        if method in BOLD:
            style |= {"lw": 2.6, "zorder": 3, "alpha": 1}
        panel.errorbar(
            kept, mean, error, marker=".", capsize=2, label=METHODS[method].name, **style
        )
    panel.axhline(statistics.mean(part.dense.values()), color="0.5", ls="--", lw=1, label="dense")
    panel.set_xscale("log")
    panel.set_xticks(list(part.kept.values()), list(map(per_cent, part.kept.values())))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.invert_xaxis()
    panel.set_title(title(part), fontsize=10)
    panel.set_xlabel("weights kept (%, log scale)")
    panel.set_ylabel("test accuracy after fine-tuning (%)")
    panel.grid(axis="y", color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc="lower left")


def _gains(panel: Any, part: Part) -> None:
    methods = [method for method in part.tuned if method != BASELINE]
    grid = [[part.gain(method, level) for level in part.kept] for method in methods]
    means = [[math.nan if gain is None else gain.mean for gain in row] for row in grid]
    panel.set_title("points over MP, seed by seed (bold: outside the 95 % interval)", fontsize=10)
    panel.set_xticks(range(len(part.kept)), [f"{per_cent(kept)} %" for kept in part.kept.values()])
    panel.set_yticks(range(len(methods)), [METHODS[method].name for method in methods])
    panel.tick_params(length=0)
    if not methods:
        return
    panel.imshow(means, cmap="RdBu", vmin=-FULL_COLOR, vmax=FULL_COLOR, aspect="auto")
    for y, row in enumerate(grid):
        for x, gain in enumerate(row):
            if gain is None:
                continue
            weight = "bold" if gain.verdict in ("ahead", "behind") else "normal"
            color = "white" if abs(gain.mean) > 0.6 * FULL_COLOR else "black"
            style = {"fontsize": 7, "weight": weight, "color": color}
            panel.text(x, y, str(gain), ha="center", va="center", **style)
