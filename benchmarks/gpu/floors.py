# SPDX-License-Identifier: MIT
"""What must move, what moves, and when a target is reached: arithmetic only, no GPU.

    floor = bytes that must move / B          B: copy bandwidth, bytes read and written per second
    reached: time <= multiple * floor

Moved counts the bytes of the kernels as they are, phase by phase (csrc/cuda/select.cuh). Its ratio
to the floor's bytes is the least multiple that these kernels can reach; what a launch, a search by
one block or a grid's barriers take comes on top and matters on small tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_CAPACITY, CAPACITY_SHARE = 1 << 16, 64  # csrc/cuda/select.cuh: kLeastCapacity and the next
LEAST_SAMPLE_BITS, MOST_SAMPLE_BITS = 12, 16
DEVIATIONS = 3.5
SECTOR = 32  # bytes that memory moves at the least
CACHED = 40_000_000  # bytes that the L2 cache of an H100 or H200 holds beside other things
FINISH_READINGS = 2  # of the candidates: one digit of their ranks, then their masks
WRONG_GUESSES = 0.12  # of the candidates: 0.8 of the 7 standard deviations that they span

SMALL_LAUNCHES, SMALL_SECONDS = 5, 30e-6  # a small mask in a CUDA graph


@dataclass(frozen=True)
class Target:
    """One row of the table: what must move, and the multiple of its time that must be reached."""

    call: str
    multiple: float | None  # None: no target

    def floor_s(self, moved_bytes: int, bytes_per_s: float) -> float:
        """Computes the time in which so many bytes are copied."""
        return moved_bytes / bytes_per_s


SCORE = Target("score", 1.15)
MASK = Target("mask", 1.4)
PRUNE = Target("prune_", 1.4)
NORMS = Target("neighbor_norms", 1.25)
TOPK = Target("topk_mask", 1.5)
TARGETS = (SCORE, MASK, PRUNE, NORMS, TOPK)
GLOBAL = Target("global_mask", None)  # read w, write the masks


@dataclass(frozen=True)
class Verdict:
    """A measured time against its floor."""

    seconds: float
    floor_s: float
    times_floor: float
    wanted: float | None
    reached: bool | None


def verdict(target: Target, seconds: float, moved_bytes: int, bytes_per_s: float) -> Verdict:
    """Judges one time."""
    if seconds <= 0 or bytes_per_s <= 0:
        raise ValueError(f"expected a time and a bandwidth > 0, got {seconds} and {bytes_per_s}.")
    floor = target.floor_s(moved_bytes, bytes_per_s)
    times = seconds / floor
    wanted = target.multiple
    reached = None if wanted is None else times <= wanted
    return Verdict(seconds, floor, times, wanted, reached)


def small_verdict(launches: int, seconds: float) -> bool:
    """Tells whether a small mask reaches its target: five launches and 30 us in a graph."""
    return launches <= SMALL_LAUNCHES and seconds <= SMALL_SECONDS


# --- bytes that must move -------------------------------------------------------------------------


def floor_bytes(call: str, n: int, item: int, neighbors: int = 0) -> int:
    """Counts the bytes that a call on n weights of `item` bytes must move; neighbors: theirs."""
    score_item = max(item, 4)
    return {
        "score": n * (item + score_item),
        "mask": n * (item + 1),
        "prune_": n * (2 * item + 1),
        "neighbor_norms": neighbors * item,
        "topk_mask": n * (item + 1),
        "global_mask": n * (item + 1),
    }[call]


# --- bytes that the kernels move ------------------------------------------------------------------


def sample_bits(n: int) -> int:
    """Computes log2 of the sample's size (plan_buffers)."""
    bits = LEAST_SAMPLE_BITS
    while bits < MOST_SAMPLE_BITS and (32 << bits) <= n:
        bits += 1
    return bits


