# SPDX-License-Identifier: MIT
"""Compares lookahead with magnitude pruning on handwritten digits (python -m lap_ext.demo).

Trains the fully connected net of the lookahead paper (Park et al., ICLR 2020) on scikit-learn's
bundled 8x8 digits, prunes the same dense weights to several sparsities by both methods, fine-tunes
with the masks kept, and prints and plots the test accuracy over several seeds.

    layer l after t rounds of the paper's ratios q = (.5, .5, .5, .5, .25):
        sparsity = 1 - (1 - q[l])^t,   the same for both methods; only the selected weights differ
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import lap_ext
from lap_ext._files import replacing
from lap_ext._text import visible
from lap_ext.errors import LapFileExistsError
from lap_ext.report import kinds

WIDTHS = (64, 500, 500, 500, 500, 10)
RATIOS = (0.5, 0.5, 0.5, 0.5, 0.25)  # the paper's, per round
ROUNDS = (3, 4, 5, 6, 7, 8, 9)
METHODS = ("magnitude", "lookahead")  # as lap_ext.prune(criterion=...) takes them
LEARNING_RATE = 1.2e-3
BATCH = 60
TRAIN_STEPS = 500
NEEDED = ("matplotlib", "rich", "sklearn")


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, standardized with the training set's mean and deviation."""

    x_train: Tensor  # [1347, 64]
    y_train: Tensor  # [1347]
    x_test: Tensor  # [450, 64]
    y_test: Tensor  # [450]


@dataclass
class Level:
    """Test accuracies (%) at one sparsity: method -> one number a seed."""

    kept: float  # per cent of all weights
    pruned: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in METHODS})
    tuned: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in METHODS})


@dataclass
class Results:
    """All measurements."""

    levels: list[Level]
    dense: list[float] = field(default_factory=list)  # one accuracy a seed
    prune_seconds: float = 0.0  # spent in lap_ext.prune
    pruned_weights: int = 0


def load_digits() -> Digits:
    """Loads the digits, with a fixed, stratified split: 3/4 for training, 1/4 for the test."""
    from sklearn import datasets, model_selection

    x, y = datasets.load_digits(return_X_y=True)
    split = model_selection.train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    x_train, x_test = (torch.tensor(x, dtype=torch.float32) for x in split[:2])
    y_train, y_test = (torch.tensor(y) for y in split[2:])
    mean, deviation = x_train.mean(0), x_train.std(0).clamp_min(1e-3)  # some pixels are always 0
    return Digits((x_train - mean) / deviation, y_train, (x_test - mean) / deviation, y_test)


