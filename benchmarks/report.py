# SPDX-License-Identifier: MIT
"""Results to a table on the terminal and to JSON; computes nothing.

A file is written beside its place and renamed, so that a reader never sees half of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Baseline, Bench, MemoryRow, Row
from benchmarks.timing import Stats
from lap_ext._files import replacing

HEAD = ("case", "call", "removed", "ms [quartiles]", "GB/s", "of limit", "baselines", "target")
MEMORY_HEAD = ("case", "call", "removed", "w, MB", "extra, MB", "beside masks", "target")
FLOORS = {"torch.gt", "w.clone()", "float32"}  # what ours is measured in units of


def milliseconds(time: Stats) -> str:
    """Writes median and quartiles in ms, three digits."""
    middle, low, high = (f"{1e3 * x:.3g}" for x in (time.median, time.q1, time.q3))
    return f"{middle} [{low}, {high}]"


def versus(baseline: Baseline, floor: bool = False) -> str:
    """Writes how ours compares: times faster than a baseline, or times the time of a floor."""
    ratio = baseline.ratio.median
    if baseline.name in FLOORS or floor:
        return f"{1 / ratio:.2f}x the time of {baseline.name}"
    return f"{baseline.name} {ratio:.3g}x"


def verdict(reached: bool | None) -> str:
    """Writes in a word whether a target is reached."""
    return "-" if reached is None else "reached" if reached else "MISSED"


def targets(row: Row) -> str:
    """Writes each target with its measured ratio."""
    lines = []
    for target in row.targets:
        baseline = target.decided_by(row.baselines)
        if baseline is not None:
            word = verdict(baseline.ratio.median >= target.least)
            lines.append(f"{word}: {versus(baseline, target.ratio <= 1)}, wanted {target}")
    return "\n".join(lines) or "-"


def cells(row: Row) -> tuple[str, ...]:
    """Makes a row of HEAD."""
    return (
        row.case,
        row.call,
        "-" if row.sparsity is None else f"{row.sparsity:g}",
        milliseconds(row.time),
        f"{row.bytes_per_s / 1e9:.3g}",
        f"{row.of_limit:.0%}",
        "\n".join(versus(baseline) for baseline in row.baselines),
        targets(row),
    )


def memory_cells(row: MemoryRow) -> tuple[str, ...]:
    """Makes a row of MEMORY_HEAD."""
    return (
        row.case,
        row.call,
        f"{row.sparsity:g}",
        f"{row.w_bytes / 1e6:.0f}",
        f"{row.extra_bytes / 1e6:.1f}",
        f"{row.beside_masks:+.1%} of w",
        "-" if row.reached is None else f"{verdict(row.reached)}: <= {row.LEAVE:.0%}",
    )


def line(row: Row | MemoryRow) -> str:
    """Makes one line, printed as soon as the row is there."""
    if isinstance(row, MemoryRow):
        case, call, sparsity, _, extra, beside, target = memory_cells(row)
        return f"memory: {case} · {call} · {sparsity} · {extra} MB · {beside} · {target}"
    case, call, sparsity, time, rate, limit, baselines, _ = cells(row)
    baselines = " · ".join(baselines.splitlines())
    word = verdict(row.reached)
    return (
        f"{row.group}: {case} · {call} · {sparsity} · {time} ms · {rate} GB/s · "
        f"{limit} of limit · {baselines} · {word}"
    )


def print_tables(bench: Bench, console: Console) -> None:
    """Prints all rows, a table a group."""
    for group in dict.fromkeys(row.group for row in bench.rows):
        rows = [cells(row) for row in bench.rows if row.group == group]
        console.print(_table(group, HEAD, rows))
    if bench.memory:
        rows = [memory_cells(row) for row in bench.memory]
        console.print(_table("memory", MEMORY_HEAD, rows))
    every: list[Row | MemoryRow] = [*bench.rows, *bench.memory]
    judged = [row.reached for row in every if row.reached is not None]
    console.print(f"targets reached: {sum(judged)} of {len(judged)}")


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, show_lines=True)
    for name in head:
        table.add_column(name, overflow="fold", min_width=min(len(name), 8))
    for row in rows:
        table.add_row(*row)
    return table


def as_json(bench: Bench, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns all that was measured; times in seconds, memory in bytes."""
    return {
        "machine": facts,
        "quick": bench.quick,
        "bandwidth": bench.bandwidth.measured(),
        "notes": bench.notes,
        "rows": [_row_json(row) for row in bench.rows],
        "memory": [
            {**asdict(row), "beside_masks": row.beside_masks, "reached": row.reached}
            for row in bench.memory
        ],
    }


def _row_json(row: Row) -> dict[str, Any]:
    stored = asdict(row)
    stored["rivals"] = stored.pop("baselines")  # the key of the files that there are
    stored["targets"] = [
        {**asdict(target), "text": str(target), "measured": target.measured(row.baselines)}
        for target in row.targets
    ]
    stored.update(bytes_per_s=row.bytes_per_s, of_limit=row.of_limit, reached=row.reached)
    return stored


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON indented, for diffs."""
    replace(path, lambda file: file.write(f"{json.dumps(content, indent=1)}\n".encode()))


def replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets write fill a file that replaces path, in a directory that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        write(file)
