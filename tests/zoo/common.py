# SPDX-License-Identifier: MIT
"""What every file of the zoo shares: the registry's entry, seeding, and random parameters.

A fresh model hides mistakes: its norms are ones, its biases, class tokens and layer scales are
constants, its running statistics are 0 and 1. unsettle() gives all of them random values, so that
a scale that is lost or put on the wrong edge changes a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # model, args, kwargs


@dataclass(frozen=True)
class Entry:
    """A named model: make() gives it in eval mode with args and kwargs, the same ones each time."""

    name: str
    make: Callable[[], Example]


def entry(name: str, build: Callable[[], Example]) -> Entry:
    """An entry whose make() seeds, builds, and gives constant parameters random values."""
    return Entry(name, partial(_make, build))


def images(name: str, build: Callable[[], nn.Module], *shape: int) -> Entry:
    """An entry whose only argument is two random images (or signals, volumes, rows) of a shape."""
    return entry(name, lambda: (build(), (torch.randn(2, *shape),), {}))


def _make(build: Callable[[], Example]) -> Example:
    torch.manual_seed(0)
    model, args, kwargs = build()
    unsettle(model)
    return model.eval(), args, kwargs


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Random values for running statistics and for every parameter that is still a constant.

    Parameters: zeros become 0.1 * normal, other constants (norm weights, layer scales) uniform in
    [0.5, 1.5]. running_mean becomes 0.1 * normal, running_var uniform in [0.5, 2].
    """
    for parameter in model.parameters():
        if (parameter == parameter.flatten()[0]).all():
            if parameter.flatten()[0] == 0:
                parameter.normal_(std=0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)


class ConvBN(nn.Sequential):
    """Convolution without bias, batch norm, activation (None: none): the brick of most families."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        pad = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
        conv = nn.Conv2d(c_in, c_out, kernel, stride, pad, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), *([act()] if act else []))


class SqueezeExcite(nn.Module):
    """x * gate(expand(act(reduce(mean over positions of x)))), with 1x1 convolutions."""

    def __init__(
        self,
        channels: int,
        squeezed: int,
        act: type[nn.Module] = nn.ReLU,
        gate: type[nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = act()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))
