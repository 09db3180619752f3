# SPDX-License-Identifier: MIT
"""Runs the paper's experiment: python -m benchmarks.paper [--help].

On scikit-learn's digits by default; the paper's own networks and data where you have the files:

    python -m benchmarks.paper
    python -m benchmarks.paper --methods mp,lap --levels 6,7 --seeds 2
    python -m benchmarks.paper --nets mlp --data DIRECTORY --dataset fashion-mnist --device cuda
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from benchmarks import machine
from benchmarks.checks import WrongResultError
from benchmarks.paper import data, report
from benchmarks.paper.experiment import ITERATIVE, ONE_SHOT, Plan, run, steps_left
from benchmarks.paper.methods import METHODS, available
from benchmarks.paper.settings import SETTINGS
from benchmarks.paper.store import Store, StoreError

RESULTS = machine.ROOT / "benchmarks" / "results" / "paper-digits.json"
SCRATCH = machine.ROOT / "build" / "benchmarks" / "paper.json"  # ignored by git
CHECKPOINTS = machine.ROOT / "build" / "paper"
NETS = ("digits-mlp", "digits-resnet")
SEEDS = 5
WIDTH = 200  # of the tables in a file or pipe


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def _some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(known)}, got {', '.join(unknown)}"
            )
        return found

    return names


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part.strip()) for part in text.split(",")}))


def parser() -> argparse.ArgumentParser:
    """Makes the parser."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Prunes trained nets by many methods, fine-tunes and compares them. A run that "
        "was stopped goes on where it was.",
    )
    add = found.add_argument
    add("--nets", type=_some_of(tuple(SETTINGS)), default=NETS, help=", ".join(SETTINGS))
    add("--methods", type=_some_of(tuple(METHODS)), default=tuple(METHODS), help=", ".join(METHODS))
    add("--levels", type=_counts, help="how often the ratios are applied: 4,5,6 (default: paper's)")
    add("--seeds", type=_count, default=SEEDS, help="dense nets of each kind (default: 5)")
    add("--steps", type=_count, help="fine-tuning steps (default: those of the net)")
    add("--train-steps", type=_count, help="steps of the dense net (default: those of the net)")
    add("--schedule", choices=(ONE_SHOT, ITERATIVE), default=ONE_SHOT)
    add("--data", type=Path, metavar="DIR", help="directory with the files of the paper's data")
    add("--dataset", choices=data.NAMES, help="other data than the net's own")
    add("--batches", type=_count, default=100, help="of 60 images, for methods that look at data")
    add("--device", default="cpu")
    add("--threads", type=_count, default=1, help="the nets are small: one is fastest (default)")
    add(
        "--out",
        type=Path,
        help="JSON file, the plot beside it (default: benchmarks/results for "
        "the whole experiment on digits, else build/benchmarks)",
    )
    add("--fresh", action="store_true", help="forget finished cells and dense nets")
    add("--report", action="store_true", help="only show what is finished")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return found


def plan_of(options: argparse.Namespace) -> Plan:
    """Makes the plan that the options describe."""
    return Plan(
        options.nets,
        tuple(range(options.seeds)),
        tuple(name for name in options.methods if name in available()),
        options.levels,
        options.dataset,
        options.schedule,
        options.train_steps,
        options.steps,
        options.batches,
        CHECKPOINTS,
        options.device,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then shows all; returns the exit status."""
    options = parser().parse_args(argv)
    plan = plan_of(options)
    torch.set_num_threads(options.threads)
    whole = plan == replace(plan_of(parser().parse_args([])), methods=tuple(METHODS))
    path = options.out or (RESULTS if whole else SCRATCH)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    absent = [METHODS[name].name for name in options.methods if name not in available()]
    if absent:
        console.print(f"left out: {', '.join(absent)} (pip install backpack-for-pytorch)")
    try:
        store = Store(path, fresh=options.fresh)
        if not options.report:
            _run(plan, store, options, console)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (data.MissingDataError, StoreError, WrongResultError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    found = report.parts(store, plan.keys())
    if not found:
        print(f"{path}: nothing is finished", file=sys.stderr)
        return 1
    if options.markdown:
        print(report.markdown(found))
    else:
        report.print_tables(found, console)
    picture = path.with_suffix(".png")
    report.draw(found, picture)
    console.print(f"results: {path}\nplot: {picture}", soft_wrap=True, highlight=False)
    return 0


def _run(plan: Plan, store: Store, options: argparse.Namespace, console: Console) -> None:
    if options.fresh:
        for group in plan.groups():
            plan.checkpoint(group[0]).unlink(missing_ok=True)
    if not store.missing(plan.keys()):
        return
    device = torch.device(options.device)
    store.facts = machine.describe(device)
    columns = [TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn()]
    errors = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), Remaining(), console=errors) as progress:
        task = progress.add_task("", total=steps_left(plan, store))
        run(
            plan,
            store,
            lambda name: data.load(name, options.data, device),
            lambda text, steps: progress.update(task, advance=steps, description=text),
            lambda text: None if errors.is_terminal else console.print(text, highlight=False),
        )


if __name__ == "__main__":
    sys.exit(main())
