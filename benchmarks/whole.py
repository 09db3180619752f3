# SPDX-License-Identifier: MIT
"""Whole models: time and peak memory of pruning them (python -m benchmarks.whole).

Each call runs in a process of its own, where the model is made, traced and touched before; ours and
the baselines in turns. Seconds are those of the call alone, extra memory is its peak beyond the
model (memory.py). Results are checked in a process of their own first: the same scores are kept as
by the eager formula and topk, but for those at the threshold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lap_ext
from benchmarks import baselines, big_models, checks, machine, memory, report
from lap_ext.criteria.context import Network
from lap_ext.places import Chunk, Memory
from lap_ext.pruning.scoring import Scorer

OURS = ("lap_ext.prune", "lap_ext.prune global")
BASELINES = ("eager + topk", "public code", "prune.global_unstructured")
RESULTS = machine.ROOT / "benchmarks" / "results"


def call_of(name: str, model: nn.Module, example: Tensor) -> Callable[[], Any]:
    """Prepares the call, with everything that it may know before."""
    topology = lap_ext.trace(model, example)
    if name == "trace":
        return lambda: lap_ext.trace(model, example)
    if name == OURS[0]:
        return lambda: big_models.ours(topology)
    if name == OURS[1]:
        return lambda: big_models.ours(topology, "global")
    if name == "prune.global_unstructured":
        weights = [layer.weight.detach() for layer in topology.layers.values()]
        keep = sum(big_models.keeps(topology).values())
        return lambda: baselines.global_unstructured(weights, keep)
    network = Network(Memory(topology))
    network.norms(topology.roles[0])
    procedure = {"eager + topk": big_models.eager, "public code": big_models.public_code}[name]
    return lambda: procedure(topology, network)


def check(model: nn.Module, example: Tensor) -> None:
    """Checks our masks against the eager formula and topk, but for scores at the threshold."""
    topology = lap_ext.trace(model, example)
    network = Network(Memory(topology))
    criterion = lap_ext.criteria.of("lookahead")
    kept = big_models.ours(topology)
    for layer, mask, other in zip(
        topology.layers.values(), kept, big_models.eager(topology, network), strict=True
    ):
        scores = Scorer(network, criterion, layer).of(Chunk(layer, layer.weight.detach()))
        threshold = checks.is_top([mask], [scores], int(mask.count_nonzero()))
        checks.same_choice([scores], threshold, 0)(mask, other)


def child(args: argparse.Namespace) -> None:
    """Measures one call in this process: {"seconds", "extra", "weights"} as JSON."""
    torch.set_num_threads(args.threads)
    model, example = big_models.MODELS[args.model](args.quick)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    if args.call == "check":
        check(model, example)
        print(json.dumps({"weights": weights}))
        return
    tiny, tiny_example = big_models.MODELS[args.model](True)
    call_of(args.call, tiny, tiny_example)()  # libraries warmed up
    call, seconds = call_of(args.call, model, example), []

    def timed() -> Any:
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
        return result

    with torch.no_grad():
        extra = memory.extra(timed, torch.device("cpu"))
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"seconds": seconds[0], "extra": extra, "weights": weights, "bytes": bytes_}))


def run(call: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one call in a new process."""
    options = ["--child", "--call", call, "--only", model, "--threads", str(args.threads)]
    options += ["--quick"] if args.quick else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.whole", *options],
        cwd=machine.ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def calls_of(model: str) -> list[str]:
    """Lists what is run on a model; global_unstructured needs 13 times the weights' memory."""
    skipped = {"prune.global_unstructured"} if model == "transformer_1b" else set()
    return ["trace", *OURS, *(name for name in BASELINES if name not in skipped)]


def measured(
    model: str, args: argparse.Namespace, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Makes a row for every call, medians over the rounds."""
    weights = run("check", model, args)["weights"]
    say(f"{model}: {weights / 1e6:.1f} M weights, results checked")
    samples: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds):
        for call in calls_of(model):
            if number and call in BASELINES and samples[call][0]["seconds"] > args.slow:
                continue  # once is enough for what takes minutes
            samples.setdefault(call, []).append(run(call, model, args))
            found = samples[call][-1]
            say(f"  {call}: {found['seconds']:.2f} s, {found['extra'] / 1e6:.0f} MB extra")
    return [
        {
            "model": model,
            "call": call,
            "weights": weights,
            "bytes": found[0]["bytes"],
            "seconds": statistics.median(x["seconds"] for x in found),
            "extra_bytes": statistics.median(x["extra"] for x in found),
            "runs": len(found),
        }
        for call, found in samples.items()
    ]


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the table."""
    table = Table("model", "call", "seconds", "times ours", "extra, MB", "of the weights' bytes")
    for row in rows:
        ours = next(r for r in rows if (r["model"], r["call"]) == (row["model"], OURS[0]))
        table.add_row(
            row["model"],
            row["call"],
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / ours['seconds']:.3g}",
            f"{row['extra_bytes'] / 1e6:.0f}",
            f"{row['extra_bytes'] / row['bytes']:.0%}",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all; writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole", description=__doc__)
    parser.add_argument("--only", default=",".join(big_models.MODELS), help="models")
    parser.add_argument("--quick", action="store_true", help="small models, a minute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=float, default=20.0, help="baselines this slow run once")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        args.model = args.only
        child(args)
        return 0
    torch.set_num_threads(args.threads)
    facts = machine.describe(torch.device("cpu"))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    rows: list[dict[str, Any]] = []
    for model in args.only.split(","):
        rows += measured(model, args, lambda text: console.print(text, highlight=False))
    show(rows, console)
    directory = args.out or (machine.ROOT / "build" / "benchmarks" if args.quick else RESULTS)
    path = directory / f"whole-{machine.slug(facts)}.json"
    report.write_json(path, {"machine": facts, "rows": rows})
    console.print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
