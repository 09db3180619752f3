# SPDX-License-Identifier: MIT
"""Which units across layers masks keep, against the groups that made the masks."""

from __future__ import annotations

import pytest
import torch

import lap_ext
from lap_ext._text import layer_name
from lap_ext.pruning.families import FamilyResult, families_of, removed_by
from tests.helpers.unit_nets import KINDS, NETS, bound

CASES = [(name, kind) for name in NETS for kind in KINDS.get(name, ("channel",))]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_masks_say_which_groups_are_removed(name: str, kind: str) -> None:
    groups = lap_ext.structures.groups(bound(name), kind)
    torch.manual_seed(0)
    for share in (0.0, 0.3, 0.6):
        removed = torch.rand(len(groups)) < share
        masks = {layer_name(x): mask for x, mask in groups.masks(removed).items()}
        assert torch.equal(removed_by(groups, masks), removed)
    rows = families_of(groups, removed)
    assert [x.total for x in rows] == [x.groups.numel() for x in groups.families]
    assert sum(x.kept for x in rows) == int((~removed).sum())


def test_channels_that_are_columns_of_their_layer() -> None:
    """A weight [inputs, outputs], whose channels are columns."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(4, 6))
            self.v = torch.nn.Parameter(torch.ones(6, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.w) @ self.v

    groups = lap_ext.trace(Net(), torch.ones(1, 4)).groups("channel")
    kept = torch.tensor([True, False, True, True, False, True])
    masks = {"w": kept.expand(4, 6), "v": torch.zeros(6, 3, dtype=torch.bool)}
    assert torch.equal(removed_by(groups, masks), ~kept)


def test_the_share_that_was_removed() -> None:
    assert FamilyResult("fc", ("fc",), 3, 4).sparsity == 0.25
    assert FamilyResult("fc", (), 0, 0).sparsity == 0.0
