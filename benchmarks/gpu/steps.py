# SPDX-License-Identifier: MIT
"""Steps with time limits, each in a process of its own; the results of all in one JSON.

A step writes what it has found so far; the parent merges it every few seconds and at the step's
end, whether it ended well, failed, or was stopped at its limit with all its children. Output goes
to files, never through pipes: a child that is left over keeps nobody waiting.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.machine import ROOT, cores
from benchmarks.report import write_json

Save = Callable[[dict[str, Any]], None]

BUDGET_S = 470.0  # of all steps: under eight minutes
LEAST_SHARE = 1 / 3  # a step that has less of its limit left is not started
_KILLED_AFTER_S = 3.0  # from the request to end to the end
_LOOKS_S = 0.05  # between two looks at the steps that run
_MERGES_S = 5.0  # between two writings of what running steps have found
TAIL = 3000  # characters of a failed step's output that are kept
TRACE = 12_000  # and of a failed check: room for all its mismatches


class NotRunError(Exception):
    """A step that cannot run here; the text says why."""


@dataclass(frozen=True)
class Step:
    """A name, the seconds it may take, and when it runs.

    first: alone with the other first ones; if one fails, nothing else is worth running.
    together: at the same time as its neighbors in the list; else by itself.
    """

    name: str
    limit_s: float
    first: bool = False
    together: bool = False
    share: float = 0.125  # of the cores, for its threads, while it runs together with others
    leaves: str | None = None  # a file that it writes beside its findings, kept with the results

    @property
    def group(self) -> tuple[bool, bool, str]:
        """What neighbors have in common that run at the same time."""
        return self.first, self.together, "" if self.together else self.name


@dataclass
class Outcome:
    """What became of a step: ok, failed, timed out, stopped, or not run."""

    status: str
    seconds: float
    limit_s: float
    reason: str | None = None
    findings: dict[str, Any] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        """Whether it is a failure; what cannot run here is none."""
        return self.status not in {"ok", "not run", "running"}

    def as_json(self) -> dict[str, Any]:
        """Returns it for the results."""
        return {
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "limit_s": round(self.limit_s, 1),
            "reason": self.reason,
            "findings": self.findings,
        }


def groups(steps: Sequence[Step]) -> list[list[Step]]:
    """Neighbors that run at the same time, in order."""
    found: list[list[Step]] = []
    for step in steps:
        if found and found[-1][0].group == step.group:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def limits(steps: Sequence[Step], budget_s: float = BUDGET_S) -> float:
    """Adds up the seconds of all limits; they must fit the budget."""
    total = sum(max(step.limit_s for step in group) for group in groups(steps))
    if total > budget_s:
        raise ValueError(f"expected limits that sum to at most {budget_s:g} s, got {total:g}.")
    return total


# --- processes ------------------------------------------------------------------------------------


def start(
    command: Sequence[str], output: IO[bytes], env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Starts a command in a group of its own, which can be ended with all its children."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(processes: Sequence[subprocess.Popen[bytes]], grace_s: float = _KILLED_AFTER_S) -> None:
    """Asks groups of processes to end (pytest then sums up), waits grace_s, and ends them."""
    for process in processes:
        _signal(process, signal.SIGINT)
    latest = time.perf_counter() + grace_s
    for process in processes:
        try:
            process.wait(max(latest - time.perf_counter(), 0.01))
        except subprocess.TimeoutExpired:
            pass
        _signal(process, signal.SIGKILL)  # and the children that are left over
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def run_command(
    command: Sequence[str],
    limit_s: float,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    grace_s: float = _KILLED_AFTER_S,
) -> tuple[int | None, str]:
    """Runs a command; returns (exit code, None at the limit; output). Ends the command's group."""
    with log.open("w+b") if log else tempfile.TemporaryFile() as output:
        process = start(command, output, env or {})
        try:
            code: int | None = process.wait(limit_s)
            end([process], 0)
        except subprocess.TimeoutExpired:
            code = None
            end([process], grace_s)
        except BaseException:
            end([process], 1)
            raise
        output.seek(0)
        return code, output.read().decode(errors="replace")


