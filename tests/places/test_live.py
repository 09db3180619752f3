# SPDX-License-Identifier: MIT
"""Weights that may be kept and are not zero, in memory and in files, weight by weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.checkpoint.files import open_directory
from lap_ext.checkpoint.plan import plan_of
from lap_ext.checkpoint.structure import structure_of
from lap_ext.checkpoint.weights import Files
from lap_ext.places import Memory
from lap_ext.places.place import nonzero
from lap_ext.pruning.plan import options_of
from tests.helpers.checkpoints import INPUTS, network, write
from tests.helpers.parameters import each_dtype

SHAPE = (6, 5, 4)


def weights(dtype: torch.dtype, zeros: bool) -> Tensor:
    """Weights of both signs and a NaN; some are 0.0 and -0.0 if that is asked for."""
    weight = torch.randn(SHAPE).to(dtype)
    weight[weight == 0] = 1.0
    weight[2, 3, 1] = float("nan")
    if zeros:
        weight[:, 1:3, 2], weight[4] = 0.0, -0.0
    return weight


def defined(weight: Tensor, mask: Tensor | None) -> list[bool]:
    """The definition, one weight at a time."""
    may = [True] * weight.numel() if mask is None else mask.flatten().tolist()
    return [x != 0 and kept for x, kept in zip(weight.flatten().tolist(), may, strict=True)]


@each_dtype
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strided", ["no", "weight", "mask"])
def test_nonzero(strided: str, masked: bool, zeros: bool, dtype: torch.dtype) -> None:
    weight, mask = weights(dtype, zeros), torch.rand(SHAPE) < 0.5 if masked else None
    if strided == "weight":
        weight = weight.transpose(0, 2).contiguous().transpose(0, 2)
    if strided == "mask" and mask is not None:
        mask = mask.transpose(0, 2).contiguous().transpose(0, 2)
    live = nonzero(weight, mask)
    if zeros:
        assert live is not None and live.shape == weight.shape
        assert live.flatten().tolist() == defined(weight, mask)
    else:
        assert live is mask  # the same tensor, so that no second one is held


def test_a_mask_that_drops_all_zeros_is_returned_as_it_is() -> None:
    weight = weights(torch.float32, True)
    mask = weight != 0
    assert nonzero(weight, mask) is mask
    assert nonzero(torch.zeros(0, 3), None) is None


def test_in_memory() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight[3], net[0].weight[5, 2] = 0.0, -0.0
    mask = torch.rand(8, 5) < 0.7
    topology = lap_ext.trace(net, torch.zeros(1, 5))
    for given in ({}, {"0": mask}):
        place = Memory(topology, given)
        (chunk,) = place.chunks(topology.layers["0"])
        live = place.live(chunk)
        assert live is not None
        assert live.flatten().tolist() == defined(net[0].weight.detach(), given.get("0"))
        rows = [place.live(piece) for piece in chunk.split(10)]
        assert len(rows) == 4 and all(row is not None for row in rows)
        assert torch.equal(torch.cat([row for row in rows if row is not None]), live.flatten())
        (chunk,) = place.chunks(topology.layers["2"])
        assert place.live(chunk) is None


def files_of(directory: Path, net: nn.Module) -> Files:
    files = open_directory(write(directory, net.state_dict()))
    structure = structure_of(files, net, INPUTS, "raise")
    return plan_of(structure, files, options_of("lookahead"), 1 << 30)[1]


def test_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    with torch.no_grad():
        net[3].weight[4], net[3].weight[6, 7] = 0.0, -0.0
    place, mask = files_of(tmp_path / "in", net), torch.rand(70, 150) < 0.7
    for given in (None, mask):
        if given is not None:
            monkeypatch.setattr(place, "mask", lambda chunk: chunk.cut_from(mask))
        found: list[bool] = []
        for chunk in place.chunks(place.topology.layers["3"]):
            live = place.live(chunk)
            assert live is not None and live.shape == chunk.weight.shape
            found += live.flatten().tolist()
        assert found == defined(net[3].weight.detach(), given)
    monkeypatch.undo()
    assert all(place.live(chunk) is None for chunk in place.chunks(place.topology.layers["0"]))
