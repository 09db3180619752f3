# SPDX-License-Identifier: MIT
"""Properties of score and mask on numbers that hypothesis chooses."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lap_ext
from tests.helpers import layer_oracle as oracle

SIZES = hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=9)
# Norms within 2**+-200 have a product that doubles hold; weights are any finite float32.
NORM = st.one_of(st.just(0.0), st.floats(2.0**-200, 2.0**200), st.floats(0.5, 2.0))
ANY_WEIGHT = st.floats(width=32, allow_nan=False, allow_infinity=False)
MILD_WEIGHT = st.floats(-64, 64, width=16).filter(lambda x: x == 0 or abs(x) > 2.0**-10)


@st.composite
def layers(draw: Any, weights: Any = ANY_WEIGHT, norms: Any = NORM) -> tuple[Tensor, ...]:
    """(w, in_norm, out_norm) of a small plain layer."""
    w = draw(hnp.arrays(np.float32, SIZES, elements=weights))
    ins = draw(hnp.arrays(np.float64, w.shape[1], elements=norms))
    outs = draw(hnp.arrays(np.float64, w.shape[0], elements=norms))
    return torch.from_numpy(w), torch.from_numpy(ins), torch.from_numpy(outs)


MILD = layers(MILD_WEIGHT, st.floats(2.0**-10, 2.0**10))
SHARE = st.floats(0, 1)


@given(layers(), SHARE)
def test_mask_is_the_exact_rank(layer: tuple[Tensor, ...], sparsity: float) -> None:
    w, ins, outs = layer
    keep = oracle.keep_count(sparsity, w.numel())
    got = lap_ext.mask_from_norms(w, ins, outs, sparsity=sparsity)
    assert torch.equal(got, oracle.rank_mask(oracle.exact_score(w, ins, outs), keep))
    assert int(got.sum()) == keep


@given(layers())
def test_score_is_the_exact_score(layer: tuple[Tensor, ...]) -> None:
    w, ins, outs = layer
    expected = oracle.float_score(w, ins, outs)
    assert torch.equal(lap_ext.score_from_norms(w, ins, outs), expected)


@given(MILD, st.integers(-100, 100), SHARE)
def test_scaling_by_a_power_of_two(layer: tuple[Tensor, ...], k: int, sparsity: float) -> None:
    w, ins, outs = layer
    expected = lap_ext.mask_from_norms(w, ins, outs, sparsity=sparsity)
    assert torch.equal(lap_ext.mask_from_norms(w * 2.0**k, ins, outs, sparsity=sparsity), expected)
    assert torch.equal(lap_ext.mask_from_norms(w, ins * 2.0**k, outs, sparsity=sparsity), expected)
    scaled = lap_ext.score_from_norms(w * 2.0**k, ins, outs)
    assert torch.equal(scaled, lap_ext.score_from_norms(w, ins, outs) * 2.0**k)


@given(MILD, st.randoms(use_true_random=False))
def test_permuted_channels_permute_scores(layer: tuple[Tensor, ...], random: Any) -> None:
    w, ins, outs = layer
    rows, cols = list(range(w.shape[0])), list(range(w.shape[1]))
    random.shuffle(rows)
    random.shuffle(cols)
    got = lap_ext.score_from_norms(w[rows][:, cols], ins[cols], outs[rows])
    assert torch.equal(got, lap_ext.score_from_norms(w, ins, outs)[rows][:, cols])


@given(MILD, SHARE)
def test_mask_is_topk_of_score(layer: tuple[Tensor, ...], sparsity: float) -> None:
    w, ins, outs = layer
    scores = lap_ext.score_from_norms(w, ins, outs)
    got = lap_ext.mask_from_norms(w, ins, outs, sparsity=sparsity)
    assert torch.equal(got, lap_ext.topk_mask(scores, sparsity=sparsity))
    kept, dropped = scores[got], scores[~got]
    if kept.numel() and dropped.numel():
        assert kept.min() >= dropped.max()
        assert lap_ext.kth_largest(scores, int(got.sum())) == kept.min()


@given(layers(), SHARE, SHARE)
def test_more_sparsity_keeps_a_subset(layer: tuple[Tensor, ...], a: float, b: float) -> None:
    less, more = sorted((a, b))
    wide = lap_ext.mask_from_norms(*layer, sparsity=less)
    narrow = lap_ext.mask_from_norms(*layer, sparsity=more)
    assert not (narrow & ~wide).any()


@given(layers(), SHARE, SHARE)
def test_pruning_twice(layer: tuple[Tensor, ...], first: float, second: float) -> None:
    """Weights pruned before never return, and exactly min(keep, survivors) stay."""
    w, ins, outs = layer
    w = w.clone()
    before = w.clone()
    alive = lap_ext.prune_from_norms_(w, ins, outs, sparsity=first)
    assert torch.equal(w, before * alive) and not torch.signbit(w[~alive]).any()
    again = lap_ext.prune_from_norms_(w, ins, outs, sparsity=second, mask=alive)
    assert not (again & ~alive).any()
    keep = oracle.keep_count(second, w.numel())
    assert int(again.sum()) == min(keep, int(alive.sum()))


@given(st.floats(0, 1), st.integers(0, 2**60))
def test_keep_count_is_exact(sparsity: float, n: int) -> None:
    from lap_ext.ops import check

    assert check.keep_count(sparsity, None, n) == oracle.keep_count(sparsity, n)


@given(
    st.lists(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
            elements=st.floats(width=32, allow_nan=False),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 300),
    st.booleans(),
)
def test_topk_of_lists(arrays: list[np.ndarray], keep: int, masked: bool) -> None:
    scores = [torch.from_numpy(np.asarray(x)) for x in arrays]
    masks = [torch.rand(x.shape) < 0.5 for x in scores] if masked else None
    got = lap_ext.topk_mask(scores, keep=keep, mask=masks)
    expected = oracle.rank_values(scores, keep, masks)
    assert all(map(torch.equal, got, expected))
