# SPDX-License-Identifier: MIT
"""Every message by its text: the function, the user's names, what came, the cure.

Messages are part of the interface. When an error is raised, nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from lap_ext import Neighbor

NAN, INF = float("nan"), float("inf")


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


W = torch.ones(4, 3)
PREV, NEXT = torch.ones(3, 2), torch.ones(2, 4)
FLOATS = "(float32, float64, float16 or bfloat16)"
REPAIR = "Repair them, or pass check_finite=False to rank them as they come."
DATA = "w_prev.shape[0] == w.shape[1] (its outputs feed w's inputs)"
READ = "w_next.shape[1] == w.shape[0] (it reads w's outputs)"
FRACTION = "expected 0 <= sparsity <= 1 (the fraction removed), got"
ONE_OF = "expected either sparsity (the fraction removed) or keep (the number kept), got"

# (call of lap_ext, kind of error, the whole message)
Case = tuple[Callable[[], Any], type[Exception], str]

SHAPES: list[Case] = [
    (
        lambda: lap_ext.score(zeros(5, 2), W, None),
        ValueError,
        f"score: expected {DATA}, got w_prev [5, 2] and w [4, 3], that is 5 and 3 channels. "
        "Check that w_prev is the layer next to w.",
    ),
    (
        lambda: lap_ext.mask(None, W, zeros(2, 5), 0.5),
        ValueError,
        f"mask: expected {READ}, got w_next [2, 5] and w [4, 3], that is 5 and 4 channels. "
        "Check that w_next is the layer next to w.",
    ),
    (
        lambda: lap_ext.prune_([PREV, zeros(5, 2)], W, None, 0.5),
        ValueError,
        f"prune_: expected {DATA.replace('w_prev', 'w_prev[1]')}, got w_prev[1] [5, 2] and w "
        "[4, 3], that is 5 and 3 channels. Check that w_prev[1] is the layer next to w.",
    ),
    (
        lambda: lap_ext.factors(None, zeros(6, 2, 3), zeros(6, 1, 3)),
        ValueError,
        f"factors: expected {READ}, got w_next [6, 1, 3] and w [6, 2, 3], that is 1 and 6 "
        "channels. A depthwise or grouped neighbor needs Neighbor(weight, groups=6).",
    ),
    (
        lambda: lap_ext.score(zeros(2, 3, 1), zeros(4, 3, 1), None),
        ValueError,
        f"score: expected {DATA}, got w_prev [2, 3, 1] and w [4, 3, 1], that is 2 and 3 channels. "
        "A transposed convolution needs Neighbor(weight, transposed=True).",
    ),
    (
        lambda: lap_ext.score(zeros(3, 2), zeros(4, 6), None),
        ValueError,
        f"score: expected {DATA}, got w_prev [3, 2] and w [4, 6], that is 3 and 6 channels. "
        "Unequal counts meet only where a flatten joins a convolution and a linear weight.",
    ),
    (
        lambda: lap_ext.score(None, zeros(3), None),
        ValueError,
        "score: expected w with 2 dimensions or more ([O, I / groups, *K]), got [3]. "
        "Pass weight[None] or weight[:, None].",
    ),
    (
        lambda: lap_ext.score([], W, None),
        ValueError,
        "score: expected w_prev to name one neighbor or more, got an empty sequence. "
        "Pass None for a layer without one.",
    ),
    (
        lambda: lap_ext.score(None, W, None, groups=3),
        ValueError,
        "score: expected groups >= 1 that divides w.shape[0], got groups=3 and w [4, 3].",
    ),
    (
        lambda: lap_ext.score(None, W, None, groups=0),
        ValueError,
        "score: expected groups >= 1 that divides w.shape[0], got groups=0 and w [4, 3].",
    ),
    (
        lambda: lap_ext.score(Neighbor(PREV, groups=2), W, None),
        ValueError,
        "score: expected groups >= 1 that divides w_prev.shape[0], got groups=2 and w_prev [3, 2].",
    ),
    (
        lambda: lap_ext.score(Neighbor(PREV, scale=torch.ones(2)), W, None),
        ValueError,
        "score: expected w_prev.scale [3] (one entry per shared channel), got [2].",
    ),
    (
        lambda: lap_ext.score_from_factors(W, torch.ones(4), None),
        ValueError,
        "score_from_factors: expected in_norm [3] (one entry per input channel of w), got [4].",
    ),
    (
        lambda: lap_ext.mask_from_factors(W, None, torch.ones(4, 1), 0.5),
        ValueError,
        "mask_from_factors: expected out_norm [4] (one entry per output channel of w), got [4, 1].",
    ),
    (
        lambda: lap_ext.mask(None, W, None, 0.5, mask=zeros(3, 4, dtype=torch.bool)),
        ValueError,
        "mask: expected mask.shape == w.shape (one flag per weight), got mask [3, 4] and w [4, 3].",
    ),
    (
        lambda: lap_ext.topk_mask([W, W], 3, mask=[W > 0, zeros(2, dtype=torch.bool)]),
        ValueError,
        "topk_mask: expected mask[1].shape == scores[1].shape (one flag per weight), got mask[1] "
        "[2] and scores[1] [4, 3].",
    ),
    (
        lambda: lap_ext.topk_mask([W, W], 3, mask=[W > 0]),
        ValueError,
        "topk_mask: expected one mask per tensor of scores, got 1 masks for 2 tensors.",
    ),
    (
        lambda: lap_ext.prune_(None, torch.ones(1, 3).expand(4, 3), None, 0.5),
        ValueError,
        "prune_: expected w whose elements do not share memory (it is changed in place), got shape "
        "[4, 3] with strides [0, 1]. Make a contiguous copy first.",
    ),
]

TYPES: list[Case] = [
    (
        lambda: lap_ext.prune_(None, W.to(torch.int8), None, 0.5),
        TypeError,
        f"prune_: expected a floating-point w {FLOATS}, got torch.int8. Dequantize first.",
    ),
    (
        lambda: lap_ext.score(PREV.int(), W, None),
        TypeError,
        f"score: expected a floating-point w_prev {FLOATS}, got torch.int32. Dequantize first.",
    ),
    (
        lambda: lap_ext.score(None, W.to(torch.float8_e4m3fn), None),
        TypeError,
        f"score: expected a floating-point w {FLOATS}, got torch.float8_e4m3fn. "
        "Convert it to float32 first.",
    ),
    (
        lambda: lap_ext.score(None, W.cfloat(), None),
        TypeError,
        f"score: expected a floating-point w {FLOATS}, got torch.complex64. Pass its magnitude.",
    ),
    (
        lambda: lap_ext.score(None, W.numpy(), None),
        TypeError,
        "score: expected w to be a torch.Tensor, got ndarray. Use lap_ext.numpy for NumPy arrays.",
    ),
    (
        lambda: lap_ext.mask([PREV, [PREV]], W, None, 0.5),
        TypeError,
        "mask: expected w_prev[1] to be a torch.Tensor, got list.",
    ),
    (
        lambda: lap_ext.score(None, W.to_sparse(), None),
        TypeError,
        "score: expected a dense w, got layout torch.sparse_coo. Pass w.to_dense().",
    ),
    (
        lambda: lap_ext.mask(None, W, None, 0.5, mask=W),
        TypeError,
        "mask: expected a bool mask (True: may be kept), got torch.float32. Pass mask != 0.",
    ),
    (
        lambda: lap_ext.topk_mask([W], 3, mask=W > 0),
        TypeError,
        "topk_mask: expected mask to be a list of bool masks, one per tensor of scores, got Tensor.",
    ),
    (
        lambda: lap_ext.topk_mask([W, W.half()], 3),
        TypeError,
        "topk_mask: expected all scores to share one dtype (they are ranked together), got "
        "torch.float32 for scores[0] and torch.float16 for scores[1]. Move or convert them first.",
    ),
    (
        lambda: lap_ext.kth_largest(W.int(), 1),
        TypeError,
        f"kth_largest: expected floating-point scores {FLOATS}, got torch.int32. "
        "Convert to a floating-point dtype first.",
    ),
    (
        lambda: lap_ext.score(None, W, None, groups=2.0),
        TypeError,
        "score: expected groups of w to be an int, got float.",
    ),
    (
        lambda: lap_ext.score(Neighbor(PREV, scale=2.0), W, None),
        TypeError,
        "score: expected w_prev.scale to be a torch.Tensor, got float.",
    ),
    (
        lambda: lap_ext.bn_scale(torch.nn.Linear(2, 2)),
        TypeError,
        "bn_scale: expected a BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm, got Linear.",
    ),
]

AMOUNTS: list[Case] = [
    (
        lambda: lap_ext.mask(None, W, None, 90),
        ValueError,
        f"mask: {FRACTION} 90. Did you mean 0.90?",
    ),
    (
        lambda: lap_ext.prune_(None, W, None, 12.5),
        ValueError,
        f"prune_: {FRACTION} 12.5. Did you mean 0.125?",
    ),
    (lambda: lap_ext.mask(None, W, None, 101), ValueError, f"mask: {FRACTION} 101."),
    (lambda: lap_ext.mask(None, W, None, -0.1), ValueError, f"mask: {FRACTION} -0.1."),
    (lambda: lap_ext.mask(None, W, None, NAN), ValueError, f"mask: {FRACTION} nan."),
    (lambda: lap_ext.topk_mask(W, sparsity=INF), ValueError, f"topk_mask: {FRACTION} inf."),
    (
        lambda: lap_ext.mask(None, W, None, True),
        TypeError,
        "mask: expected sparsity to be a number (the fraction removed), got bool.",
    ),
    (
        lambda: lap_ext.mask(None, W, None, "0.5"),
        TypeError,
        "mask: expected sparsity to be a number (the fraction removed), got str.",
    ),
    (
        lambda: lap_ext.mask_from_factors(W, None, None, keep=-1),
        ValueError,
        "mask_from_factors: expected keep >= 0 (the number kept), got -1.",
    ),
    (
        lambda: lap_ext.topk_mask(W, 0.5),
        TypeError,
        "topk_mask: expected keep to be an integer (the number kept), got float.",
    ),
    (
        lambda: lap_ext.mask(None, W, None, keep=True),
        TypeError,
        "mask: expected keep to be an integer (the number kept), got bool.",
    ),
    (
        lambda: lap_ext.mask(None, W, None, 0.5, keep=3),
        ValueError,
        f"mask: {ONE_OF} sparsity=0.5 and keep=3. Pass exactly one.",
    ),
    (lambda: lap_ext.topk_mask(W), ValueError, f"topk_mask: {ONE_OF} neither. Pass exactly one."),
    (
        lambda: lap_ext.kth_largest([W, W], 25),
        ValueError,
        "kth_largest: expected 1 <= k <= 24 (k counts from the largest of all 24 scores), got k=25.",
    ),
    (
        lambda: lap_ext.kth_largest(W, 0),
        ValueError,
        "kth_largest: expected 1 <= k <= 12 (k counts from the largest of all 12 scores), got k=0.",
    ),
    (
        lambda: lap_ext.kth_largest(W, 1.0),
        TypeError,
        "kth_largest: expected k to be an integer (1 is the largest score), got float.",
    ),
]


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


def one_device(function: str, name: str, like: str = "w") -> str:
    return (
        f"{function}: expected {name} and {like} on one device, got {name} on meta and {like} on "
        "cpu. Move one of them first."
    )


DEVICES: list[Case] = [
    (lambda: lap_ext.score(meta(PREV), W, None), ValueError, one_device("score", "w_prev")),
    (
        lambda: lap_ext.prune_(None, W, [NEXT, meta(NEXT)], 0.5),
        ValueError,
        one_device("prune_", "w_next[1]"),
    ),
    (
        lambda: lap_ext.score_from_factors(W, meta(torch.ones(3)), None),
        ValueError,
        one_device("score_from_factors", "in_norm"),
    ),
    (
        lambda: lap_ext.mask(None, W, None, 0.5, mask=meta(W > 0)),
        ValueError,
        one_device("mask", "mask"),
    ),
    (
        lambda: lap_ext.topk_mask(W, 5, mask=meta(W > 0)),
        ValueError,
        one_device("topk_mask", "mask", "scores"),
    ),
    (
        lambda: lap_ext.topk_mask([W, meta(W)], 5),
        ValueError,
        "topk_mask: expected all scores to share one device (they are ranked together), got cpu for "
        "scores[0] and meta for scores[1]. Move or convert them first.",
    ),
]


def short(x: Any) -> str:
    """The start of a message names its test; the call and the kind add nothing."""
    return x[:50].replace("expected ", "") if isinstance(x, str) else ""


@pytest.mark.parametrize(("call", "kind", "text"), SHAPES + TYPES + AMOUNTS + DEVICES, ids=short)
def test_message(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text
    assert type(caught.value) is kind
