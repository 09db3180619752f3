# SPDX-License-Identifier: MIT
"""Times mask on a quiet machine and beside programs that take a core each.

    python -m benchmarks.competing [--programs 1] [--threads N]

slower = the median time beside them / the quiet one. With as many threads as cores, 2 is fair: half
of the time of one core is theirs. Threads that wait by spinning make it 20 and more.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import lap_ext
from lap_ext._text import columns

SHAPES = ((172, 64), (500, 500), (1024, 1024), (4096, 4096))
_LOOP = "while True: pass"
_SECONDS, _LEAST = 1.0, 9  # of a measurement, calls


@contextmanager
def beside(programs: int) -> Iterator[None]:
    """Runs busy loops in processes of their own."""
    running = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(programs)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(shape: tuple[int, int]) -> float:
    """Measures the median seconds of a call."""
    rows, cols = shape
    weights = torch.randn(cols, rows), torch.randn(rows, cols), torch.randn(cols, rows)
    lap_ext.mask(*weights, sparsity=0.9)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _LEAST or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        lap_ext.mask(*weights, sparsity=0.9)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.competing", description=__doc__)
    parser.add_argument("--programs", type=int, default=1, help="busy loops beside (default: 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet = [measure(shape) for shape in SHAPES]
    with beside(args.programs):
        busy = [measure(shape) for shape in SHAPES]
    rows = [("layer", "quiet ms", "beside ms", "slower")]
    for shape, alone, shared in zip(SHAPES, quiet, busy, strict=True):
        name = "x".join(map(str, shape))
        rows.append((name, f"{alone * 1e3:.3f}", f"{shared * 1e3:.3f}", f"{shared / alone:.1f}"))
    print(columns(rows, right=range(1, 4)))


if __name__ == "__main__":
    main()
