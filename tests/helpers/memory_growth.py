# SPDX-License-Identifier: MIT
"""How much the memory of a process grows while it reads a checkpoint, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from lap_ext import checkpoint
from lap_ext.checkpoint import pruning, scoring
from lap_ext.checkpoint.reading import Source
from tests.helpers.checkpoints import least_memory, network, prune, write

Case = tuple[str, int, dict[str, Any]]  # "prune" or "scores", budget (0: the least), options


def medium() -> nn.Module:
    """Its parameters are on the meta device."""
    with torch.device("meta"):
        return nn.Sequential(
            nn.Linear(2048, 4096),
            nn.BatchNorm1d(4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
        )


def varied() -> nn.Module:
    """Eight MB: a 3x3 convolution and a linear layer with long rows, batch norms, a tied weight.

    The input is an image of 8x8. Its parameters are on the meta device.
    """
    with torch.device("meta"):
        tied = nn.Linear(64, 64)
        return nn.Sequential(
            *(nn.Conv2d(3, 1024, 3, padding=1), nn.BatchNorm2d(1024), nn.ReLU()),
            *(nn.Conv2d(1024, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(8192, 64), nn.ReLU(), tied, nn.ReLU(), tied, nn.ReLU()),
            *(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 8)),
        ).eval()


def grown(net: Any, directory: str, budget: int, **options: Any) -> int | None:
    """Measures the most bytes that the process grows by while it prunes, without the trace."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    state = {name: torch.rand(x.shape) for name, x in net.state_dict().items() if x.dim()}
    write(Path(directory) / "dense", state)
    del state
    small = network()
    write(Path(directory) / "small", small.state_dict())
    prune(Path(directory) / "small", Path(directory) / "warm", **options)  # imports, threads
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = status("VmRSS")
    options |= {"model": net, "example_inputs": torch.zeros(1, 2048), "memory": budget}
    prune(Path(directory) / "dense", Path(directory) / "out", **options)
    return status("VmHWM") - before


def table(directory: str, cases: Iterable[Case]) -> list[tuple[int, int]] | None:
    """Measures (budget, bytes by which the process grows) of each of many runs on varied().

    The network is traced once. None: this system does not reset a process' peak.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder, shapes = Path(directory), {n: x.shape for n, x in varied().state_dict().items()}
    state = {name: 0.1 + torch.rand(shape) for name, shape in shapes.items() if shape}
    state |= {f"11.{name}": state[f"9.{name}"].clone() for name in ("weight", "bias")}  # tied
    write(folder / "dense", state)
    del state
    real, traced = pruning.structure_of, []

    def once(*args: Any) -> Any:
        traced.append(traced[0] if traced else real(*args))
        return traced[0]

    def run(kind: str, budget: int, options: dict[str, Any]) -> None:
        options = options | {"model": varied(), "example_inputs": torch.zeros(1, 3, 8, 8)}
        if kind == "scores":
            checkpoint.scores(folder / "dense", memory=budget, **options).save(folder / "scores")
            (folder / "scores").unlink()
        else:
            sparsity = options.pop("sparsity", 0.6)
            checkpoint.prune(folder / "dense", folder / "out", sparsity, memory=budget, **options)
            shutil.rmtree(folder / "out")

    growth = []
    with patch.object(pruning, "structure_of", once), patch.object(scoring, "structure_of", once):
        run("prune", 10**9, {"count_scores": True})  # imports, threads
        run("scores", 10**9, {})
        gc.freeze()  # what the imports have left need not be looked through before each run
        for kind, budget, options in cases:
            given = budget or _least(partial(run, kind), options)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have left is no slack for this one
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                return None
            before = status("VmRSS")
            run(kind, given, options)
            growth.append((given, status("VmHWM") - before))
    return growth


def _least(run: Callable[[int, dict[str, Any]], None], options: dict[str, Any]) -> int:
    """Finds the least budget, below which nothing is read."""
    read = AssertionError("a weight is read before the budget is refused")
    with patch.object(Source, "fill", side_effect=read):
        few = least_memory(lambda budget: run(budget, options))
        assert least_memory(lambda _: run(few - 1, options)) == few
    return few


def status(name: str) -> int:
    """Reads a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
