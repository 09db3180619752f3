# SPDX-License-Identifier: MIT
"""Every ranking of a checkpoint directory, beside lookahead layer by layer.

    python -m benchmarks.bench_rankings

A random bfloat16 checkpoint in the shapes of a Llama of half a billion parameters is made under
build/ and removed at the end. First each ranking's masks are compared with those of lap_ext.prune
in memory, bit for bit. Then all are run in turns, in one process; the ratio is that of the time
after the trace, which is the same for all, to lookahead's in the same turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

import lap_ext
from benchmarks import machine
from benchmarks.bench_checkpoint import make
from lap_ext import checkpoint
from lap_ext.checkpoint.structure import structure_of
from lap_ext.options import Normalize, Scope

SHAPES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
}
SPARSITY = 0.5
MOST = 3.0  # times lookahead's time
RESULTS = machine.ROOT / "benchmarks" / "results" / "checkpoint-rankings.json"
SCRATCH = machine.ROOT / "build" / "rankings"


class Case(NamedTuple):
    """A ranking."""

    criterion: str
    scope: str
    normalize: str

    def options(self) -> dict[str, Any]:
        """Returns the options of prune."""
        scope, normalize = cast(Scope, self.scope), cast(Normalize, self.normalize)
        chosen = {"criterion": self.criterion, "scope": scope, "normalize": normalize}
        return chosen | {"min_keep": 0}  # one ranking of raw scores may empty a layer


BASELINE = Case("lookahead", "layer", "none")
CASES = [
    BASELINE,
    Case("magnitude", "layer", "none"),
    Case("random", "layer", "none"),
    *(
        Case(criterion, "global", normalize)
        for criterion in ("lookahead", "magnitude", "random")
        for normalize in ("none", "norm", "lamp")
    ),
]


def timed(source: Path, out: Path, case: Case, memory: str) -> float:
    """Times a pruning, without the trace."""
    shutil.rmtree(out, ignore_errors=True)
    traced: list[float] = []

    def noted(*args: Any) -> Any:
        structure = structure_of(*args)
        traced.append(time.perf_counter())
        return structure

    with patch("lap_ext.checkpoint.pruning.structure_of", noted):
        checkpoint.prune(source, out, SPARSITY, memory=memory, **case.options())
    return time.perf_counter() - traced[0]


def check(source: Path, out: Path, cases: Sequence[Case], memory: str) -> None:
    """Compares the masks of all cases with those of the same model in memory."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = torch.ones(1, 8, dtype=torch.int64)
    topology = lap_ext.trace(model, {"input_ids": ids})
    for case in cases:
        timed(source, out, case, memory)
        masks = lap_ext.Masks.load(out / "lap_ext_masks.safetensors")
        options = case.options()
        held = lap_ext.prune(model, None, SPARSITY, topology=topology, apply=False, **options)
        assert masks.keys() == held.masks.keys(), case
        for name, mask in held.masks.items():
            assert torch.equal(mask, masks[name]), (case, name)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the checkpoint, checks and times all rankings, writes the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_rankings")
    parser.add_argument("--memory", default="1GB", help="the budget (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=SHAPES["num_hidden_layers"])
    parser.add_argument("--turns", type=int, default=3, help="of all rankings (%(default)s)")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    source, out = SCRATCH / "dense", SCRATCH / "out"
    try:
        facts = make(source, SHAPES | {"num_hidden_layers": args.layers})
        check(source, out, CASES, args.memory)
        turns = [
            {case: timed(source, out, case, args.memory) for case in CASES}
            for _ in range(args.turns)
        ]
        load = machine.load()
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    rows = []
    table = Table("criterion", "scope", "normalize", "seconds", "times lookahead")
    for case in CASES:
        seconds = statistics.median(turn[case] for turn in turns)
        ratio = statistics.median(turn[case] / turn[BASELINE] for turn in turns)
        rows.append({**case._asdict(), "seconds": seconds, "ratio": ratio})
        late = "" if ratio <= MOST else f"  (wanted <= {MOST:g})"
        table.add_row(*case, f"{seconds:.2f}", f"{ratio:.2f}{late}")
    Console(width=100).print(facts, table)
    results = {
        "machine": machine.describe(torch.device("cpu")) | {"threads": args.threads},
        "checkpoint": facts | {"dtype": "bfloat16"},
        "memory": args.memory,
        "sparsity": SPARSITY,
        "turns": args.turns,
        "load": load,
        "rankings": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
