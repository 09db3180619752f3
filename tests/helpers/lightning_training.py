# SPDX-License-Identifier: MIT
"""A module for Lightning's Trainer, its batches, and the same training written out by hand.

What the loop written out knows is that a pruned weight does not exist: not in a step, not in the
moments, not in the gradient's norm by which the Trainer clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from torch import Tensor, nn

import lap_ext
from lap_ext.adapters.lightning import PruningCallback
from tests.helpers import masked_network as cases

RATE, CLIP = 0.05, 0.05
NAMES = ("net.conv", "net.fc1", "net.fc2")
EXAMPLE = torch.zeros(1, 1, 6, 6)


class Net(pl.LightningModule):
    """masked_network's network as the Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cases.net()
        self.norms: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("loss", self.training_step(batch), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.1)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in self.parameters()]
        self.norms.append(float(nn.utils.get_total_norm(grads)))
        super().configure_gradient_clipping(optimizer, *args, **kwargs)


class Batches:
    """The same batches every time; a DataLoader would warn, depending on the machine."""

    def __init__(self, count: int = 10, start: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        pictures = torch.randn(start + count, 4, 1, 6, 6, generator=generator)
        self.batches = [(x, torch.arange(4) % 3) for x in pictures][start:]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


class Watch(callbacks.Callback):
    """Checks the module after each batch: pruned weights are +0.0."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.sparsities: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        cases.check_zero(pl_module, self.pruning.masks)
        self.sparsities.append(round(self.pruning.sparsity, 2))


def trainer_of(pruning: PruningCallback, *others: Any, **given: Any) -> Any:
    usual: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "gradient_clip_val": CLIP,
        "logger": False,
        "enable_checkpointing": any(isinstance(x, callbacks.ModelCheckpoint) for x in others),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=[pruning, Watch(pruning), *others], **(usual | given))


def watched(trainer: Any) -> list[float]:
    return next(x for x in trainer.callbacks if isinstance(x, Watch)).sparsities


def written_out(
    model: nn.Module, schedule: Callable[[int], Any], masks: Any = None, *, accumulate: int = 1
) -> tuple[lap_ext.Masks, list[float]]:
    """Trains in the same way by hand: (masks, norms of the gradients of what is left)."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1)
    batches = list(Batches())

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), labels)

    steps = [
        [partial(loss, *batch) for batch in batches[first : first + accumulate]]
        for first in range(0, len(batches) // accumulate * accumulate, accumulate)
    ]
    return cases.by_hand(model, optimizer, steps, schedule, masks, example=EXAMPLE, clip=CLIP)


def check_no_hooks(trainer: Any, model: nn.Module) -> None:
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not any(p._backward_hooks for p in model.parameters())


def checkpoints(directory: Path) -> Any:
    """Saves one at the end of each epoch."""
    return callbacks.ModelCheckpoint(directory, filename="{epoch}-{sparsity:.1f}", save_top_k=-1)
