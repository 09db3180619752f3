# SPDX-License-Identifier: MIT
"""Units across layers some of whose weights are zero already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lap_ext

DEAD = {0, 4, 8}


def some_zero() -> nn.Sequential:
    """A model three of whose 9 first units are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))
    with torch.no_grad():
        for unit in DEAD:
            model[0].weight[unit] = 0
            model[2].weight[:, unit] = 0
    return model


def pruned(sparsity: Any, **how: Any) -> tuple[set[int], int]:
    """The first layer's units that go, by its bias, and how many are kept."""
    options = {"structure": "channel", "apply": False, **how}
    result = lap_ext.prune(some_zero(), torch.ones(1, 6), sparsity, **options)
    gone = set((~result.masks["0.bias"]).nonzero().flatten().tolist())
    return gone, result.families[0].kept


@pytest.mark.parametrize("how", [{}, {"cost": "weights"}, {"uniform": True}], ids=str)
def test_units_that_are_zero_count_and_go_first(how: dict[str, Any]) -> None:
    for sparsity, kept in ((0.0, 6), (0.2, 6), (1 / 3, 6)):
        assert pruned(sparsity, **how) == (DEAD, kept)


def test_others_follow_them() -> None:
    gone, kept = pruned(0.5)
    assert gone > DEAD and kept == 5


def test_zeros_are_weights_with_given_masks() -> None:
    """Units of zeros go first, but only as many as the sparsity says."""
    for sparsity, kept in ((0.0, 9), (0.2, 7), (1 / 3, 6), (0.5, 5)):
        gone, left = pruned(sparsity, masks={})
        assert left == kept and (gone <= DEAD or gone >= DEAD)


def test_floors_hold_units_of_zeros_too() -> None:
    assert pruned(0.0, min_keep=8)[1] == 8


def test_one_dead_channel_keeps_groups_of_a_convolution_equal() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 8, 1, groups=2),
        nn.Flatten(), nn.Linear(8 * 4, 2),
    )  # fmt: skip
    with torch.no_grad():
        net[1].weight[2] = 0
        net[2].weight[:4, 2] = 0
    for sparsity in (0.0, 0.5):
        result = lap_ext.prune(
            net, torch.ones(1, 3, 4, 4), sparsity, structure="channel", apply=False
        )
        rows = result.masks["1.bias"].reshape(2, 6).sum(1)
        assert rows[0] == rows[1]
