# SPDX-License-Identifier: MIT
"""Every place keeps the contract of `Place` (tests/helpers/place_contract.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.checkpoint import weights
from lap_ext.places import Chunk, Memory, readable
from tests.helpers import place_contract
from tests.helpers.cut_place import Cut, Cuts, every_row, ragged
from tests.helpers.file_places import files_of, least_memory
from tests.helpers.place_nets import CASES, model_of, topology_of

ONE: Cuts = lambda _: [0]  # noqa: E731
SLICES: dict[str, Cuts] = {"one": ONE, "several": lambda _: [2, 3, 7]}
MEMORIES = ["least", "some", "4GB"]
each_net = pytest.mark.parametrize("name", CASES)


def weights_of(topology: lap_ext.Topology) -> dict[str, Tensor]:
    """Copies the weights, contiguous."""
    return {name: readable(x).clone().contiguous() for name, x in topology.layers.items()}


def check_memory(topology: lap_ext.Topology) -> None:
    place_contract.check(Memory(topology), weights_of(topology))


@each_net
@pytest.mark.parametrize("kind", ["float32", "mixed64"])
def test_memory(name: str, kind: str) -> None:
    check_memory(topology_of(name, model_of(name, kind)))


def test_memory_channels_last() -> None:
    model = model_of("convolutions").to(memory_format=torch.channels_last)
    topology = topology_of("convolutions", model)
    assert not topology.layers["3"].weight.is_contiguous()
    check_memory(topology)


@each_net
def test_memory_strided(name: str) -> None:
    """Weights in the order of their columns, with gaps, none of them at the first place."""
    model = model_of(name)
    for x in {id(x): x for x in model.parameters() if x.dim() > 1}.values():
        room = torch.full((*reversed(x.shape[1:]), 2 * x.shape[0] + 1), torch.nan)
        view = room.permute(*reversed(range(x.dim())))[1::2]
        x.data = view.copy_(x.data)
    topology = topology_of(name, model)
    assert name == "empty" or not any(x.weight.is_contiguous() for x in topology.layers.values())
    check_memory(topology)


@each_net
@pytest.mark.parametrize("fits", [False, True])
def test_cut(name: str, fits: bool) -> None:
    topology, cuts = topology_of(name, model_of(name, "mixed")), every_row if fits else ragged
    place = Cut(topology, cuts, slices=SLICES["several"], fits=fits, sampled=lambda _: [1, 0])
    place_contract.check(place, weights_of(topology))


@each_net
@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_files(name: str, slices: str, memory: str, tmp_path: Path) -> None:
    topology, cuts = topology_of(name, model_of(name)), SLICES[slices]
    budget: int | str = memory
    if memory != "4GB":
        least = least_memory(topology, tmp_path, cuts)
        budget = least if memory == "least" else 2 * least
    with files_of(topology, tmp_path, budget, cuts) as place:
        count = max(len(place.starts(x)) for x in topology.layers.values())
        assert (count > 1) == (slices == "several")
        place_contract.check(place, weights_of(topology))


def test_samples_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of each slice, spread from its first to its last."""
    monkeypatch.setattr(weights, "_SAMPLED", 1)
    topology = topology_of("mlp", model_of("mlp"))
    with files_of(topology, tmp_path, slices=SLICES["several"]) as place:
        place_contract.check(place, weights_of(topology))
        layer = topology.layers["3"]
        found = [chunk.first // 24 for chunk in place.sample(layer, 10 * 24)]
        assert {0, 2, 3, 6, 7, 19} <= set(found) and 10 <= len(found) <= 13


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "mixed64"])
def test_files_of_each_dtype(kind: str, tmp_path: Path) -> None:
    topology = topology_of("mlp", model_of("mlp", kind))
    with files_of(topology, tmp_path, least_memory(topology, tmp_path, ONE)) as place:
        assert not all(place.fits(layer, 1) for layer in topology.layers.values())
        place_contract.check(place, weights_of(topology))


@pytest.mark.parametrize("most", [1, 9, 40, 1 << 30])
def test_pieces_of_a_chunk(most: int) -> None:
    """At most so many weights, or one row; they begin where they are told to."""
    topology = topology_of("mlp", model_of("mlp"))
    layer = topology.layers["3"]
    flat = readable(layer).flatten()
    chunk = Chunk(layer, flat[24 * 3 : 24 * 13], 24 * 3)
    pieces = list(chunk.split(most, starts=[0, 24 * 5, 24 * 6, 24 * 13]))
    assert torch.equal(torch.cat([x.weight for x in pieces]), chunk.weight)
    assert [x.first for x in pieces[1:]] == [x.first + x.weight.numel() for x in pieces[:-1]]
    assert {24 * 5, 24 * 6} <= {x.first for x in pieces}
    assert all(x.weight.numel() <= max(most, 24) for x in pieces)


def test_a_weight_that_is_computed() -> None:
    """A place gives what the operations use: here the parameter times a mask."""
    model = model_of("mlp")
    nn.utils.prune.random_unstructured(model[3], "weight", 0.3)  # type: ignore[index]
    topology = lap_ext.trace(model, CASES["mlp"].inputs)
    used = weights_of(topology)
    name = list(used)[1]
    assert torch.equal(used[name], model[3].weight)  # type: ignore[index]
    place_contract.check(Memory(topology), used)
