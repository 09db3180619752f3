# SPDX-License-Identifier: MIT
"""lap_ext.numpy: the torch functions' bits on NumPy arrays, in a process without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lap_ext
from tests.helpers import layer_cases as cases
from tests.helpers.parameters import needs_native
from tests.helpers.processes import run_python

pytestmark = needs_native  # lap_ext.numpy has no fallback: its kernels are the native ones

DTYPES = [np.float32, np.float64, np.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)


@pytest.fixture
def lap() -> Any:
    import lap_ext.numpy

    return lap_ext.numpy


def same(got: Any, expected: Tensor) -> bool:
    """Type, shape, dtype and bits."""
    like = expected.numpy()
    assert isinstance(got, np.ndarray) and got.flags.c_contiguous, type(got)
    return got.dtype == like.dtype and got.shape == like.shape and np.array_equal(got, like)


def as_numpy(x: Any, lap: Any) -> Any:
    """Tensors to arrays of the same strides, also inside neighbors."""
    if isinstance(x, list):
        return [as_numpy(part, lap) for part in x]
    if isinstance(x, lap_ext.Neighbor) and x.weight is not None:
        parts = (x.weight, x.groups, x.transposed, x.scale)
        return lap.Neighbor(*[as_numpy(part, lap) for part in parts])
    return x.numpy() if isinstance(x, Tensor) else x


def test_same_classes(lap: Any) -> None:
    assert lap.Neighbor is lap_ext.Neighbor and lap.IDENTITY is lap_ext.IDENTITY


@each_dtype
@pytest.mark.parametrize("case", cases.WORKED, ids=lambda c: c.name)
def test_worked_by_hand(case: cases.Worked, dtype: Any, lap: Any) -> None:
    torch_dtype = torch.from_numpy(np.zeros(1, dtype)).dtype
    w_prev, w, w_next = (as_numpy(x, lap) for x in cases.built(case, torch_dtype, "cpu"))
    got = lap.score(w_prev, w, w_next, groups=case.groups, transposed=case.transposed)
    real = np.float64 if dtype == np.float64 else np.float32
    assert got.dtype == real and np.array_equal(got, np.array(case.expected, dtype=real))


@each_dtype
@pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda s: s.name)
def test_layers_and_layouts(shape: cases.Shape, dtype: Any, lap: Any) -> None:
    torch_dtype = torch.from_numpy(np.zeros(1, dtype)).dtype
    w, ins, outs = cases.random_layer(shape, torch_dtype)
    kinds = {"groups": shape.groups, "transposed": shape.transposed}
    keep, flags = w.numel() // 3, torch.rand(w.shape) < 0.7
    for layout in cases.layouts_of(w.dim()):
        laid = cases.LAYOUTS[layout](w)
        args = (laid.numpy(), ins.numpy(), outs.numpy())
        assert args[0].strides == tuple(s * w.element_size() for s in laid.stride())
        expected = lap_ext.score_from_norms(laid, ins, outs, **kinds)
        assert same(lap.score_from_norms(*args, **kinds), expected), layout
        expected = lap_ext.mask_from_norms(laid, ins, outs, keep=keep, mask=flags, **kinds)
        got = lap.mask_from_norms(*args, keep=keep, mask=flags.numpy(), **kinds)
        assert same(got, expected), layout
        copy = cases.LAYOUTS[layout](w.clone())
        got = lap.prune_from_norms_(copy.numpy(), *args[1:], keep=keep, **kinds)
        twin = laid.clone()
        assert same(got, lap_ext.prune_from_norms_(twin, ins, outs, keep=keep, **kinds)), layout
        assert torch.equal(copy, twin), layout


def test_negative_strides(lap: Any) -> None:
    """What torch cannot hold: reversed axes."""
    w = np.random.randn(6, 7, 3).astype(np.float32)
    ins, outs = np.random.rand(7), np.random.rand(6)
    turned = w[::-1, :, ::-1]
    assert min(turned.strides) < 0
    assert np.array_equal(
        lap.score_from_norms(turned, ins, outs),
        lap.score_from_norms(np.ascontiguousarray(turned), ins, outs),
    )
    expected = lap.mask_from_norms(turned.copy(), ins[::-1], outs, sparsity=0.6)
    assert np.array_equal(
        lap.mask_from_norms(turned, ins[::-1].copy(), outs, sparsity=0.6), expected
    )
    before = w.copy()
    assert np.array_equal(lap.prune_from_norms_(turned, ins[::-1], outs, sparsity=0.6), expected)
    assert np.array_equal(turned, before[::-1, :, ::-1] * expected)
    assert np.array_equal(lap.topk_mask(turned, keep=9), lap.topk_mask(turned.copy(), keep=9))


@each_dtype
def test_scores_and_lists(dtype: Any, lap: Any) -> None:
    shapes: list[tuple[int, ...]] = [(3, 5), (), (0,), (4, 3, 2), (1000,)]
    scores = [np.asarray(np.random.randn(*s)).astype(dtype) for s in shapes]
    tensors = [torch.from_numpy(x) for x in scores]
    for keep in (0, 1, 100, 10**6):
        got = lap.topk_mask(scores, keep=keep)
        assert all(map(same, got, lap_ext.topk_mask(tensors, keep=keep)))
    for k in (1, 17, 1040):
        got = lap.kth_largest(scores, k)
        assert got == lap_ext.kth_largest(tensors, k).item() and got.dtype == dtype
    assert same(lap.topk_mask(scores[0], sparsity=0.5), lap_ext.topk_mask(tensors[0], sparsity=0.5))


def test_neighbors(lap: Any) -> None:
    w_prev = lap_ext.Neighbor(torch.randn(6, 2, 3), scale=torch.randn(6))
    w, w_next = (
        torch.randn(4, 6, 3),
        [torch.randn(5, 4 * 7), torch.randn(3, 4, 1), lap_ext.IDENTITY],
    )
    args = [as_numpy(x, lap) for x in (w_prev, w, w_next)]
    for got, expected in zip(
        lap.neighbor_norms(*args), lap_ext.neighbor_norms(w_prev, w, w_next), strict=True
    ):
        assert same(got, expected)
    assert same(lap.score(*args), lap_ext.score(w_prev, w, w_next))
    assert same(lap.mask(*args, sparsity=0.8), lap_ext.mask(w_prev, w, w_next, sparsity=0.8))
    assert same(lap.prune_(*args, keep=9), lap_ext.mask(w_prev, w, w_next, keep=9))
    assert np.count_nonzero(args[1]) == 9


@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=str)
def test_empty(shape: tuple[int, ...], lap: Any) -> None:
    w = np.zeros(shape, np.float32)
    assert lap.score(None, w, None).shape == lap.mask(None, w, None, sparsity=0.5).shape == shape


def test_large(lap: Any) -> None:
    w = cases.hostile("zeros_60", 3_000_000, torch.float32).view(1500, 2000)
    for sparsity in (0.5, 0.9, 0.99):
        got = lap.mask(None, w.numpy(), None, sparsity=sparsity)
        assert same(got, lap_ext.mask(None, w, None, sparsity=sparsity))


def raised(call: Any, *args: Any, **kwargs: Any) -> tuple[type, str]:
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*args, **kwargs)
    return caught.type, str(caught.value)


def test_errors_speak_as_torch_does(lap: Any) -> None:
    w, bad = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32)
    bad[1, 2] = np.nan
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((np.ones((5, 2), np.float32), w, None), {"keep": 1}),
        ((None, bad, None), {"keep": 1}),
        (([w.T.copy(), bad.T], w, None), {"keep": 1}),
        ((None, w, None), {"sparsity": 90}),
        ((None, w, None), {"keep": 1, "mask": w[:1] > 0}),
    ]
    for args, kwargs in calls:
        tensors = [[torch.from_numpy(y) for y in x] if isinstance(x, list) else x for x in args]
        tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in tensors]
        twin = {k: torch.from_numpy(v) if k == "mask" else v for k, v in kwargs.items()}
        expected = raised(lap_ext.prune_, *tensors, **twin)
        assert raised(lap.prune_, *args, **kwargs) == expected
    assert w.all() and np.count_nonzero(bad) == 12


def test_types(lap: Any) -> None:
    w = np.ones((4, 3), np.float32)
    for wrong in (w.astype(np.int32), w.astype(np.complex64), [[1.0]], torch.ones(4, 3)):
        kind, text = raised(lap.score, None, wrong, None)
        assert issubclass(kind, TypeError) and text.startswith("score: expected"), text
    frozen = w.copy()
    frozen.flags.writeable = False
    kind, text = raised(lap.prune_, None, frozen, None, sparsity=0.5)
    assert issubclass(kind, ValueError) and text.startswith("prune_: expected") and frozen.all(), (
        text
    )


def test_big_endian_is_rejected_or_right(lap: Any) -> None:
    """Never read with the wrong byte order."""
    w = np.arange(1, 7, dtype=">f4").reshape(2, 3)
    try:
        got = lap.score(None, w, None)
    except TypeError as error:
        assert str(error).startswith("score: expected")
    else:
        assert np.array_equal(got, w)


BLOCKED = """
import sys
sys.modules["torch"] = None  # any import of torch now fails
import numpy as np
import lap_ext.numpy as lap
w = np.array([[1.0, -2.0, 3.0], [2.0, 0.0, -2.0]], dtype=np.float32)
p = np.array([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]], dtype=np.float32)
print(lap.score(lap.Neighbor(p), w, None).tolist())
print(lap.mask(p, w, lap.IDENTITY, sparsity=0.5).tolist())
try:
    lap.mask(None, w * np.nan, None, keep=2)
except ValueError as error:
    print(error)
print(lap.prune_(None, w, None, keep=1).sum(), w.sum(), "torch" in str(sys.modules["numpy"]))
"""


def test_works_without_torch() -> None:
    result = run_python(BLOCKED)
    assert result.stdout.splitlines() == [
        "[[5.0, 2.0, 6.0], [10.0, 0.0, 4.0]]",  # |w| times 5, 1, 2
        "[[True, False, True], [True, False, False]]",
        "mask: expected finite weights in w, got 6 non-finite values, the first at flat index 0. "
        "Repair them, or pass check_finite=False to rank them as they come.",
        "1 3.0 False",
    ], result.stderr


def test_does_not_import_torch_by_itself() -> None:
    result = run_python("import sys, lap_ext.numpy; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stdout + result.stderr
