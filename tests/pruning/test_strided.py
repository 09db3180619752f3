# SPDX-License-Identifier: MIT
"""Strided weights, masks and values: the same masks as of contiguous ones, in one ranking too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext

IMAGES = torch.zeros(1, 4, 8, 8)


def convolutions() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 2, 1)
    )


@pytest.mark.parametrize("normalize", ["none", "norm", "lamp"])
def test_channels_last_with_zeros(normalize: Any) -> None:
    plain, strided = convolutions(), convolutions().to(memory_format=torch.channels_last)
    how: dict[str, Any] = {"scope": "global", "normalize": normalize, "min_keep": 1}
    for sparsity in (0.5, 0.7):  # the second ranks what the first has left
        masks = lap_ext.prune(plain, IMAGES, sparsity, **how).masks
        assert lap_ext.prune(strided, IMAGES, sparsity, **how).masks == masks


@pytest.mark.parametrize("normalize", ["none", "lamp"])
def test_masks_that_are_strided(normalize: Any) -> None:
    net = convolutions()
    given = {
        name: torch.rand(layer.shape[::-1]).lt(0.7).permute(3, 2, 1, 0)
        for name, layer in lap_ext.trace(net, IMAGES).layers.items()
    }
    how: dict[str, Any] = {"scope": "global", "normalize": normalize, "min_keep": 1}
    flat = {name: mask.contiguous() for name, mask in given.items()}
    found = lap_ext.prune(net, IMAGES, 0.6, masks=given, apply=False, **how)
    assert found.masks == lap_ext.prune(net, IMAGES, 0.6, masks=flat, apply=False, **how).masks


def test_a_function_is_asked_once_for_a_ranking_in_memory() -> None:
    """And may return strided scores of a layer that is ranked in many pieces."""
    net = nn.Sequential(nn.Linear(700, 600), nn.ReLU(), nn.Linear(600, 500))
    calls: list[str] = []

    def score(layer: Any) -> Tensor:
        calls.append(layer.name)
        return torch.rand(layer.weight.shape[::-1]).t()

    result = lap_ext.prune(net, torch.ones(1, 700), 0.5, scope="global", criterion=score)
    assert sorted(calls) == ["0", "2"]
    assert result.kept == 360_000
