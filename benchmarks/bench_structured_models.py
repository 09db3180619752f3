# SPDX-License-Identifier: MIT
"""Whole models pruned by structures, with each criterion.

    python -m benchmarks.bench_structured_models

Models in their true sizes with random weights: a ResNet-50 (float32), a ViT-B/16 (float32) and a
Llama-shaped decoder of 1.1 G weights (bfloat16). The trace is made before. First the masks of each
structure are compared with a plain definition on every layer of small models of the same kinds:
which weights of a group of four, or which units, have the highest worth. Then all calls are made in
turns in one process; the ratio is that of the seconds to those of single weights with the same
criterion in the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lap_ext
from benchmarks import big_models, cases, machine
from lap_ext.pruning.matrices import matrix_of

SPARSITY = 0.5
SINGLE = "single weights"
STRUCTURES = (SINGLE, "2:4", "2:4/transposable", "16x16", "row", "column")
CRITERIA = ("lookahead", "magnitude", "random")
RESULTS = machine.ROOT / "benchmarks" / "results" / "structured-models.json"


def vit_b16(quick: bool) -> tuple[nn.Module, Tensor]:
    """Makes a ViT-B/16 of transformers; quick: two blocks."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(num_hidden_layers=2 if quick else 12)
    return ViTModel(config, add_pooling_layer=False).eval(), torch.zeros(1, 3, 224, 224)


MODELS = {
    "ResNet-50": big_models.resnet50,
    "ViT-B/16": vit_b16,
    "Llama-shaped, 1.1 G": big_models.transformer_1b,
}


def made(label: str, quick: bool) -> lap_ext.Topology:
    """Makes a model none of whose weights is zero, and traces it."""
    torch.manual_seed(cases.SEED)
    model, example = MODELS[label](quick)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.masked_fill_(parameter == 0, 1e-3)
    return lap_ext.trace(model, example)


def pruned(topology: lap_ext.Topology, structure: str, criterion: str) -> lap_ext.PruneResult:
    """Makes the masks of all layers that the structure fits."""
    kind = None if structure == SINGLE else structure
    sparsity = None if ":" in structure else SPARSITY
    return lap_ext.prune(
        topology.model,
        None,
        sparsity,
        topology=topology,
        structure=kind,
        criterion=criterion,
        apply=False,
    )


def check(topology: lap_ext.Topology, structure: str, criterion: str) -> None:
    """Compares the masks with a plain definition."""
    result = pruned(topology, structure, criterion)
    scores = lap_ext.scores(topology.model, topology=topology, criterion=criterion)
    for name, mask in result.masks.items():
        matrix = matrix_of(topology.layers[name])
        s, kept = (x.reshape(*matrix.shape[:2], -1) for x in (scores[name].double(), mask))
        if ":" in structure:
            cut = kept.unflatten(1, (-1, 4)), s.unflatten(1, (-1, 4))
            assert bool((cut[0].sum(2) == 2).all()), (structure, name)
            if "/" in structure:
                assert bool((kept.unflatten(0, (-1, 4)).sum(1) == 2).all()), name
            else:
                least = torch.where(cut[0], cut[1], torch.inf).amin(2)
                assert bool((least >= torch.where(cut[0], -1.0, cut[1]).amax(2)).all()), name
        elif structure != SINGLE:
            sizes = {"row": (1, matrix.cols), "column": (matrix.height, 1), "16x16": (16, 16)}
            height, width = sizes[structure]
            height, width = min(height, matrix.height), min(width, matrix.cols)
            worth = _sums(s.square(), height, width)
            count = _sums(kept.double(), height, width)
            full = _sums(torch.ones_like(s), height, width)
            assert bool(((count == 0) | (count == full)).all()), (structure, name)
            least = worth[count > 0].min() if bool(count.any()) else torch.tensor(torch.inf)
            most = worth[count == 0].max() if bool((count == 0).any()) else torch.tensor(0.0)
            assert float(least) >= float(most) * (1 - 1e-12), (structure, name)


def _sums(x: Tensor, height: int, width: int) -> Tensor:
    """Adds the entries of blocks."""
    rows, cols = -x.shape[0] % height, -x.shape[1] % width
    padded = nn.functional.pad(x, (0, 0, 0, cols, 0, rows))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).sum((1, 3, 4))


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times all, prints a table and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_structured_models")
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--turns", type=int, default=3, help="of all calls (%(default)s)")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    console = Console(width=110)
    for label in MODELS:
        small = made(label, quick=True)
        for structure in STRUCTURES:
            for criterion in CRITERIA:
                check(small, structure, criterion)
        topology = made(label, args.quick)
        seconds: dict[tuple[str, str], list[float]] = {}
        for turn in range(args.turns + 1):
            for criterion in CRITERIA:
                for structure in STRUCTURES:
                    begin = time.perf_counter()
                    result = pruned(topology, structure, criterion)
                    if turn:  # the first touches what is new
                        took = time.perf_counter() - begin
                        seconds.setdefault((structure, criterion), []).append(took)
                    del result
        for (structure, criterion), found in seconds.items():
            pairs = zip(found, seconds[SINGLE, criterion], strict=True)
            rows.append(
                {
                    "model": label,
                    "structure": structure,
                    "criterion": criterion,
                    "seconds": statistics.median(found),
                    "ratio": statistics.median(a / b for a, b in pairs),
                }
            )
        console.print(_table(label, rows))
        del topology
    results = {
        "machine": machine.describe(torch.device("cpu")) | {"threads": args.threads},
        "sparsity": SPARSITY,
        "turns": args.turns,
        "load": machine.load(),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


def _table(label: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Makes the table of one model: structures by criteria."""
    table = Table("structure", *CRITERIA, title=f"{label}: seconds (times single weights)")
    for structure in STRUCTURES:
        found = {
            x["criterion"]: f"{x['seconds']:.3f} ({x['ratio']:.2f})"
            for x in rows
            if (x["model"], x["structure"]) == (label, structure)
        }
        table.add_row(structure, *(found[criterion] for criterion in CRITERIA))
    return table


if __name__ == "__main__":
    main()
