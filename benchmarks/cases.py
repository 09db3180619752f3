# SPDX-License-Identifier: MIT
"""What is measured: real layers with their neighbors, and data that is hard to select from.

Shapes are PyTorch's: w [O, I, *K], w_prev [I, P, *K], w_next [N, O, *K]. Data is drawn from a fixed
seed on the CPU, so that every device gets the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

SPARSITIES = (0.5, 0.9, 0.99)
DEFAULT_SPARSITY = 0.9
SEED = 20200426
BIG = 16_000_000  # "16 M weights and more" of the targets


@dataclass(frozen=True)
class Layer:
    """Three weights that meet, by their shapes."""

    name: str
    prev: tuple[int, ...]
    shape: tuple[int, ...]
    next: tuple[int, ...]
    faster: float  # the target: times faster than the fastest eager path

    @property
    def n(self) -> int:
        """Weights to score."""
        return prod(self.shape)

    @property
    def neighbors(self) -> int:
        """Weights of both neighbors."""
        return prod(self.prev) + prod(self.next)

    def make(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Weights:
        """Draws (w_prev, w, w_next)."""
        shapes = (self.prev, self.shape, self.next)
        drawn = [normal(shape, SEED + i, device).to(dtype) for i, shape in enumerate(shapes)]
        return drawn[0], drawn[1], drawn[2]


Weights = tuple[Tensor, Tensor, Tensor]

LAYERS = (
    Layer("linear 500x500", (500, 500), (500, 500), (500, 500), faster=8),  # the paper's net
    Layer(
        "conv 512x512x3x3", (512, 512, 3, 3), (512, 512, 3, 3), (512, 512, 3, 3), faster=30
    ),  # VGG, ResNet-18
    Layer(
        "conv 2048x1024x3x3", (1024, 2048, 1, 1), (2048, 1024, 3, 3), (1024, 2048, 1, 1), faster=30
    ),  # between two 1x1 convolutions
    Layer(
        "linear 4096x14336", (14336, 4096), (4096, 14336), (4096, 4096), faster=30
    ),  # Llama-7B-size MLP: up, down, query of the next block
)
QUICK_LAYERS = (
    Layer("linear 500x500", (500, 500), (500, 500), (500, 500), faster=8),
    Layer("conv 128x128x3x3", (128, 128, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3), faster=30),
    Layer("conv 512x256x3x3", (256, 512, 1, 1), (512, 256, 3, 3), (256, 512, 1, 1), faster=30),
    Layer("linear 1024x3584", (3584, 1024), (1024, 3584), (1024, 1024), faster=30),
)


def layers(quick: bool) -> tuple[Layer, ...]:
    """Returns the layers of a run, from small to large."""
    return QUICK_LAYERS if quick else LAYERS


def score_list(quick: bool, device: torch.device) -> list[Tensor]:
    """Makes the scores of a model: 12 tensors, 64 M elements in all (quick: 2 M)."""
    total = 2_000_000 if quick else 64_000_000
    parts = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    rows = [total * part // sum(parts) // 1000 for part in parts]
    rows[-1] += total // 1000 - sum(rows)
    return [normal((r, 1000), SEED + i, device).abs_() for i, r in enumerate(rows)]


def normal(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Draws normal weights with about the deviation of a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(0.02).to(device)


@dataclass(frozen=True)
class Hard:
    """Weights whose scores tie, or lie in an order that misleads a sample."""

    name: str
    sparsity: float  # such that the threshold falls where it hurts
    change: Callable[[Tensor], Tensor]  # of normal weights [R, C]
    half_eligible: bool = False  # the pruned half is also named by mask=


def _zeros(w: Tensor, fraction: float) -> Tensor:
    drop = torch.rand(w.shape, generator=torch.Generator().manual_seed(SEED)) < fraction
    return w.masked_fill(drop.to(w.device), 0.0)


HARD = (
    Hard("random", 0.9, lambda w: w),
    Hard("bfloat16 ties", 0.9, lambda w: w.bfloat16().float()),
    Hard("all equal", 0.9, torch.ones_like),
    Hard("60 % zeros", 0.5, lambda w: _zeros(w, 0.6)),
    Hard("half pruned", 0.9, lambda w: _zeros(w, 0.5), half_eligible=True),
    Hard("sorted", 0.9, lambda w: w.flatten().sort().values.view(w.shape)),
)


def keep_of(sparsity: float, n: int) -> int:
    """Counts the weights kept: floor((1 - sparsity) * n + 1/2), exact for these sparsities."""
    permille = round(sparsity * 1000)
    return (2 * (1000 - permille) * n + 1000) // 2000
