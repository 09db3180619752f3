# SPDX-License-Identifier: MIT
"""Masks of structures of one layer, norms given.

    python -m benchmarks.bench_structures --shape 4096x14336 --structures 2:4,16x16 --turns 15

N:M          nm_mask along columns: w read once, one byte a weight written
transposable 2:4 along rows and columns of tiles of 4 by 4, found exactly
RxC          blocks: the sums of squared scores, the larger half of them, the mask of these blocks
torch.gt     the same reading and writing with a threshold already known: the floor

The baselines get the scores ready, which we make from the weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

import lap_ext
from benchmarks import cases, checks, machine, report
from benchmarks.machine import Bandwidth
from benchmarks.rows import Bench, Contest, Target, nbytes
from benchmarks.timing import Call, Timer
from lap_ext.ops import schema

AT_MOST = 1.5  # times torch.gt, where w is big
SLOW_PAIRS = 3  # of a baseline that takes seconds
BUDGET_S = 300.0  # for a comparison: its turns decide
RESULTS = machine.ROOT / "benchmarks" / "results"
SCRATCH = machine.ROOT / "build" / "benchmarks"


# --- baselines ------------------------------------------------------------------------------------


def topk_of_groups(scores: Tensor, keep: int, of: int) -> Tensor:
    """Keeps the best of every group by one topk over all of them."""
    groups = scores.view(-1, of)
    mask = torch.zeros(groups.shape, dtype=torch.bool)
    mask.scatter_(1, groups.topk(keep, dim=1, sorted=False).indices, True)
    return mask.view(scores.shape)


def weight_norm_groups(scores: Tensor, keep: int, of: int) -> Tensor:
    """Calls PyTorch's own sparsifier, its function for one tensor: zeros in blocks of a row."""
    sparsifier = WeightNormSparsifier(sparse_block_shape=(1, of), zeros_per_block=of - keep)
    mask = sparsifier._make_block_mask(scores, (1, of), of - keep)
    return mask[: scores.shape[0], : scores.shape[1]]


def model_optimizer(scores: Tensor, keep: int, of: int) -> Tensor:
    """Calls ModelOpt's own function, where it is installed."""
    magnitude = importlib.import_module("modelopt.torch.sparsity.weight_sparsity.magnitude")
    mask: Tensor = magnitude.create_asp_mask(scores, f"{keep}:{of} sparsity")
    return mask.bool()


def best_permutation(scores: Tensor, keep: int, of: int) -> Tensor:
    """Multiplies all groups with all patterns, and takes the largest product's pattern.

    The way of ASP and of ModelOpt's create_asp_mask, from its description.
    """
    choices = sorted(set(permutations([1.0] * keep + [0.0] * (of - keep))))
    patterns = torch.tensor(choices, dtype=scores.dtype)
    best = torch.matmul(scores.view(-1, of), patterns.t()).argmax(dim=1)
    return patterns[best].bool().view(scores.shape)


