# SPDX-License-Identifier: MIT
"""Every message by its text: the function, the user's names, what came, the cure.

Messages are part of the interface. When an error is raised, nothing has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from lap_ext import Neighbor
from lap_ext.errors import LapError, LapValueError, calling, in_layer
from lap_ext.ops import reference, schema
from tests.helpers.parameters import needs_native

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

# (call of lap_ext, kind of error, its full text)
Case = tuple[Callable[[], Any], type[Exception], str]

SHAPES: list[Case] = [
    (
        lambda: lap_ext.score(zeros(5, 2), W, None),
        ValueError,
        f"score: expected {DATA}, got w_prev [5, 2] and w [4, 3], that is 5 and 3 channels. "
        "Check that w_prev is the layer next to w.",
    ),
    (
        lambda: lap_ext.mask(None, W, zeros(2, 5), sparsity=0.5),
        ValueError,
        f"mask: expected {READ}, got w_next [2, 5] and w [4, 3], that is 5 and 4 channels. "
        "Check that w_next is the layer next to w.",
    ),
    (
        lambda: lap_ext.prune_([PREV, zeros(5, 2)], W, None, sparsity=0.5),
        ValueError,
        f"prune_: expected {DATA.replace('w_prev', 'w_prev[1]')}, got w_prev[1] [5, 2] and w "
        "[4, 3], that is 5 and 3 channels. Check that w_prev[1] is the layer next to w.",
    ),
    (
        lambda: lap_ext.neighbor_norms(None, zeros(6, 2, 3), zeros(6, 1, 3)),
        ValueError,
        f"neighbor_norms: expected {READ}, got w_next [6, 1, 3] and w [6, 2, 3], that is 1 and 6 "
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
        lambda: lap_ext.score_from_norms(W, torch.ones(4), None),
        ValueError,
        "score_from_norms: expected in_norm [3] (one entry per input channel of w), got [4].",
    ),
    (
        lambda: lap_ext.mask_from_norms(W, None, torch.ones(4, 1), sparsity=0.5),
        ValueError,
        "mask_from_norms: expected out_norm [4] (one entry per output channel of w), got [4, 1].",
    ),
    (
        lambda: lap_ext.mask(None, W, None, sparsity=0.5, mask=zeros(3, 4, dtype=torch.bool)),
        ValueError,
        "mask: expected mask.shape == w.shape (one flag per weight), got mask [3, 4] and w [4, 3].",
    ),
    (
        lambda: lap_ext.topk_mask([W, W], keep=3, mask=[W > 0, zeros(2, dtype=torch.bool)]),
        ValueError,
        "topk_mask: expected mask[1].shape == scores[1].shape (one flag per weight), got mask[1] "
        "[2] and scores[1] [4, 3].",
    ),
    (
        lambda: lap_ext.topk_mask([W, W], keep=3, mask=[W > 0]),
        ValueError,
        "topk_mask: expected one mask per tensor of scores, got 1 masks for 2 tensors.",
    ),
    (
        lambda: lap_ext.prune_(None, torch.ones(1, 3).expand(4, 3), None, sparsity=0.5),
        ValueError,
        "prune_: expected w whose elements do not share memory (it is changed in place), got shape "
        "[4, 3] with strides [0, 1]. Make a contiguous copy first.",
    ),
]

TYPES: list[Case] = [
    (
        lambda: lap_ext.prune_(None, W.to(torch.int8), None, sparsity=0.5),
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
        lambda: lap_ext.mask([PREV, [PREV]], W, None, sparsity=0.5),
        TypeError,
        "mask: expected w_prev[1] to be a torch.Tensor, got list.",
    ),
    (
        lambda: lap_ext.score(None, W.to_sparse(), None),
        TypeError,
        "score: expected a dense w, got layout torch.sparse_coo. Pass w.to_dense().",
    ),
    (
        lambda: lap_ext.mask(None, W, None, sparsity=0.5, mask=W),
        TypeError,
        "mask: expected a bool mask (True: may be kept), got torch.float32. Pass mask != 0.",
    ),
    (
        lambda: lap_ext.topk_mask([W], keep=3, mask=W > 0),
        TypeError,
        "topk_mask: expected mask to be a list of bool masks, one per tensor of scores, got "
        "Tensor.",
    ),
    (
        lambda: lap_ext.topk_mask([W, W.half()], keep=3),
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
        lambda: lap_ext.mask(None, W, None, sparsity=90),
        ValueError,
        f"mask: {FRACTION} 90. Did you mean 0.90?",
    ),
    (
        lambda: lap_ext.prune_(None, W, None, sparsity=12.5),
        ValueError,
        f"prune_: {FRACTION} 12.5. Did you mean 0.125?",
    ),
    (lambda: lap_ext.mask(None, W, None, sparsity=101), ValueError, f"mask: {FRACTION} 101."),
    (lambda: lap_ext.mask(None, W, None, sparsity=-0.1), ValueError, f"mask: {FRACTION} -0.1."),
    (lambda: lap_ext.mask(None, W, None, sparsity=NAN), ValueError, f"mask: {FRACTION} nan."),
    (lambda: lap_ext.topk_mask(W, sparsity=INF), ValueError, f"topk_mask: {FRACTION} inf."),
    (
        lambda: lap_ext.mask(None, W, None, sparsity=True),
        TypeError,
        "mask: expected sparsity to be a number (the fraction removed), got bool.",
    ),
    (
        lambda: lap_ext.mask(None, W, None, sparsity="0.5"),
        TypeError,
        "mask: expected sparsity to be a number (the fraction removed), got str.",
    ),
    (
        lambda: lap_ext.mask_from_norms(W, None, None, keep=-1),
        ValueError,
        "mask_from_norms: expected keep >= 0 (the number kept), got -1.",
    ),
    (
        lambda: lap_ext.topk_mask(W, keep=0.5),
        TypeError,
        "topk_mask: expected keep to be an integer (the number kept), got float.",
    ),
    (
        lambda: lap_ext.mask(None, W, None, keep=True),
        TypeError,
        "mask: expected keep to be an integer (the number kept), got bool.",
    ),
    (
        lambda: lap_ext.mask(None, W, None, sparsity=0.5, keep=3),
        ValueError,
        f"mask: {ONE_OF} sparsity=0.5 and keep=3. Pass exactly one.",
    ),
    (lambda: lap_ext.topk_mask(W), ValueError, f"topk_mask: {ONE_OF} neither. Pass exactly one."),
    (
        lambda: lap_ext.kth_largest([W, W], 25),
        ValueError,
        "kth_largest: expected 1 <= k <= 24 (k counts from the largest of all 24 scores), got "
        "k=25.",
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
        lambda: lap_ext.prune_(None, W, [NEXT, meta(NEXT)], sparsity=0.5),
        ValueError,
        one_device("prune_", "w_next[1]"),
    ),
    (
        lambda: lap_ext.score_from_norms(W, meta(torch.ones(3)), None),
        ValueError,
        one_device("score_from_norms", "in_norm"),
    ),
    (
        lambda: lap_ext.mask(None, W, None, sparsity=0.5, mask=meta(W > 0)),
        ValueError,
        one_device("mask", "mask"),
    ),
    (
        lambda: lap_ext.topk_mask(W, keep=5, mask=meta(W > 0)),
        ValueError,
        one_device("topk_mask", "mask", "scores"),
    ),
    (
        lambda: lap_ext.topk_mask([W, meta(W)], keep=5),
        ValueError,
        "topk_mask: expected all scores to share one device (they are ranked together), got cpu "
        "for scores[0] and meta for scores[1]. Move or convert them first.",
    ),
]


def short(x: Any) -> str:
    """Names a test by the start of its message."""
    return x[:50].replace("expected ", "") if isinstance(x, str) else ""


@pytest.mark.parametrize(("call", "kind", "text"), SHAPES + TYPES + AMOUNTS + DEVICES, ids=short)
def test_message(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text
    assert isinstance(caught.value, LapError)


# ---- what native kernels find, in parts ----------------------------------------------------------
PARTS = ("expected", "got", "cure", "argument", "option")
FAR = torch.logspace(-300, 300, 5, dtype=torch.float64)


def spoiled(*shape: int) -> Tensor:
    """Ones, with a NaN behind the first one."""
    x = torch.ones(shape)
    x.view(-1)[1] = NAN
    return x


def doubled(x: Tensor) -> Tensor:
    return x.to(torch.float64)


# (operator, arguments) that the kernels themselves find wrong, on values
WRONG: dict[str, tuple[str, tuple[Any, ...]]] = {
    "weights": ("score", (spoiled(4, 3), doubles(1, 1, 1), doubles(1, 1, 1, 1), 1, False, True)),
    "norms": ("mask", (W, doubles(1, -2, 1), doubles(1, 1, 1, 1), 3, None, 1, False, True)),
    "infinite norms": ("score", (W, doubles(1, 1, 1), doubles(1, INF, 1, 1), 1, False, True)),
    "pruned weights": (
        "prune_", (spoiled(4, 3), doubles(1, 1, 1), doubles(1, 1, 1, 1), 3, None, 1, False, True),
    ),
    "range": ("mask", (torch.ones(5, 5), FAR, FAR.clone(), 24, None, 1, False, True)),
    "scores": ("topk_mask", ([spoiled(3, 3)], 2, [], True)),
    "a list of scores": ("kth_largest", ([W, spoiled(3, 3)], 2, True)),
    "rows": ("row_squared_norms", (doubled(W) * 1e200, True, "w_prev")),
    "columns": ("col_squared_norms", (spoiled(4, 3), 1, True, "w_next[1]")),
}  # fmt: skip


def failure(call: Callable[..., Any], *args: Any) -> LapError:
    """The error of a call."""
    with pytest.raises(LapError) as caught:
        call(*args)
    return caught.value


def parts(error: LapError) -> dict[str, Any]:
    """What an error says, without who called."""
    return {name: getattr(error, name) for name in PARTS}


def errors_of(case: str) -> tuple[LapError, LapError]:
    """The errors of an operator's kernel and of the reference."""
    op, args = WRONG[case]
    ours = failure(schema.call, getattr(schema, op), *args)
    return ours, failure(getattr(reference, op), *args)


