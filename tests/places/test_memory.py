# SPDX-License-Identifier: MIT
"""The place of weights in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.places import Chunk, Memory, readable


@pytest.fixture
def topology() -> lap_ext.Topology:
    torch.manual_seed(0)
    return lap_ext.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))


def test_a_layer_is_one_chunk_of_its_own_memory(topology: lap_ext.Topology) -> None:
    place = Memory(topology)
    for name, layer in topology.layers.items():
        every = place.chunks(layer), place.chunks(layer, whole=True), place.sample(layer, 1)
        for chunks in every:
            (chunk,) = chunks
            assert chunk.layer is layer and chunk.whole and chunk.first == 0
            assert chunk.weight.data_ptr() == topology.model[int(name)].weight.data_ptr()
            assert not chunk.weight.requires_grad
        assert place.starts(layer) == [0] and place.fits(layer, 1 << 60)
        assert (place.dtype(layer), place.bytes(layer)) == (torch.float32, 4 * layer.weight.numel())
    layers = list(topology.layers.values())
    assert place.ordered(reversed(layers)) == layers[::-1]
    found = [(layer, len(list(chunks))) for layer, chunks in place.each(layers, 9)]
    assert found == [(layer, 1) for layer in layers]


def test_masks_and_what_is_live(topology: lap_ext.Topology) -> None:
    """A weight is live if its mask keeps it and it is not zero; None says that all are."""
    layer = topology.layers["0"]
    topology.model[0].weight.data[1] = 0
    given = torch.ones(4, 3, dtype=torch.bool)
    given[2] = False
    place, bare = Memory(topology, {"0": given}), Memory(topology)
    (chunk,) = place.chunks(layer)
    part = Chunk(layer, chunk.weight.flatten()[3:9], 3)

    def rows(mask: Tensor | None) -> list[bool] | None:
        return None if mask is None else mask.view(-1, 3).any(1).tolist()

    assert rows(place.mask(chunk)) == [True, True, False, True]
    assert rows(place.live(chunk)) == [True, False, False, True]
    assert (rows(place.mask(part)), rows(place.live(part))) == ([True, False], [False, False])
    assert bare.mask(chunk) is None and rows(bare.live(chunk)) == [True, False, True, True]
    (other,) = bare.chunks(topology.layers["1"])
    assert bare.mask(other) is None and bare.live(other) is None


def test_masks_that_are_set_replace_those_before(topology: lap_ext.Topology) -> None:
    """Those that were given are not changed."""
    layer, given = topology.layers["1"], {"1": torch.ones(2, 4, dtype=torch.bool)}
    place = Memory(topology, given)
    (chunk,) = place.chunks(layer)
    assert place.live(chunk) is not None
    place.set_masks(layer, iter([(chunk, torch.zeros(2, 4, dtype=torch.bool))]))
    for mask in (place.mask(chunk), place.live(chunk)):
        assert mask is not None and not mask.any()
    assert given["1"].all()


def test_nothing_outlives_the_process(topology: lap_ext.Topology) -> None:
    """Rounds and notes are made each time; one process holds all counts."""
    place, made = Memory(topology), list[str]()
    for _ in range(2):
        place.round(1, lambda: made.append("round"))
        place.noted("name", lambda: made.append("value"))
        place.noted_tensors("name", lambda: made.append("tensors") or {})
    assert made == ["round", "value", "tensors"] * 2
    counts = torch.arange(3)
    assert place.total(counts) is counts
    assert (place.capacity(10), place.capacity(64 << 20)) == (1 << 16, 1 << 20)


@pytest.mark.parametrize(
    ("weight", "error", "text"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), TypeError, "got int32. Convert the model first"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "got complex64. Leave it out: "),
        (torch.zeros(2, 2).to_sparse(), TypeError, "dense weights, got layout torch.sparse_coo"),
        (torch.zeros(2, 2, device="meta"), ValueError, "weights with values, got one on the meta"),
    ],
    ids=["integers", "complex", "sparse", "meta"],
)
def test_weights_that_cannot_be_read(weight: Tensor, error: type[Exception], text: str) -> None:
    layer = lap_ext.trace(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2)).layers["0"]
    layer.topology.model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(error, match=f"^layer '0': expected .*{text}"):
        readable(layer)
    with pytest.raises(error, match=text):
        next(Memory(layer.topology).chunks(layer))
