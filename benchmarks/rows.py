# SPDX-License-Identifier: MIT
"""What a run collects: rows of times against baselines, rows of memory, and the targets they have.

    fraction of the memory limit = limit_s / time,
    limit_s = bytes to read / read bandwidth + bytes to write / write bandwidth

both measured in the same run on tensors of the same size (machine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.machine import Bandwidth
from benchmarks.timing import Call, Check, Stats, Timer

NOISE = 0.02


@dataclass(frozen=True)
class Contest:
    """A baseline's call, the check of its result against ours, and its number of pairs at most."""

    name: str
    call: Call
    check: Check | None = None
    pairs: int | None = None


@dataclass(frozen=True)
class Target:
    """The least baseline / ours, against the fastest of the named baselines."""

    ratio: float
    against: tuple[str, ...]

    def __str__(self) -> str:
        return f"<= {1 / self.ratio:.3g}x" if self.ratio <= 1 else f">= {self.ratio:g}x"

    @property
    def least(self) -> float:
        """The ratio from which on it is reached: "no slower" allows for the noise of the timing."""
        return self.ratio - (NOISE if self.ratio == 1 else 0)

    def decided_by(self, baselines: Sequence[Baseline]) -> Baseline | None:
        """Returns the baseline whose ratio counts; None where none of those was run."""
        found = [baseline for baseline in baselines if baseline.name in self.against]
        return min(found, key=lambda baseline: baseline.ratio.median, default=None)

    def measured(self, baselines: Sequence[Baseline]) -> float | None:
        """Returns the ratio that counts."""
        baseline = self.decided_by(baselines)
        return baseline.ratio.median if baseline else None


@dataclass(frozen=True)
class Baseline:
    """A baseline's time, and how many times longer than ours that is, pair by pair."""

    name: str
    time: Stats
    ratio: Stats


@dataclass(frozen=True)
class Row:
    """One call of ours on one case."""

    group: str
    case: str
    call: str
    sparsity: float | None
    n: int
    time: Stats
    read_bytes: int
    write_bytes: int
    limit_s: float
    baselines: list[Baseline]
    targets: list[Target]

    @property
    def bytes_per_s(self) -> float:
        """Bytes that must move, by the time."""
        return (self.read_bytes + self.write_bytes) / self.time.median

    @property
    def of_limit(self) -> float:
        """Fraction of the memory limit that is reached."""
        return self.limit_s / self.time.median

    @property
    def reached(self) -> bool | None:
        """Whether every target is; None without one."""
        ratios = [(target.measured(self.baselines), target.least) for target in self.targets]
        judged = [measured >= least for measured, least in ratios if measured is not None]
        return all(judged) if judged else None


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of one call beyond what it was given, results included."""

    case: str
    call: str
    sparsity: float
    w_bytes: int
    mask_bytes: int
    extra_bytes: int
    ours: bool

    LEAVE = 0.05  # of w's bytes, beside the masks
    JUDGED_FROM = 50_000_000  # bytes of w; below, the pages of the code itself count too much

    @property
    def beside_masks(self) -> float:
        """Extra memory without the masks, as a fraction of w's bytes."""
        return (self.extra_bytes - self.mask_bytes) / self.w_bytes

    @property
    def reached(self) -> bool | None:
        """Whether the target is; baselines and small tensors have none."""
        judged = self.ours and self.w_bytes >= self.JUDGED_FROM
        return self.beside_masks <= self.LEAVE if judged else None


@dataclass
class Bench:
    """A run: where, how long, and what was found. Groups add their rows to it."""

    device: torch.device
    quick: bool
    timer: Timer
    bandwidth: Bandwidth
    on_row: Callable[[Row | MemoryRow], None]
    on_note: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measure(
        self,
        group: str,
        case: str,
        call: str,
        ours: Call,
        contests: Sequence[Contest],
        *,
        n: int,
        moved: tuple[int, int],
        sparsity: float | None = None,
        targets: Sequence[Target] = (),
    ) -> None:
        """Compares ours with every baseline; moved: bytes (read, written) at the least."""
        baselines, all_ours = [], []
        for contest in contests:
            pairs = self.timer.compare(ours, contest.call, contest.check, contest.pairs)
            baselines.append(Baseline(contest.name, Stats.of(pairs.baseline), pairs.ratio))
            all_ours += pairs.ours
        limit = self.bandwidth.limit_s(*moved)
        row = Row(
            group,
            case,
            call,
            sparsity,
            n,
            Stats.of(all_ours),
            *moved,
            limit,
            baselines,
            list(targets),
        )
        self.rows.append(row)
        self.on_row(row)

    def add_memory(self, row: MemoryRow) -> None:
        """Adds a row of memory."""
        self.memory.append(row)
        self.on_row(row)

    def note(self, text: str) -> None:
        """Notes what the reader of the results must know."""
        self.notes.append(text)
        self.on_note(text)


def nbytes(*tensors: Any) -> int:
    """Counts the bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors)
