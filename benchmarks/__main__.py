# SPDX-License-Identifier: MIT
"""Runs the benchmarks: python -m benchmarks [--quick] [--only mask,score] (see README.md)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

import lap_ext
from benchmarks import (
    bench_fallback,
    bench_mask,
    bench_memory,
    bench_norms,
    bench_score,
    bench_select,
    bench_size,
    machine,
    plot,
    report,
)
from benchmarks.checks import WrongResultError
from benchmarks.machine import Bandwidth
from benchmarks.rows import Bench
from benchmarks.timing import Timer

GROUPS: dict[str, Callable[[Bench], None]] = {
    "mask": bench_mask.run,
    "score": bench_score.run,
    "norms": bench_norms.run,
    "select": bench_select.run,
    "fallback": bench_fallback.run,
    "size": bench_size.run,
    "memory": bench_memory.run,
}
BUDGET_S, QUICK_BUDGET_S = 0.4, 0.12  # for one comparison; three pairs at least
BUSY = 0.7  # a load average that disturbs; two threads that wait for each other feel it most
WIDTH = 160  # of the tables in a file or pipe
RESULTS = machine.ROOT / "benchmarks" / "results"
SCRATCH = machine.ROOT / "build" / "benchmarks"  # ignored by git


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times lap_ext against its baselines, results checked first.",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda[:index]")
    parser.add_argument(
        "--threads", type=int, default=machine.cores(), help="default: all cores (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        help="directory for JSON and plot (default: benchmarks/results; for a quick or partial run "
        "build/benchmarks)",
    )
    args = parser.parse_args(argv)
    args.groups = [name.strip() for name in args.only.split(",")]
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(GROUPS)}, got {', '.join(unknown)}")
    if args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device")
    whole = not args.quick and set(args.groups) == set(GROUPS)
    args.out = args.out or (RESULTS if whole else SCRATCH)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the groups; 1 after a wrong result. A missed target is no error."""
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    facts = machine.describe(device)
    console.print(f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores\n{lap_ext.info()}")
    timer = Timer(device, QUICK_BUDGET_S if args.quick else BUDGET_S)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    bench = Bench(
        device, args.quick, timer, Bandwidth(timer), lambda row: say(report.line(row)), say
    )
    if facts["load"] is not None and facts["load"] > BUSY:
        bench.note(f"load average {facts['load']:.1f} at the start: other programs had the cores")
    begin, wrong = time.perf_counter(), False
    try:
        for name in args.groups:
            GROUPS[name](bench)
    except WrongResultError as error:
        last = bench.rows[-1] if bench.rows else None
        where = f" (after {last.case}, {last.call}, {last.sparsity})" if last else ""
        print(f"wrong result: {error}{where}", file=sys.stderr)
        wrong = True
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    report.print_tables(bench, console)
    facts["seconds"] = round(time.perf_counter() - begin)
    path = args.out / f"{machine.slug(facts)}.json"
    if wrong:
        return 1
    report.write_json(path, report.as_json(bench, facts))
    console.print(f"{facts['seconds']} s; results: {path}")
    sizes = [row for row in bench.rows if row.group == "size"]
    if sizes:
        title = (
            f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
        )
        plot.draw(sizes, title, path.with_suffix(".png"))
        console.print(f"plot: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