def capacity(n: int) -> int:
    """Counts the candidates that there is memory for."""
    return max(LEAST_CAPACITY, n // CAPACITY_SHARE)


def candidate_share(n: int, kept: float) -> float:
    """Computes the fraction of elements in the interval on ordinary data (plan_interval)."""
    if n <= capacity(n):
        return 1.0
    size = 1 << sample_bits(n)
    center = kept * size
    margin = DEVIATIONS * math.sqrt(center * (1 - kept)) + 2
    low, high = max(center - margin, 0.0), min(center + margin, float(size))
    return (high - low) / size


@dataclass(frozen=True)
class Phase:
    """Bytes of one kernel."""

    kernel: str
    read: float
    written: float

    @property
    def moved(self) -> float:
        """Both."""
        return self.read + self.written


def selection(n: int, item: int, kept: float, channels: int, tensors: int = 1) -> list[Phase]:
    """Lists the kernels of mask (channels: rows + columns) and topk_mask (channels 0)."""
    rank = 8 if item == 8 else 4
    candidates = n * candidate_share(n, kept)
    phases = [Phase("prepare", 16.0 * channels + 72 * tensors, 12.0 * channels + 49152)]
    if n > capacity(n):
        size = 1 << sample_bits(n)
        phases.append(Phase("sample", size * (SECTOR + rank), size * rank))
    phases.append(Phase("scan", n * item, n + candidates * (rank + 8)))
    buffered = candidates * (rank + 8)
    marks = candidates * WRONG_GUESSES * SECTOR  # a byte changed, a sector moved
    again = 1 if buffered <= CACHED else FINISH_READINGS
    phases.append(Phase("finish", again * buffered + marks, marks))
    return phases


def zeroing(n: int, item: int, kept: float) -> Phase:
    """Counts the second half of prune_: sectors zeroed in part are read to be written."""
    per_sector = SECTOR // item
    some = 1 - kept**per_sector  # sectors with something to zero
    whole = (1 - kept) ** per_sector
    return Phase("zero", n + n * item * (some - whole), n * item * some)


def phases(call: str, n: int, item: int, kept: float, channels: int, neighbors: int) -> list[Phase]:
    """Lists the kernels of a call and their bytes."""
    if call == "score":
        norms = Phase("scale", 16.0 * channels, 12.0 * channels)
        return [norms, Phase("score", n * item, n * max(item, 4))]
    if call == "neighbor_norms":
        partial = neighbors / 2 * (8 / 1024 + 8 / 64)  # of the rows' side and of the columns'
        segments = Phase("row and column segments", neighbors * item, partial)
        return [segments, Phase("totals", partial, 8.0 * channels)]
    if call == "topk_mask":
        return selection(n, item, kept, 0)
    found = selection(n, item, kept, channels)
    return [*found, zeroing(n, item, kept)] if call == "prune_" else found


def least_multiple(
    call: str, n: int, item: int, kept: float, channels: int, neighbors: int
) -> float:
    """Divides the bytes that move by the bytes that must."""
    moved = sum(phase.moved for phase in phases(call, n, item, kept, channels, neighbors))
    return moved / floor_bytes(call, n, item, neighbors)


# --- the prediction -------------------------------------------------------------------------------

# Seconds of the phases whose time is not their bytes', as an H200 and an H100 showed them.
FIXED_S = {
    "score": 8e-6,  # scale 6, launches 2
    "mask": 55e-6,  # prepare 6, sample 12, finish 33, launches 4
    "prune_": 57e-6,
    "neighbor_norms": 12e-6,  # partial sums added in order, two roots
    "topk_mask": 50e-6,
}
EFFICIENCY = 0.93  # of the copy's bandwidth, for kernels that do more than copy


@dataclass(frozen=True)
class Prediction:
    """What the kernels should take at a bandwidth, before they have ever run."""

    call: str
    n: int
    dtype: str
    kept: float
    floor_bytes: int
    moved_bytes: int
    least_multiple: float
    times_floor: float
    wanted: float | None


def predict(
    target: Target,
    n: int,
    dtype: str,
    kept: float,
    bytes_per_s: float,
    channels: int,
    neighbors: int = 0,
) -> Prediction:
    """Predicts bytes over (EFFICIENCY * B), and the fixed part."""
    item = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}[dtype]
    call = target.call
    floor = floor_bytes(call, n, item, neighbors)
    moved = sum(phase.moved for phase in phases(call, n, item, kept, channels, neighbors))
    seconds = moved / (EFFICIENCY * bytes_per_s) + FIXED_S[call]
    return Prediction(
        call,
        n,
        dtype,
        kept,
        floor,
        round(moved),
        moved / floor,
        seconds / target.floor_s(floor, bytes_per_s),
        target.multiple,
    )


def predictions(bytes_per_s: float, n: int) -> list[Prediction]:
    """Predicts every row of the table at one bandwidth and size, square weights."""
    side = math.isqrt(n)
    square, channels = side * side, 2 * side
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows.append(predict(SCORE, square, dtype, 1.0, bytes_per_s, channels))
        for kept in (0.5, 0.1, 0.01):
            rows.append(predict(MASK, square, dtype, kept, bytes_per_s, channels))
        for kept in (0.5, 0.1, 0.01):
            rows.append(predict(PRUNE, square, dtype, kept, bytes_per_s, channels))
        rows.append(predict(NORMS, square, dtype, 1.0, bytes_per_s, channels, 2 * square))
        rows.append(predict(TOPK, square, dtype, 0.1, bytes_per_s, 0))
    return rows
