# SPDX-License-Identifier: MIT
"""Thresholds of rankings whose scores come in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lap_ext
from lap_ext.ops import schema
from lap_ext.pruning.thresholds import bracket, key_of, largest, threshold


def of_one(counts: Tensor) -> Tensor:
    """Adds counts over one process."""
    return counts


def threshold_masks(
    slices: list[Tensor],
    keep: int,
    interval: tuple[int, int],
    capacity: int,
    step: int = 7,
    lives: list[Tensor] | None = None,
) -> list[Tensor]:
    """Makes masks by a threshold, of scores that come step at a time."""

    def read() -> Iterator[tuple[int, Tensor, Tensor | None]]:
        for index, x in enumerate(slices):
            live = None if lives is None else lives[index].split(step)
            for number, chunk in enumerate(x.split(step)):
                yield index, chunk, None if live is None else live[number]

    dtype = slices[0].dtype
    found = threshold(read, len(slices), keep, interval, dtype, capacity, of_one)
    flags: list[list[Tensor]] = [[] for _ in slices]
    left = list(found.ties)
    for index, scores, live in read():
        mask, taken = schema.call(schema.threshold_mask, scores, live, found.key, left[index])
        left[index] -= int(taken)
        flags[index].append(mask)
    masks = [torch.cat(x) if x else torch.zeros(0, dtype=torch.bool) for x in flags]
    assert [int(mask.sum()) for mask in masks] == list(found.kept)
    return masks


values = st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.0000001, 2.0, 3.5, 1e30, float("inf")])


@given(
    st.lists(st.lists(st.tuples(values, st.booleans()), max_size=40), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 170),
    st.tuples(values, values),
    st.sampled_from([0, 1, 5, 1000]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_thresholds_are_those_of_topk_mask(
    scores: list[list[tuple[float, bool]]],
    masked: bool,
    keep: int,
    ends: tuple[float, float],
    capacity: int,
    dtype: torch.dtype,
) -> None:
    """Whatever the interval at the start, whatever is held, and whichever may be kept."""
    slices = [torch.tensor([value for value, _ in x], dtype=dtype) for x in scores]
    lives = [torch.tensor([live for _, live in x], dtype=torch.bool) for x in scores]
    keep %= sum(map(len, scores)) + 2
    low, high = sorted(key_of(x, dtype) for x in ends)
    given_masks = lives if masked else None
    want = lap_ext.topk_mask(slices, keep=keep, mask=given_masks)
    found = threshold_masks(slices, keep, (low, high), capacity, lives=given_masks)
    for got, mask in zip(found, want, strict=True):
        assert torch.equal(got, mask)


@pytest.mark.parametrize("capacity", [0, 100, 10**6])
@pytest.mark.parametrize("keep", [1, 999, 30_000, 59_999])
def test_thresholds_of_many_keys(keep: int, capacity: int) -> None:
    slices = [torch.rand(20_000).square(), torch.rand(30_000).round(decimals=2), torch.rand(10_000)]
    interval = bracket(torch.cat(slices)[::31], keep, 60_000)
    assert interval[0] <= interval[1]
    want = lap_ext.topk_mask(slices, keep=keep)
    for start in (interval, (0, largest(torch.float32))):
        masks = threshold_masks(slices, keep, start, capacity, 997)
        assert all(map(torch.equal, masks, want)) and len(masks) == len(want)


def test_a_good_sample_needs_one_pass() -> None:
    scores = torch.rand(100_000)
    interval = bracket(scores[::17].clone(), 50_000, 100_000)
    assert 0 < interval[0] < interval[1] < key_of(1.0, torch.float32)
    passes = []

    def read() -> Iterator[tuple[int, Tensor, None]]:
        passes.append(1)
        yield 0, scores, None

    found = threshold(read, 1, 50_000, interval, torch.float32, 10_000, of_one)
    assert len(passes) == 1
    assert found.kept == (50_000,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_sort_as_scores_do(dtype: torch.dtype) -> None:
    scores = [0.0, 1e-40, 1e-30, 0.5, 1.0, 1e30, float("inf")]
    keys = [key_of(x, dtype) for x in scores]
    assert keys == sorted(set(keys)) and keys[0] == 0 and keys[-1] < largest(dtype)


def test_a_bracket_holds_the_rank() -> None:
    """Of scores in any order; without a sample, it is all keys."""
    scores = torch.rand(50_000)
    for keep in (1, 100, 25_000, 49_999):
        low, high = bracket(scores[::11].clone(), keep, 50_000)
        wanted = key_of(float(scores.sort(descending=True).values[keep - 1]), torch.float32)
        assert low <= wanted <= high
    assert bracket(torch.empty(0), 5, 10) == (0, largest(torch.float32))
