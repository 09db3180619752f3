# SPDX-License-Identifier: MIT
"""Steps with time limits, each in a process of its own; the results of all in one JSON.

A step writes what it has found so far; the parent merges it after the step, whether it ended well,
failed, or was stopped at its limit with all its children. The next step runs in any case.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.report import write_json

Save = Callable[[dict[str, Any]], None]

BUDGET_S = 470.0  # of all steps: under eight minutes
LEAST_S = 3.0  # a step that has less left is not started
_KILLED_AFTER_S = 3.0  # from the request to end to the end
TAIL = 3000  # characters of a failed step's output that are kept


class NotRunError(Exception):
    """A step that cannot run here; the text says why."""


@dataclass(frozen=True)
class Step:
    """A name, the seconds it may take, and whether it needs a GPU (or a rehearsal)."""

    name: str
    limit_s: float
    gpu: bool = True


@dataclass
class Outcome:
    """What became of a step: ok, failed, timed out, or not run."""

    status: str
    seconds: float
    limit_s: float
    reason: str | None = None
    findings: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the results."""
        return {
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "limit_s": round(self.limit_s, 1),
            "reason": self.reason,
            "findings": self.findings,
        }


def limits(steps: Sequence[Step], budget_s: float = BUDGET_S) -> float:
    """The sum of the limits; it must fit the budget."""
    total = sum(step.limit_s for step in steps)
    if total > budget_s:
        raise ValueError(f"expected limits that sum to at most {budget_s:g} s, got {total:g}.")
    return total


def run_command(
    command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """(exit code, None at the limit; its output). Ends the command's whole group."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None, _end(process)
        except BaseException:
            _end(process)
            raise
        return process.returncode, output


def _end(process: subprocess.Popen[str]) -> str:
    """Asks the process group to end (pytest then sums up), then ends it; what it has printed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            return process.communicate(timeout=_KILLED_AFTER_S)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


def saver(path: Path) -> Save:
    """Adds to a step's findings, and writes all of them each time."""
    found: dict[str, Any] = {}

    def save(more: dict[str, Any]) -> None:
        found.update(more)
        write_json(path, found)

    return save


def read(path: Path) -> dict[str, Any]:
    """A step's findings; nothing if it wrote none."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def run_step(step: Step, arguments: Sequence[str], folder: Path, limit_s: float) -> Outcome:
    """Runs a step in a process of its own and judges how it ended."""
    if limit_s < LEAST_S:
        return Outcome("not run", 0.0, step.limit_s, "no time left")
    piece = folder / f"{step.name}.json"
    piece.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--step", step.name, "--piece", str(piece)]
    command += ["--limit", f"{limit_s:.1f}", *arguments]
    begin = time.perf_counter()
    code, output = run_command(command, limit_s, {"PYTHONUNBUFFERED": "1"})
    seconds = time.perf_counter() - begin
    findings = read(piece)
    reason = findings.pop("not_run", None)
    if code is None:
        return Outcome("timed out", seconds, limit_s, f"stopped at {limit_s:.0f} s", findings)
    if code != 0:
        text = output.strip()[-TAIL:] or f"exit code {code}"
        return Outcome("failed", seconds, limit_s, text, findings)
    return Outcome("not run" if reason else "ok", seconds, limit_s, reason, findings)


def each(checks: Mapping[str, Callable[[], str | None]], save: Save) -> None:
    """Runs independent checks; one that fails does not keep the next from running.

    A check returns what else is to be known about it. Raises at the end if one failed.
    """
    found: dict[str, str] = {}
    failed = []
    for name, check in checks.items():
        try:
            found[name] = check() or "ok"
        except NotRunError as error:
            found[name] = f"not run: {error}"
        except Exception:
            found[name] = traceback.format_exc()[-TAIL:]
            failed.append(name)
            print(f"{name}: {found[name]}", file=sys.stderr)
        save({"checks": found})
    if failed:
        raise AssertionError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
