# SPDX-License-Identifier: MIT
"""Optimizers as other people write them: methods of their own, inner optimizers, writes to .data.

Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
ICLR 2021: e(w) = rho * g / ||g||, the step is taken with the gradient at w + e(w).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Sam(torch.optim.Optimizer):
    """Climbs to w + e(w), goes back and lets an inner optimizer step; step(closure) does both."""

    def __init__(self, params: Iterable[nn.Parameter], inner: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = inner(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        weights = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in weights if p.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for weight in weights:
            if weight.grad is not None:
                self.state[weight]["before"] = weight.data.clone()
                weight.data.add_(0.05 * weight.grad / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.data = self.state[weight]["before"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class SamAlone(Sam):
    """The same without an inner optimizer: momentum and decay of its own, by writes to .data."""

    def __init__(self, params: Iterable[nn.Parameter], inner: Any = None) -> None:
        super().__init__(params, lambda groups: torch.optim.SGD(groups, 0.1))
        del self.base_optimizer

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.data = self.state[weight]["before"]
                    moment = self.state[weight].setdefault("moment", torch.zeros_like(weight))
                    moment.mul_(0.9).add_(weight.grad)
                    weight.data.mul_(0.99).add_(moment, alpha=-0.1)
        self.zero_grad()


class Noisy(torch.optim.SGD):
    """Adds noise to every weight, whatever its gradient."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.shake()

    @torch.no_grad()
    def shake(self) -> None:
        """Moves the weights in a method that torch's hooks do not see, by a write to .data."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.add_(torch.randn_like(weight))
