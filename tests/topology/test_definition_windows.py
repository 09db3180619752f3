# SPDX-License-Identifier: MIT
"""lap_ext.scores == the brute-force definition, weight by weight: convolutions with windows.

The image leaves room around its middle, where the oracle looks: a full window of every consumer,
around each of its positions a full window of the layer, and around those a full window of the
producers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.networks import Case, Net, bn, check, conv

LINE = {"read": lambda y: y[..., 3]}  # the middle of seven


def middle(at: int) -> dict[str, Any]:
    return {"read": lambda y: y[..., at, at]}


def same(out: int = 4, into: int = 4, **options: Any) -> nn.Conv2d:
    """3x3, the image keeps its size."""
    return nn.Conv2d(into, out, 3, padding=1, **options)


def line(out: int, into: int, groups: int = 1) -> nn.Conv1d:
    return nn.Conv1d(into, out, 3, padding=1, groups=groups)


def transposed(groups: int = 1) -> nn.ConvTranspose1d:
    return nn.ConvTranspose1d(4, 4, 3, padding=1, groups=groups)


WINDOWS = {
    "chain": Case(
        lambda: nn.Sequential(same(3, 2), bn(3), nn.ReLU(), same(2, 3), bn(2), same(2, 2)),
        (1, 2, 7, 7),
        middle(3),
    ),
    "residual": Case(
        lambda: Net(lambda m, x: m.c(x + m.b(m.a(x))), a=same(2, 2), b=same(2, 2), c=same(2, 2)),
        (1, 2, 7, 7),
        middle(3),
    ),
    "separable": Case(
        lambda: nn.Sequential(
            *(conv(2, 2), nn.ReLU6(), same(2, 2, groups=2), bn(2), conv(3, 2)),
            *(same(6, 3, groups=3), bn(6), conv(2, 6)),
        ),
        (1, 2, 5, 5),
        middle(2),
    ),
    "grouped": Case(
        lambda: nn.Sequential(line(4, 2), nn.GroupNorm(2, 4), line(6, 4, 2), line(6, 6, 3)),
        (1, 2, 7),
        LINE,
    ),
    "transposed": Case(
        lambda: nn.Sequential(line(4, 2), transposed(), nn.ReLU(), transposed(2), line(2, 4)),
        (1, 2, 9),
        {"read": lambda y: y[..., 4]},
    ),
    "conv1d": Case(
        lambda: nn.Sequential(line(3, 2), nn.BatchNorm1d(3), line(2, 3), line(2, 2)),
        (1, 2, 7),
        LINE,
    ),
    "conv3d": Case(
        lambda: nn.Sequential(nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0)), nn.Conv3d(2, 2, 1)),
        (1, 2, 3, 1, 1),
        {"read": lambda y: y[..., 1, 0, 0]},
    ),
    "dilated": Case(
        lambda: nn.Sequential(
            nn.Conv1d(1, 2, 3, padding=2, dilation=2), nn.ZeroPad1d(1), nn.Conv1d(2, 2, 3)
        ),
        (1, 1, 7),
        LINE,
    ),
}


@pytest.mark.parametrize("name", list(WINDOWS))
def test_windows(name: str) -> None:
    case = WINDOWS[name]
    check(case.build(), torch.randn(case.shape, dtype=torch.float64), **case.how)