def saver(path: Path) -> Save:
    """Adds to a step's findings, and writes all of them each time."""
    found: dict[str, Any] = {}

    def save(more: dict[str, Any]) -> None:
        found.update(more)
        write_json(path, found)

    return save


def read(path: Path) -> dict[str, Any]:
    """Reads a step's findings; nothing if it wrote none."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


class Running:
    """A step in a process of its own, from its start to its outcome."""

    def __init__(
        self,
        step: Step,
        arguments: Sequence[str],
        directory: Path,
        limit_s: float,
        env: Mapping[str, str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.step, self.limit_s = step, limit_s
        self._piece, self._log = directory / f"{step.name}.json", directory / f"{step.name}.txt"
        for old in (self._piece, directory / (step.leaves or self._piece.name)):
            old.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--step", step.name]
        command += ["--piece", str(self._piece), "--limit", f"{limit_s:.1f}", *arguments]
        self._begin = time.perf_counter()
        with self._log.open("wb") as output:
            self.process = start(command, output, {"PYTHONUNBUFFERED": "1", **(env or {})})

    def _outcome(self, status: str, reason: str | None) -> Outcome:
        findings = read(self._piece)
        cannot = findings.pop("not_run", None)
        if status == "ok" and cannot:
            status, reason = "not run", cannot
        return Outcome(status, time.perf_counter() - self._begin, self.limit_s, reason, findings)

    def so_far(self, status: str = "running") -> Outcome:
        """Returns what it has found until now."""
        return self._outcome(status, None)

    def look(self) -> Outcome | None:
        """Returns its outcome once it has ended; ends it when its time is up."""
        code = self.process.poll()
        if code is None:
            if time.perf_counter() - self._begin < self.limit_s:
                return None
            end([self.process])
            return self._outcome("timed out", f"stopped at {self.limit_s:.0f} s")
        end([self.process], 0)  # its children, if it left any
        if code != 0:
            text = self._log.read_text(errors="replace").strip()[-TAIL:]
            return self._outcome("failed", text or f"exit code {code}")
        return self._outcome("ok", None)


Changed = Callable[[str, Outcome], None]


def run_together(
    steps: Sequence[Step],
    arguments: Sequence[str],
    directory: Path,
    left_s: float,
    changed: Changed,
) -> dict[str, Outcome]:
    """Runs steps at the same time, within left_s.

    `changed` hears of each outcome, and every few seconds of what running steps have found. If this
    process is stopped meanwhile, it hears of all that was found, then the steps end.
    """
    outcomes: dict[str, Outcome] = {}
    running: list[Running] = []

    def done(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        changed(name, outcome)

    try:
        for step in steps:
            limit_s = min(step.limit_s, left_s)
            if limit_s < step.limit_s * LEAST_SHARE:
                done(step.name, Outcome("not run", 0.0, step.limit_s, "no time left"))
                continue
            env = threads(step.share) if len(steps) > 1 else {}
            running.append(Running(step, arguments, directory, limit_s, env))
        merged = time.perf_counter()
        while running:
            time.sleep(_LOOKS_S)
            for one in list(running):
                outcome = one.look()
                if outcome is not None:
                    running.remove(one)
                    done(one.step.name, outcome)
            if time.perf_counter() - merged > _MERGES_S:
                for one in running:
                    changed(one.step.name, one.so_far())
                merged = time.perf_counter()
    except BaseException:
        for one in running:
            changed(one.step.name, one.so_far("stopped"))
        end([one.process for one in running])
        raise
    return outcomes


def threads(share: float) -> dict[str, str]:
    """Gives a share of the cores to a process's threads, which wait without spinning."""
    return {
        "OMP_NUM_THREADS": str(max(1, round(cores() * share))),
        "OMP_WAIT_POLICY": "passive",
    }


def run_step(step: Step, arguments: Sequence[str], directory: Path, limit_s: float) -> Outcome:
    """Runs one step by itself and judges how it ended."""
    return run_together([step], arguments, directory, limit_s, lambda *_: None)[step.name]


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
            found[name] = traceback.format_exc()[-TRACE:]
            failed.append(name)
            print(f"{name}: {found[name][-TAIL:]}", file=sys.stderr)
        save({"checks": found})
    if failed:
        raise AssertionError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