def as_arrays(x: Any) -> Any:
    if isinstance(x, list):
        return [as_arrays(y) for y in x]
    return x.numpy() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("case", WRONG)
def test_parts_are_those_of_the_reference(case: str) -> None:
    native, plain = errors_of(case)
    assert parts(native) == parts(plain) and type(native) is type(plain) is LapValueError
    assert native.text(named=False) == plain.text(named=False)
    with pytest.raises(LapValueError) as caught, calling("prune"):
        schema.call(getattr(schema, WRONG[case][0]), *WRONG[case][1])
    assert str(caught.value) == f"prune: {plain.text(named=False)}"


@needs_native
@pytest.mark.parametrize("case", WRONG)
def test_parts_of_numpy_are_those_of_the_reference(case: str) -> None:
    from lap_ext.ops import numpy_args

    op, args = WRONG[case]
    error = failure(getattr(numpy_args.kernels, op), *map(as_arrays, args))
    plain = failure(getattr(reference, op), *args)
    assert {**parts(error), "argument": error.argument or None} == parts(plain)
    assert type(error) is LapValueError and error.text() == plain.text(named=False)


def test_a_failure_of_an_earlier_call_is_not_a_later_ones() -> None:
    """The library keeps its last failure; other errors after it stay what they are."""
    earlier, _ = errors_of("weights")

    def other(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        schema.call(other)
    assert type(caught.value) is RuntimeError
    with pytest.raises(ValueError, match=r"^mine$") as mine:
        schema.call(lambda: (_ for _ in ()).throw(ValueError("mine")))
    assert type(mine.value) is ValueError
    later, plain = errors_of("scores")
    assert parts(later) == parts(plain) != parts(earlier)
    _, args = WRONG["weights"]
    with pytest.raises((RuntimeError, TypeError)) as wrong:  # by torch, before the kernel
        schema.call(schema.score, *args[:-1])
    assert not isinstance(wrong.value, LapError)


def test_an_error_is_its_threads() -> None:
    """Two threads fail in turns; each gets its own parts."""
    barrier = threading.Barrier(2, timeout=60)
    told: dict[str, list[LapError]] = {"weights": [], "rows": []}

    def fail(case: str) -> None:
        for _ in range(20):
            barrier.wait()
            told[case].append(errors_of(case)[0])

    workers = [threading.Thread(target=fail, args=(case,)) for case in told]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for case, errors in told.items():
        assert len(errors) == 20
        want = parts(failure(getattr(reference, WRONG[case][0]), *WRONG[case][1]))
        assert all(parts(error) == want for error in errors)


def test_a_failure_in_another_thread_is_not_this_ones() -> None:
    worker = threading.Thread(target=lambda: errors_of("weights"))
    worker.start()
    worker.join()
    native, plain = errors_of("range")
    assert parts(native) == parts(plain)


def test_layers_of_a_call() -> None:
    """Inside of a model the layer stands for w, and the option that only tensors have is gone."""
    op, args = WRONG["weights"]
    with pytest.raises(LapValueError) as caught, calling("prune"), in_layer("fc1"):
        schema.call(getattr(schema, op), *args)
    assert str(caught.value) == (
        "prune: expected finite weights in layer 'fc1', got 1 non-finite values, the first at flat "
        "index 1. Repair them."
    )
