# SPDX-License-Identifier: MIT
"""The contract of `Place`, point by point: any place must pass `check`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from lap_ext.places import Chunk, Place
from lap_ext.places.place import row_length
from lap_ext.topology import Layer
from tests.helpers.checkpoints import bits

BESIDE = (0, 1, 24)  # bytes per weight beside a full layer
_SAMPLES = 20  # chunks of a sample that are looked at


def check(place: Place, weights: Mapping[str, Tensor]) -> None:
    """Checks a place that is fresh: no mask is set, and nothing is noted.

    weights: of each layer, as the model uses them.
    """
    layers = list(place.topology.layers.values())
    assert set(weights) == {layer.name for layer in layers}
    assert place.pieces > 0 and place.sampled >= 0
    assert place.capacity(0) >= 0 and place.capacity(1 << 40) >= 0
    assert sorted(layer.name for layer in place.ordered(layers)) == sorted(weights)
    for layer in layers:
        weight = weights[layer.name]
        assert place.dtype(layer) == weight.dtype and place.bytes(layer) == weight.nbytes
        _check_chunks(place, layer, weight)
        _check_whole(place, layer, weight)
        _check_sample(place, layer, weight)
    for beside in BESIDE:
        _check_each(place, layers, weights, beside)
    for layer in layers:
        _check_live(place, layer, weights[layer.name], None)
    _check_notes(place)
    _check_rounds(place, layers, weights)
    for layer in layers:
        _check_chunks(place, layer, weights[layer.name])  # masks change no weight


def _check_chunk(chunk: Chunk, layer: Layer, weight: Tensor) -> None:
    """Whole rows of every part that a role uses, with the bits of the weight."""
    count = chunk.weight.numel()
    assert chunk.layer is layer
    for length in [row_length(layer), *(_length(role.part.shape) for role in layer.roles)]:
        assert chunk.first % length == 0 and count % length == 0
    assert not chunk.weight.requires_grad and chunk.weight.dtype == weight.dtype
    assert chunk.weight.device == weight.device
    flat = weight.flatten()[chunk.first : chunk.first + count]
    assert torch.equal(bits(chunk.weight).flatten(), bits(flat))
    assert chunk.whole == (count == weight.numel())
    assert chunk.weight.shape == (weight.shape if chunk.whole else (count,))


def _length(shape: tuple[int, ...]) -> int:
    return max(1, math.prod(shape[1:]))


def _valid(chunks: Iterator[Chunk], layer: Layer, weight: Tensor) -> list[tuple[int, int]]:
    """Checks chunks, each again once the next one is there; returns where they begin and end."""
    found, last = [], None
    for chunk in chunks:
        _check_chunk(chunk, layer, weight)
        if last is not None:
            _check_chunk(last, layer, weight)
        found.append((chunk.first, chunk.first + chunk.weight.numel()))
        last = chunk
    return found


def _check_chunks(place: Place, layer: Layer, weight: Tensor) -> None:
    bounds = _valid(place.chunks(layer), layer, weight)
    assert [begin for begin, _ in bounds[1:]] == [end for _, end in bounds[:-1]]
    assert not weight.numel() or (bounds[0][0], bounds[-1][1]) == (0, weight.numel())
    assert all(end > begin for begin, end in bounds) or not weight.numel()
    if place.held:
        assert len(bounds) == 1
    starts = list(place.starts(layer))
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert set(starts) <= {0, *(begin for begin, _ in bounds)}
    one, other = place.chunks(layer), place.chunks(layer)  # each call begins anew
    for chunk in other:
        _check_chunk(chunk, layer, weight)
        again = next(one)
        _check_chunk(again, layer, weight)
        assert again.first == chunk.first
    stopped = place.chunks(layer)
    next(stopped, None)
    assert _valid(place.chunks(layer), layer, weight) == bounds


def _check_whole(place: Place, layer: Layer, weight: Tensor) -> None:
    fitting = [place.fits(layer, beside) for beside in BESIDE]
    assert fitting == sorted(fitting, reverse=True)
    assert fitting[0] or not place.held
    if fitting[0]:
        (chunk,) = place.chunks(layer, whole=True)
        _check_chunk(chunk, layer, weight)
        assert chunk.whole and chunk.first == 0 and chunk.weight.shape == layer.shape


def _check_sample(place: Place, layer: Layer, weight: Tensor) -> None:
    for count in (0, 1, max(weight.numel() // 3, 1), weight.numel()):
        for chunk in islice(place.sample(layer, count), _SAMPLES):
            _check_chunk(chunk, layer, weight)


def _check_each(
    place: Place, layers: list[Layer], weights: Mapping[str, Tensor], beside: int
) -> None:
    names = []
    for layer, chunks in place.each(layers, beside):
        bounds = _valid(chunks, layer, weights[layer.name])
        names.append(layer.name)
        total = sum(end - begin for begin, end in bounds)
        assert total == weights[layer.name].numel()
        if place.fits(layer, beside):
            assert len(bounds) == 1
    assert names == [layer.name for layer in layers]


def _check_live(place: Place, layer: Layer, weight: Tensor, mask: Tensor | None) -> None:
    """The mask, and what of it is not zero, of chunks and of pieces of them."""
    whole = [True] if place.fits(layer, 0) else []
    for full in [False, *whole]:
        for chunk in place.chunks(layer, full):
            for piece in [chunk, *chunk.split(1)]:
                kept = torch.ones_like(piece.weight, dtype=torch.bool)
                if mask is not None:
                    kept = piece.cut_from(mask)
                _same(place.mask(piece), kept, piece)
                _same(place.live(piece), kept & (piece.parameter != 0), piece)


def _same(got: Tensor | None, want: Tensor, chunk: Chunk) -> None:
    if got is None:
        assert want.all()
        return
    assert got.dtype == torch.bool and got.device == chunk.weight.device
    assert got.shape == chunk.weight.shape and torch.equal(got, want)


def _check_notes(place: Place) -> None:
    value = {"a": [1, None, "b", {"c": 2.5}]}
    tensors = {"0.in": torch.rand(3, dtype=torch.float64), "0.out": torch.rand(0)}
    assert place.noted("one", lambda: value) == value
    assert place.noted("one", lambda: value) == value
    assert place.noted("two", lambda: 3) == 3
    for name in ("one", "two", "one"):
        found = place.noted_tensors(name, lambda: tensors)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], x) for key, x in tensors.items())
    for counts in (torch.tensor([1, 2**62]), torch.zeros(2, 0, dtype=torch.int64)):
        assert torch.equal(place.total(counts), counts)


def _check_rounds(place: Place, layers: list[Layer], weights: Mapping[str, Tensor]) -> None:
    """Each round replaces the masks, of chunks or of full layers."""
    before: dict[str, Tensor] = {}
    for number in (1, 2):
        stored = {x.name: Chunk(x, weights[x.name]).parameter for x in layers}
        masks = {name: (torch.rand(x.shape) < 0.6) & (x != 0) for name, x in stored.items()}
        made: list[str] = []
        place.round(number, partial(_mask_all, place, layers, weights, before, masks, made))
        assert made == [layer.name for layer in layers]
        for layer in layers:
            _check_live(place, layer, weights[layer.name], masks[layer.name])
        before = masks


def _mask_all(
    place: Place,
    layers: list[Layer],
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    made: list[str],
) -> None:
    """Replaces the masks of all layers, one after the other."""
    for number, layer in enumerate(layers):
        _check_live(place, layer, weights[layer.name], before.get(layer.name))
        whole = place.fits(layer, 0) and number % 2 == 0
        mask, chunks = masks[layer.name], place.chunks(layer, whole)
        place.set_masks(layer, ((chunk, chunk.cut_from(mask)) for chunk in chunks))
        _check_live(place, layer, weights[layer.name], mask)
        made.append(layer.name)