def topk_of_blocks(scores: Tensor, block: tuple[int, int], keep: int) -> Tensor:
    """Sums squares of blocks by a view, keeps the largest by topk, repeats their marks."""
    (rows, cols), (down, across) = scores.shape, block
    cut = scores.square().view(rows // down, down, cols // across, across)
    sums = cut.sum(dim=(1, 3))
    kept = torch.zeros(sums.numel(), dtype=torch.bool)
    kept[sums.flatten().topk(keep, sorted=False).indices] = True
    marks = kept.view(sums.shape)[:, None, :, None].expand(cut.shape)
    return marks.reshape(scores.shape)


def weight_norm_blocks(scores: Tensor, block: tuple[int, int], keep: int) -> Tensor:
    """Calls PyTorch's own sparsifier, its function for one tensor: whole blocks by their norms."""
    sparsifier = WeightNormSparsifier(sparse_block_shape=block)
    blocks = scores.numel() // (block[0] * block[1])
    level = 1 - keep / blocks
    return sparsifier._make_tensor_mask(scores.square(), scores.shape, level, block)


# --- checks ---------------------------------------------------------------------------------------


def same_sums(scores: Tensor, shape: tuple[int, ...], dims: tuple[int, ...]) -> Callable[..., None]:
    """Makes a check that both keep as many and as large scores of every part, up to rounding."""
    parts = scores.double().view(shape)

    def check(ours: Tensor, theirs: Tensor) -> None:
        found = [(x != 0).view(shape) for x in (ours, theirs)]
        counts = [x.sum(dim=dims) for x in found]
        checks.require(torch.equal(*counts), "other numbers are kept")
        sums = [(parts * x).sum(dim=dims) for x in found]
        near = torch.allclose(sums[0], sums[1], rtol=checks.TOLERANCE, atol=0.0)
        checks.require(near, "the scores that are kept differ")

    return check


# --- structures -----------------------------------------------------------------------------------


class Layer:
    """A weight with norms, and its scores for the baselines."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        self.w = cases.normal((rows, cols), cases.SEED, device).to(dtype)
        self.row = cases.normal((rows,), cases.SEED + 1, device).abs().double() + 0.5
        self.col = cases.normal((cols,), cases.SEED + 2, device).abs().double() + 0.5
        self.scores = lap_ext.score_from_norms(self.w, self.col, self.row)
        self.ready = torch.empty(self.w.shape, dtype=torch.bool, device=device)

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The first arguments of the operators."""
        return self.w, self.row, self.col, 1


def nm(layer: Layer, keep: int, of: int) -> tuple[Call, list[Contest]]:
    """Returns our call and the baselines' for N:M."""
    check = same_sums(layer.scores, (-1, of), (1,))
    rivals = {"topk of groups": topk_of_groups, "WeightNormSparsifier": weight_norm_groups}
    rivals |= {"best of all patterns": best_permutation} if of <= 4 else {}
    if (keep, of) == (2, 4) and importlib.util.find_spec("modelopt"):
        rivals["ModelOpt create_asp_mask"] = model_optimizer
    contests = [
        Contest(name, partial(rival, layer.scores, keep, of), check, SLOW_PAIRS)
        for name, rival in rivals.items()
    ]
    return partial(schema.nm_mask, *layer.given, keep, of, False, None, True), contests


def blocks(layer: Layer, block: tuple[int, int]) -> tuple[Call, list[Contest]]:
    """Returns our call and the baselines' for the larger half of the blocks."""
    rows, cols = layer.w.shape
    if rows % block[0] or cols % block[1]:
        sys.exit(f"expected blocks that divide {rows}x{cols}, got {block[0]}x{block[1]}")
    count = rows // block[0] * (cols // block[1])
    keep = count // 2

    def ours() -> Tensor:
        sums = torch.zeros(rows // block[0], cols // block[1], dtype=torch.float64)
        schema.block_sums_(sums, *layer.given, block, 0, rows, True, None, True)
        (kept,) = schema.topk_mask([sums], keep, [], True)
        return schema.block_mask(kept, [rows, cols], block, 0, rows, None)

    worth = layer.scores.double().square().view(*_cut(rows, cols, block)).sum((1, 3))

    def check(mine: Tensor, theirs: Tensor) -> None:
        for mask in (mine, theirs):
            counts = mask.view(*_cut(rows, cols, block)).sum((1, 3))
            whole = (counts == 0) | (counts == block[0] * block[1])
            checks.require(bool(whole.all()), "a block is kept in part")
            checks.require(int((counts > 0).sum()) == keep, "another number of blocks is kept")
            least, most = worth[counts > 0].min(), worth[counts == 0].max()
            near = float(least) >= float(most) * (1 - checks.TOLERANCE)
            checks.require(near, "blocks of less worth are kept")

    rivals = {"topk of sums": topk_of_blocks, "WeightNormSparsifier": weight_norm_blocks}
    contests = [
        Contest(name, partial(rival, layer.scores, block, keep), check, SLOW_PAIRS)
        for name, rival in rivals.items()
    ]
    return ours, contests


def _cut(rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int, int, int]:
    return rows // block[0], block[0], cols // block[1], block[1]


def measure(bench: Bench, layer: Layer, structure: str, turns: int) -> None:
    """Measures one structure: "2:4", "16x16" or "transposable"."""
    ours: Call
    contests: list[Contest] = []
    if structure == "transposable":
        ours = partial(schema.transposable_mask, *layer.given, True, None, True)
    elif ":" in structure:
        keep, of = map(int, structure.split(":"))
        ours, contests = nm(layer, keep, of)
    else:
        down, across = map(int, structure.split("x"))
        ours, contests = blocks(layer, (down, across))
    floor = Contest("torch.gt", partial(torch.gt, layer.w, 0, out=layer.ready), pairs=turns)
    n = layer.w.numel()
    judged = structure in ("2:4", "16x16") and n >= cases.BIG
    rows, cols = layer.w.shape
    bench.measure(
        "structures",
        f"linear {rows}x{cols}, {str(layer.w.dtype).removeprefix('torch.')}",
        structure,
        ours,
        [floor, *contests],
        n=n,
        moved=(nbytes(layer.w), n),
        sparsity=0.5,
        targets=[Target(1 / AT_MOST, ("torch.gt",))] if judged else [],
    )


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_structures")
    parser.add_argument("--shape", default="4096x14336", help="rows x columns (%(default)s)")
    parser.add_argument("--structures", default="2:4,16x16,transposable,4:8", help="(%(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the weight (%(default)s)")
    parser.add_argument("--turns", type=int, default=15, help="of both calls (%(default)s)")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks and measures all structures, writes JSON; 1 after a wrong result."""
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    console = Console() if sys.stdout.isatty() else Console(width=160)
    timer = Timer(device, BUDGET_S)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    bench = Bench(device, False, timer, Bandwidth(timer), lambda row: say(report.line(row)), say)
    facts = machine.describe(device)
    say(f"load average {facts['load']} at the start")
    rows, cols = map(int, args.shape.split("x"))
    try:
        for dtype in args.dtypes.split(","):
            layer = Layer(rows, cols, getattr(torch, dtype), device)
            for structure in args.structures.split(","):
                measure(bench, layer, structure, args.turns)
    except checks.WrongResultError as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1
    report.print_tables(bench, console)
    path = args.out / f"structures-{machine.slug(facts)}.json"
    report.write_json(path, report.as_json(bench, facts))
    say(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
