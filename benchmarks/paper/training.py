# SPDX-License-Identifier: MIT
"""The training loop of the paper: Adam, batches of 60, a constant rate, no decay.

Pruned weights are set to zero again after every step. The state of Adam is kept per weight, so
this is the same as training without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.paper.data import Data


def train(
    net: nn.Module,
    data: Data,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    masks: Mapping[str, Tensor] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Trains for some steps with a fresh Adam.

    Args:
        net: is changed.
        data: batches are drawn from it.
        steps: optimizer steps.
        rate: learning rate.
        batch: images a step.
        seed: gives the same batches (and dropped units) whatever was drawn before.
        masks: layer name -> bool mask; the weights that are False stay zero.
        on_step: is called after every step.
    """
    torch.manual_seed(seed)
    net.train()
    modules = dict(net.named_modules())
    kept = [(modules[name].weight, mask) for name, mask in (masks or {}).items()]
    # fused: one pass over the parameters a step, about half the time of the default on a CPU
    optimizer = torch.optim.Adam(net.parameters(), rate, fused=True)
    for _ in range(steps):
        x, y = data.batch(batch)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in kept:
                assert isinstance(weight, Tensor)
                weight.mul_(mask)
        on_step()


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    """Returns the per cent of test images that are classified correctly."""
    net.eval()
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data.tests())
    return 100 * right / len(data.y_test)
