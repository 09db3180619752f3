# SPDX-License-Identifier: MIT
"""Quotes results in README.md, between its markers.

    python -m benchmarks.quote benchmarks/results/<machine>.json

The tables are those of the JSON file, made with the functions of report.py: nothing is typed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.rows import Baseline, MemoryRow, Row, Target
from benchmarks.timing import Stats

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
README = Path(__file__).parent / "README.md"


def _rows(results: dict[str, Any]) -> list[Row]:
    rows = []
    for stored in results["rows"]:
        baselines = [
            Baseline(x["name"], Stats(**x["time"]), Stats(**x["ratio"])) for x in stored["rivals"]
        ]
        targets = [Target(x["ratio"], tuple(x["against"])) for x in stored["targets"]]
        fields = {key: stored[key] for key in Row.__dataclass_fields__ if key in stored}
        fields.update(time=Stats(**stored["time"]), baselines=baselines, targets=targets)
        rows.append(Row(**fields))
    return rows


def _memory(results: dict[str, Any]) -> list[MemoryRow]:
    fields = MemoryRow.__dataclass_fields__
    return [MemoryRow(**{key: row[key] for key in fields}) for row in results["memory"]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in rows]
    return [*lines, ""]


def markdown(results: dict[str, Any], plot: str) -> str:
    """Makes all tables, headed by the machine."""
    machine = results["machine"]
    isa = machine["lap_ext"]["isa"] or "no native library"
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} "
        f"threads, SIMD level {isa}; torch {machine['torch']}, numpy {machine['numpy']}, lap_ext "
        f"{machine['lap_ext']['version']} at {machine['commit']}, {machine['date'][:10]}."
        + (" A quick run: small sizes." if results["quick"] else ""),
        "",
    ]
    lines += [f"Note: {note}.\n" for note in results["notes"]]
    rows = _rows(results)
    for group in dict.fromkeys(row.group for row in rows):
        cells = [report.cells(row) for row in rows if row.group == group]
        lines += [f"### {group}", "", *_table(report.HEAD, cells)]
        if group == "size":
            lines += [f"![time against size]({plot})", ""]
    memory = [report.memory_cells(row) for row in _memory(results)]
    if memory:
        lines += ["### memory", "", *_table(report.MEMORY_HEAD, memory)]
    return "\n".join(lines)


def main() -> int:
    """Rewrites README.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quote", description=__doc__)
    parser.add_argument("json", type=Path, help="a file that a run has written")
    parser.add_argument("--readme", type=Path, default=README, help="file with the two markers")
    args = parser.parse_args()
    text = args.readme.read_text()
    before, found, rest = text.partition(BEGIN)
    _, also, after = rest.partition(END)
    if not (found and also):
        print(f"{args.readme} has no {BEGIN} ... {END}", file=sys.stderr)
        return 1
    plot = os.path.relpath(args.json.with_suffix(".png"), args.readme.parent)
    tables = markdown(json.loads(args.json.read_text()), plot)
    new = f"{before}{BEGIN}\n{tables}{END}{after}"
    report.replace(args.readme, lambda file: file.write(new.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
