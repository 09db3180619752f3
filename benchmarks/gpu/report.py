# SPDX-License-Identifier: MIT
"""Results to JSON and to lines on the terminal; computes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import Outcome
from benchmarks.report import replace, verdict, write_json

SPAN = "span"  # of the kernels of a call, from the first one's begin to the last one's end
COUNTED = {
    "us": "us",
    "dram_percent": "% of DRAM's throughput",
    "sm_percent": "% of the processors'",
    "occupancy_percent": "% occupancy",
}


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes all results so far, beside the file, and renames it."""
    write_json(path, content)


def write_lines(path: Path, content: dict[str, Any]) -> None:
    """Writes long tables: one line an entry, so that a difference reads well."""
    parts = []
    for key, value in content.items():
        parts.append(f"{json.dumps(key)}: {_table(value)}")
    text = "{\n " + ",\n ".join(parts) + "\n}\n"
    replace(path, lambda file: file.write(text.encode()))


def _table(value: Any) -> str:
    if isinstance(value, dict) and value:
        rows = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
        return "{\n  " + ",\n  ".join(rows) + "\n }"
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
    return json.dumps(value)


def step_line(name: str, outcome: Outcome) -> str:
    """Makes one line of a step; of a failure with the last line of its output."""
    text = f"{name}: {outcome.status} in {outcome.seconds:.1f} s"
    if outcome.reason:
        text += f" ({outcome.reason.strip().splitlines()[-1]})"
    return text


def summary(content: dict[str, Any]) -> str:
    """Makes the tables of all steps, short enough for the end of a log."""
    steps = content.get("steps", {})
    found = {name: step.get("findings", {}) for name, step in steps.items()}
    lines = [f"failed: {name}" for name in found.get("pytest", {}).get("failed", [])]
    lines += _limit(found.get("limit", {}), content.get("rehearsal", False))
    lines += _kernels(found.get("kernels", {}))
    lines += _baselines(found.get("baselines", {}))
    lines += _counters(found.get("counters", {}))
    return "\n".join(lines)


def _limit(found: dict[str, Any], rehearsal: bool) -> list[str]:
    if "copy_bytes_per_s" not in found:
        return []
    rate = found["copy_bytes_per_s"] / 1e12
    lines = [f"large copies: {rate:.3f} TB/s (read + written); rows are judged by their own size's"]
    judged = []
    for row in found.get("rows", []):
        sparsity = f", {row['sparsity']} removed" if "sparsity" in row else ""
        what = f"{row['call']} {row['dtype']} {'x'.join(map(str, row['shape']))}{sparsity}"
        time = f"{1e3 * row['seconds']:.3f} ms, {row['times_floor']:.2f}x the floor"
        if row["wanted"] is None:
            lines.append(f"no target: {what}: {time}")
            continue
        word = "rehearsed" if rehearsal else verdict(row["reached"])
        lines.append(f"{word}: {what}: {time}, wanted <= {row['wanted']}x")
        judged.append(row["reached"])
    for row in found.get("small", []):
        one, whole = row["given_norms"], row["with_neighbors"]
        word = "rehearsed" if rehearsal else verdict(row["reached"])
        lines.append(
            f"{word}: mask {'x'.join(map(str, row['shape']))}: {one['launches']} launches, "
            f"{1e6 * one['graph_s']:.1f} us in a graph; with neighbors {whole['launches']}, "
            f"{1e6 * whole['graph_s']:.1f} us"
        )
        judged.append(row["reached"])
    if not rehearsal:
        lines.append(f"targets reached: {sum(judged)} of {len(judged)}")
    return lines


def _kernels(found: dict[str, Any]) -> list[str]:
    lines = []
    for call, table in found.get("calls", {}).items():
        parts = [f"{name} {us:g}" for name, (_, us, _) in table.items() if name != SPAN]
        whole = table.get(SPAN, [0, 0.0, 0.0])[1]
        lines.append(f"us of {call}: {whole:g} in all: {', '.join(parts)}")
    return lines


def _counters(found: dict[str, Any]) -> list[str]:
    lines = []
    for row in found.get("kernels", []):
        numbers = [f"{row[key]:g} {unit}" for key, unit in COUNTED.items() if key in row]
        lines.append(f"counted: {row['kernel']}: {', '.join(numbers)}; {row['stall']}")
    return lines


def _baselines(found: dict[str, Any]) -> list[str]:
    lines = []
    for row in found.get("rows", []):
        if "times_faster" in row:
            times = f"{1e3 * row['ours_s']:.3f} ms against {1e3 * row['baseline_s']:.3f} ms"
            lines.append(
                f"{row['case']}: {row['ours']} {row['times_faster']:.3g}x faster than "
                f"{row['baseline']} ({times})"
            )
        else:
            peak = row["peak_bytes"]
            text = (
                "not measured" if peak is None else f"{peak / row['tensor_bytes']:.2f}x the tensor"
            )
            lines.append(f"{row['case']}: peak memory of {row['call']}: {text}")
    return lines
