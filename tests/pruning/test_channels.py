# SPDX-License-Identifier: MIT
"""Selection within each output channel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lap_ext.places import Chunk
from lap_ext.pruning import channels
from lap_ext.topology.roles import Part


def test_by_hand() -> None:
    scores = torch.tensor([[3.0, 1, 2], [9, 9, 9], [0, 0, 5]])
    found = channels.mask(scores, Part((3, 3)), 5, None)  # 1 each, and one more of two
    assert found.tolist() == [
        [True, False, True],
        [True, True, False],
        [False, False, True],
    ]


def test_masked() -> None:
    """A row that has fewer left gives its share to the others; pruned weights never return."""
    scores = torch.tensor([[0.0, 0, 5], [4, 3, 2], [1, 2, 3]])
    mask = torch.tensor([[False, True, False], [True, True, True], [True, True, True]])
    found = channels.mask(scores, Part((3, 3)), 6, mask)
    assert found.tolist() == [
        [False, True, False],
        [True, True, True],
        [False, True, True],
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_layout(transposed: bool, groups: int) -> None:
    """Against a loop over output channels."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    weight = kind(4, 6, 3, groups=groups).weight.detach()
    scores = torch.randint(0, 9, weight.shape).float()
    part = Part(tuple(weight.shape), groups, transposed)
    for keep in (0, 1, 5, 31, 100, scores.numel()):
        found = channels.mask(scores, part, keep, None)
        assert int(found.sum()) == keep
        for o in range(6):
            per_group = 6 // groups
            first = o // per_group * (4 // groups)
            one = (slice(first, first + 4 // groups), o % per_group) if transposed else (o,)
            own = scores[one].flatten()
            count = keep // 6 + (o < keep % 6)
            order = sorted(range(own.numel()), key=lambda j: (-float(own[j]), j))
            kept = torch.zeros(own.numel(), dtype=torch.bool)
            kept[order[:count]] = True
            assert torch.equal(found[one].flatten(), kept), (keep, o)


@pytest.mark.parametrize(
    ("capacity", "keep", "expected"),
    [
        ([3, 3], 0, [0, 0]),
        ([3, 3], 3, [2, 1]),
        ([0, 5, 1], 4, [0, 3, 1]),
        ([1, 5, 5], 8, [1, 4, 3]),
        ([2, 2], 9, [2, 2]),
        ([], 0, []),
    ],
)
def test_even_counts(capacity: list[int], keep: int, expected: list[int]) -> None:
    found = channels.even_counts(torch.tensor(capacity, dtype=torch.int64), keep)
    assert found.tolist() == expected


def layer_of(part: Part) -> Any:
    return SimpleNamespace(name="layer", shape=part.shape, roles=[SimpleNamespace(part=part)])


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("shape", [(7, 4), (7, 2, 3)])
def test_chunks_of_rows_keep_what_the_full_layer_keeps(shape: tuple[int, ...], rows: int) -> None:
    part = Part(shape)
    layer, scores = layer_of(part), torch.randint(0, 5, shape).float()
    live = torch.rand(shape) < 0.6
    live[3] = False
    step = rows * scores[0].numel()
    chunks = [
        Chunk.of(layer, weight, number * step)
        for number, weight in enumerate(scores.flatten().split(step))
    ]
    place = SimpleNamespace(chunks=lambda _: iter(chunks), live=lambda chunk: chunk.cut_from(live))
    for keep in (0, 1, 6, 13, int(live.sum()), scores.numel()):
        scoring: Any = SimpleNamespace(place=place, chunks=place.chunks)
        counts = channels.counts(scoring, layer, keep)
        found = [
            channels.mask_rows(chunk.weight, chunk, part, counts, chunk.cut_from(live))
            for chunk in chunks
        ]
        assert [x.shape for x in found] == [chunk.weight.shape for chunk in chunks]
        want = channels.mask(scores, part, keep, live)
        assert torch.equal(torch.cat([x.flatten() for x in found]).reshape(shape), want)
        assert int(want.sum()) == min(keep, int(live.sum()))
