# SPDX-License-Identifier: MIT
"""How much the memory of a process grows while it prunes a checkpoint, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.helpers.checkpoints import network, prune, write


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


def status(name: str) -> int:
    """Reads a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
