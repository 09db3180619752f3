# SPDX-License-Identifier: MIT
"""Chunks of a layer: whole rows next to each other, split and cut from other tensors."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lap_ext.places import Chunk
from lap_ext.places.place import RowRange, row_length, row_ranges, rows_of
from lap_ext.topology.roles import Part


def layer_of(shape: tuple[int, ...], *parts: Part) -> Any:
    roles = [SimpleNamespace(part=part) for part in parts or (Part(shape),)]
    return SimpleNamespace(name="layer", shape=shape, roles=roles, computed=False)


LAYOUTS: dict[str, Any] = {
    "flat": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("most", [1, 12, 13, 30, 84, 1000])
def test_a_split_gives_each_weight_once_in_flat_order(layout: str, most: int) -> None:
    """In whole rows of 12 weights; at most so many, but a row."""
    weight = LAYOUTS[layout](torch.randn(7, 3, 2, 2))
    layer = layer_of((7, 3, 2, 2))
    chunks = list(Chunk(layer, weight).split(most))
    assert torch.equal(torch.cat([x.weight.flatten() for x in chunks]), weight.flatten())
    first = 0
    for chunk in chunks:
        assert chunk.first == first and chunk.weight.numel() % 12 == 0
        assert chunk.weight.numel() <= max(most, 12)
        first += chunk.weight.numel()
    assert chunks[0].whole == (len(chunks) == 1) == (most >= 84)


def test_a_split_begins_where_it_must() -> None:
    """Slices that are stored apart are never in one chunk, also of a part of the layer."""
    layer = layer_of((10, 4))
    full = Chunk(layer, torch.arange(40.0).view(10, 4))
    assert [x.first for x in full.split(12, [0, 8, 28])] == [0, 8, 12, 24, 28, 36]
    part = Chunk(layer, torch.arange(8.0, 40.0), 8)
    assert [x.first for x in part.split(1000, [0, 8, 28])] == [8, 28]
    assert all(float(x.weight[0]) == x.first for x in part.split(4, [28]))
    assert list(part.split(1000)) == [part]


def test_a_split_of_a_view_copies_a_piece_at_most() -> None:
    weight = torch.randn(40, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    for chunk in Chunk(layer_of((40, 6, 3, 3)), weight).split(100):
        assert chunk.weight.untyped_storage().nbytes() <= 4 * 108


def test_what_a_chunk_cuts_from_a_full_tensor() -> None:
    full = torch.arange(12).view(4, 3)
    layer = layer_of((4, 3))
    assert Chunk(layer, torch.zeros(4, 3)).cut_from(full) is full
    assert Chunk(layer, torch.zeros(6), 3).cut_from(full).tolist() == [3, 4, 5, 6, 7, 8]
    assert Chunk.of(layer, torch.zeros(12)).weight.shape == (4, 3)
    assert Chunk.of(layer, torch.zeros(3), 9).weight.shape == (3,)


def test_the_parameter_of_computed_weights() -> None:
    """What it is made of, not what is used; the weight itself where nothing is computed."""
    layer = layer_of((2, 2))
    chunk = Chunk(layer, torch.ones(2), 2)
    assert chunk.parameter is chunk.weight
    layer.computed, layer.weight = True, torch.arange(4.0, requires_grad=True).view(2, 2)
    assert chunk.parameter.tolist() == [2, 3] and not chunk.parameter.requires_grad


PARTS = {
    "full": Part((12, 5)),
    "groups": Part((12, 5), 3),
    "transposed groups": Part((12, 5), 4, True),
    "rows": Part((12, 5), rows=(4, 10)),
    "rows and columns": Part((12, 5), rows=(4, 10), cols=(1, 3)),
}


@given(st.sampled_from(list(PARTS)), st.lists(st.integers(1, 11), max_size=5))
def test_ranges_of_rows(name: str, cuts: list[int]) -> None:
    """Each row of a part is in one range, with its own values; ranges keep groups apart."""
    part, full = PARTS[name], torch.arange(60.0).view(12, 5)
    layer = layer_of((12, 5), Part((12, 5)), part)
    bounds = sorted({0, 12, *cuts})
    found: list[Tensor] = []
    for top, bottom in pairwise(bounds):
        chunk = Chunk.of(layer, full[top:bottom].flatten(), top * 5)
        for x in row_ranges(part, chunk):
            rows = rows_of(chunk, chunk.weight, part, x)
            assert rows.shape[0] == x.bottom - x.top > 0
            if part.groups > 1:
                height = 12 // part.groups
                assert x.group == x.top // height
                whole = x.top % height == 0 and x.bottom - x.top == x.groups * height
                assert whole or (x.groups == 1 and (x.bottom - 1) // height == x.group)
            found.append(rows)
    assert torch.equal(torch.cat(found), part.of(full))


def test_the_length_of_a_row() -> None:
    """That of the longest: a chunk ends where a row of each part does."""
    layer = layer_of((4, 6), Part((4, 6)), Part((8, 3)))
    assert row_length(layer) == 6
    assert row_length(layer_of((0, 6))) == 6 and row_length(layer_of((5,))) == 1
    assert RowRange(0, 2, 0, 1) == next(row_ranges(Part((2, 6)), Chunk(layer, torch.zeros(12))))
