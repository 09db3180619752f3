# SPDX-License-Identifier: MIT
"""Units across layers over every place: the masks of memory, wherever layers are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lap_ext
from lap_ext.allocation import params
from tests.helpers.cut_place import Cut, Cuts, every_row, masks_of, ragged
from tests.helpers.unit_nets import KINDS, NETS, bound

CASES = [(name, kind) for name in NETS for kind in KINDS.get(name, ("channel",))]
WAYS: list[tuple[Any, dict[str, Any]]] = [
    (0.5, {"rounds": 2, "scope": "global"}),
    (params(0.7), {"aggregate": "mean", "min_keep": 0}),
]


@pytest.mark.parametrize("cuts", [every_row, ragged])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cuts(name: str, kind: str, cuts: Cuts) -> None:
    topology = bound(name, zeros=0.2)
    for sparsity, options in WAYS:
        how = {"structure": kind, **options}
        given: dict[str, Any] = {"topology": topology, "apply": False, **how}
        want = lap_ext.prune(topology.model, None, sparsity, **given)
        got = masks_of(Cut(topology, cuts), sparsity, **how)
        assert list(got) == [row.name for row in want.layers]
        for layer, mask in got.items():
            assert torch.equal(mask, want.masks[layer]), layer
