# SPDX-License-Identifier: MIT
"""Models in one expression, and the check of their scores against the brute-force definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lap_ext
from tests.helpers.network_oracle import distortions

RTOL = 1e-11  # the brute force subtracts two operators: some 1e-15 of their size is noise


class Net(nn.Module):
    """Named layers and the function that runs them: a model in one expression."""

    def __init__(self, rule: Callable[..., Tensor], **layers: nn.Module | nn.Parameter):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.rule = rule

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.rule(self, *inputs)


def randomized(model: nn.Module) -> nn.Module:
    """Values in +-[0.2, 1.2]; running variances in [0.5, 2]."""
    with torch.no_grad():
        for x in model.parameters():
            x.copy_((0.2 + torch.rand_like(x)) * (1 - 2 * torch.randint_like(x, 2)))
        for name, x in model.named_buffers():
            if name.endswith("running_var"):
                x.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                x.normal_()
    return model.double().eval()


def check(model: nn.Module, *inputs: Tensor, **how: Any) -> None:
    """All scores of the model against the definition."""
    expected = distortions(randomized(model), inputs, **how)
    got = lap_ext.scores(model, inputs, criterion="lookahead", layers="*", batch_norm="edge")
    assert set(got) == set(expected)
    for name, score in got.items():
        wrong = (score - expected[name]).abs() > RTOL * expected[name]
        assert score.shape == wrong.shape and not wrong.any(), (
            f"{name}: got / expected =\n{score / expected[name]}"
        )


def row(width: int = 4) -> Tensor:
    """One input of a dense model."""
    return torch.randn(1, width, dtype=torch.float64)


def linear(out: int = 4, into: int = 4) -> nn.Linear:
    return nn.Linear(into, out)


class Case(NamedTuple):
    """A model, the shape of its input, and how the oracle looks at it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    how: dict[str, Any] = {}  # noqa: RUF012 (read only)


def conv(out: int = 4, into: int = 4, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, **options)


def bn(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)