def new_net(widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Makes linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def accuracy(net: nn.Module, digits: Digits) -> float:
    """Computes the percentage of the test digits that are recognized."""
    return 100 * (net(digits.x_test).argmax(1) == digits.y_test).double().mean().item()


def train(
    net: nn.Module,
    digits: Digits,
    steps: int,
    seed: int,
    masks: lap_ext.Masks | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Trains for some steps with a new Adam; pruned weights (mask False) stay zero."""
    batches = torch.Generator().manual_seed(seed)
    # fused: one pass over the parameters in each step, about half the time of the default on a CPU
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE, fused=True)
    with masks.keep(net, optimizer) if masks else nullcontext():
        for _ in range(steps):
            index = torch.randint(len(digits.x_train), (BATCH,), generator=batches)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(digits.x_train[index]), digits.y_train[index])
            loss.backward()
            optimizer.step()
            on_step()


def sparsities(rounds: int) -> dict[str, float]:
    """Computes the sparsity of each layer after some rounds of the paper's ratios, by its name."""
    return {f"{2 * i}": 1 - (1 - ratio) ** rounds for i, ratio in enumerate(RATIOS)}


def total_steps(seeds: int, steps: int) -> int:
    """Counts the training steps of the experiment."""
    return seeds * (TRAIN_STEPS + steps * len(ROUNDS) * len(METHODS))


def run(digits: Digits, seeds: int, steps: int, on_step: Callable[[str], object]) -> Results:
    """Runs the experiment.

    Args:
        digits: the data.
        seeds: dense nets to train; each is pruned at every level by every method.
        steps: fine-tuning steps after pruning.
        on_step: called at every training step with a description of the work.

    Returns:
        The accuracies.
    """
    sizes = [o * i for i, o in pairwise(WIDTHS)]
    kept = [
        sum(n * (1 - s) for n, s in zip(sizes, sparsities(t).values(), strict=True)) for t in ROUNDS
    ]
    results = Results([Level(100 * k / sum(sizes)) for k in kept])
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = new_net()
        at = f"seed {seed + 1} of {seeds}"
        train(net, digits, TRAIN_STEPS, seed, on_step=partial(on_step, f"{at}: dense"))
        results.dense.append(accuracy(net, digits))
        topology = lap_ext.trace(net, digits.x_train[:1])
        dense = {name: value.clone() for name, value in net.state_dict().items()}
        for rounds, level in zip(ROUNDS, results.levels, strict=True):
            for method in METHODS:
                net.load_state_dict(dense)
                start = time.perf_counter()
                pruned = lap_ext.prune(
                    net, None, sparsities(rounds), topology=topology, criterion=method
                )
                results.prune_seconds += time.perf_counter() - start
                results.pruned_weights += pruned.total
                level.pruned[method].append(accuracy(net, digits))
                text = f"{at}: {level.kept:.2f} % kept, {method}"
                train(net, digits, steps, seed, pruned.masks, on_step=partial(on_step, text))
                level.tuned[method].append(accuracy(net, digits))
    return results


def spread(values: Sequence[float]) -> float:
    """Computes the standard deviation over seeds, 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def show(values: Sequence[float]) -> str:
    """Writes the mean, with the standard deviation where there are several seeds."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {spread(values):.1f}" if len(values) > 1 else mean


def measured(seeds: int) -> str:
    """Describes the numbers: over how many seeds they are."""
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"


def print_table(results: Results) -> None:
    """Prints all accuracies, and the result in one sentence."""
    from rich.console import Console
    from rich.table import Table

    def cells(accuracies: dict[str, list[float]]) -> Iterator[str]:
        means = [statistics.mean(accuracies[method]) for method in METHODS]
        for method, mean in zip(METHODS, means, strict=True):
            text = show(accuracies[method])
            yield f"[bold]{text}[/]" if mean == max(means) > min(means) else text

    seeds = len(results.dense)
    title = f"Test accuracy in %, {measured(seeds)}"
    caption = f"dense: {show(results.dense)}"
    table = Table(title=title, caption=caption, title_style="bold", header_style="")
    table.add_column("kept %", justify="right")
    for stage in ("pruned", "fine-tuned"):
        for method in METHODS:
            table.add_column(f"{stage}\n{method}", justify="right")
    for level in results.levels:
        table.add_row(f"{level.kept:.2f}", *cells(level.pruned), *cells(level.tuned))
    gains = [
        statistics.mean(level.tuned["lookahead"]) - statistics.mean(level.tuned["magnitude"])
        for level in results.levels
    ]
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"After fine-tuning, lookahead minus magnitude: {min(gains):+.1f} to {max(gains):+.1f} "
        f"points; lookahead is better at {sum(g > 0 for g in gains)} of {len(gains)} sparsities."
    )
    console.print(
        f"lap_ext.prune scored, selected and zeroed {results.pruned_weights:,} weights in "
        f"{1e3 * results.prune_seconds:.0f} ms ({len(METHODS) * len(ROUNDS) * seeds} prunings)."
    )


def draw(results: Results, path: Path) -> None:
    """Plots accuracy against kept weights, before and after fine-tuning."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    kept = [level.kept for level in results.levels]
    stages = {
        "right after pruning": [level.pruned for level in results.levels],
        "after fine-tuning": [level.tuned for level in results.levels],
    }
    styles = {"magnitude": ("#d95f02", "s"), "lookahead": ("#1b6ca8", "o")}
    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True)
    for panel, (stage, levels) in zip(panels, stages.items(), strict=True):
        for method, (color, marker) in styles.items():
            mean = [statistics.mean(level[method]) for level in levels]
            error = [spread(level[method]) for level in levels]
            panel.errorbar(
                kept, mean, error, color=color, marker=marker, capsize=3, label=method, lw=1.8
            )
        panel.axhline(statistics.mean(results.dense), color="0.5", ls="--", lw=1, label="dense")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(kept))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks(kept, [f"{k:.2g}" for k in kept])
        panel.invert_xaxis()
        panel.set_ylim(0, 103)
        panel.set_title(stage, fontsize=11)
        panel.set_xlabel("weights kept (%, log scale)")
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(frameon=False, loc="center right")
    net = "-".join(map(str, WIDTHS))
    figure.suptitle(f"Digits, fully connected {net}, {measured(len(results.dense))}")
    with replacing(path) as file:  # the file is never incomplete
        figure.savefig(file, format="png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options."""

    def count(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(
        prog="python -m lap_ext.demo",
        description="Prune a digit classifier by lookahead and by magnitude, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=count, default=3, help="dense nets to train and prune")
    parser.add_argument("--steps", type=count, default=200, help="fine-tuning steps after pruning")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="directory for the plot")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    options = parse(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'The demo needs {", ".join(missing)}: pip install "lap_ext[demo]"', file=sys.stderr)
        return 1
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = [TextColumn("{task.description:<36}"), BarColumn(), TimeElapsedColumn(), Remaining()]
    print(lap_ext.info())
    picture = options.out / "accuracy.png"
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # fails now, not after a minute of training
        if not kinds.is_one(picture, kinds.PLOTS[".png"]):
            raise LapFileExistsError(f"a plot, or nothing yet, at {str(picture)!r}", "another file")
        with Progress(*columns) as progress:
            task = progress.add_task("", total=total_steps(options.seeds, options.steps))
            results = run(
                load_digits(),
                options.seeds,
                options.steps,
                lambda text: progress.update(task, advance=1, description=text),
            )
        print_table(results)
        draw(results, picture)
        print(f"plot: {visible(str(picture))}")
    except KeyboardInterrupt:
        print("Stopped; no plot was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of the table, which nobody reads
        raise
    except OSError as error:
        print(f"The plot cannot be written: {visible(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
