# SPDX-License-Identifier: MIT
"""The operators of chunks of scores and weights: native == reference == the definition in loops."""

from __future__ import annotations

import itertools
import math
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lap_ext.errors import LapValueError
from lap_ext.ops import reference, schema
from tests.helpers.parameters import each_dtype, each_threads

SCORES = [torch.float32, torch.float64]
INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
LARGEST = {torch.float32: 2**31 - 1, torch.float64: 2**63 - 1}
SIZES = [0, 1, 63, 64, 65, 1000, 2**14 + 65]
MANY = 2**20 + 77  # enough for two threads

each_scores = pytest.mark.parametrize("dtype", SCORES, ids=lambda d: str(d).split(".")[1])
each_size = pytest.mark.parametrize("size", SIZES)
masked = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])

HOSTILE: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "uniform": lambda n, dtype: torch.rand(n, dtype=dtype),
    "zero": lambda n, dtype: torch.zeros(n, dtype=dtype),
    "equal": lambda n, dtype: torch.full((n,), 0.7, dtype=dtype),
    "few": lambda n, dtype: torch.randint(0, 4, (n,)).to(dtype) / 3,
    "tiny": lambda n, dtype: torch.rand(n, dtype=dtype) * torch.finfo(dtype).tiny,
    "wide": lambda n, dtype: torch.exp2(torch.rand(n, dtype=dtype) * 250 - 140),
    "huge": lambda n, dtype: torch.rand(n, dtype=dtype) * torch.finfo(dtype).max,
    "infinite": lambda n, dtype: torch.where(torch.rand(n) < 0.2, math.inf, 1.0).to(dtype),
}
each_hostile = pytest.mark.parametrize("name", list(HOSTILE))


def mask_of(size: int, masked: bool) -> Tensor | None:
    return torch.rand(size) < 0.7 if masked else None


def keys_of(scores: Tensor, mask: Tensor | None) -> list[int]:
    """The definition of a key, one at a time."""
    forms = ("<f", "<i") if scores.dtype == torch.float32 else ("<d", "<q")
    keys = [struct.unpack(forms[1], struct.pack(forms[0], x))[0] for x in scores.flatten().tolist()]
    live = [True] * len(keys) if mask is None else mask.flatten().tolist()
    return [key if is_live else -1 for key, is_live in zip(keys, live, strict=True)]


def both(op: str, *args: Any) -> Any:
    """What the dispatched kernel and the reference agree on, bit for bit."""
    got, expected = getattr(schema, op)(*args), getattr(reference, op)(*args)
    pairs = [(got, expected)] if isinstance(got, Tensor) else zip(got, expected, strict=True)
    for x, y in pairs:
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x, y), op
    return got


def intervals(keys: list[int], dtype: torch.dtype) -> list[tuple[int, int]]:
    """Single keys, and all between neighbors among the ends, and the full range."""
    cuts = ends(keys, dtype)
    return [(key, key) for key in cuts] + [*itertools.pairwise(cuts), (-1, LARGEST[dtype])]


def ends(keys: list[int], dtype: torch.dtype) -> list[int]:
    """Keys to cut at: the ends of the range, and some that are there."""
    ordered = sorted(set(keys))
    some = [ordered[0], ordered[len(ordered) // 2], ordered[-1]] if ordered else []
    return sorted({-1, 0, *some, LARGEST[dtype]})


def test_a_case_worked_by_hand() -> None:
    scores = torch.tensor([1.0, 0.25, 0.5, 0.0, 0.5, 0.5])
    quarter, half, one = 0x3E800000, 0x3F000000, 0x3F800000
    without_last = torch.tensor([True] * 5 + [False])
    counts, keys = both("count_keys", scores, None, quarter, half, True)
    assert counts.tolist() == [1, 4] and keys.tolist() == [quarter, half, half, half]
    assert both("count_keys", scores, without_last, quarter, half, False)[0].tolist() == [1, 3]
    bins = both("key_histogram", scores, without_last, quarter, one, 23, 3)  # 2^23: an exponent
    assert bins.tolist() == [1, 2, 1]
    # 1/4 + 3/16 + 0 of 2^30, below 2^1
    assert both("squares_above", scores, None, quarter, 1).tolist() == [7 * 2**26, 0]
    kept, taken = both("threshold_mask", scores, without_last, half, 3)
    assert kept.tolist() == [True, False, True, False, True, False] and taken.tolist() == [2]
    kept, taken = both("threshold_mask", scores, None, half, 1)
    assert kept.tolist() == [True, False, True, False, False, False] and taken.tolist() == [1]


# --- count_keys, key_histogram --------------------------------------------------------------------


@masked
@each_hostile
@each_size
@each_scores
def test_count_keys(dtype: torch.dtype, size: int, name: str, masked: bool) -> None:
    scores, mask = HOSTILE[name](size, dtype), mask_of(size, masked)
    keys = keys_of(scores, mask)
    for low, high in intervals(keys, dtype):
        inside = [key for key in keys if low <= key <= high]
        counts, taken = both("count_keys", scores, mask, low, high, True)
        assert counts.tolist() == [sum(key > high for key in keys), len(inside)]
        assert counts.dtype == torch.int64 and taken.dtype == INTEGER[dtype]
        assert taken.tolist() == inside
        again, nothing = both("count_keys", scores, mask, low, high, False)
        assert torch.equal(again, counts) and nothing.numel() == 0


@masked
@each_hostile
@each_size
@each_scores
def test_key_histogram(dtype: torch.dtype, size: int, name: str, masked: bool) -> None:
    scores, mask = HOSTILE[name](size, dtype), mask_of(size, masked)
    keys = keys_of(scores, mask)
    for low, high in intervals(keys, dtype):
        for bins in (1, 1 << 7, 1 << 15):
            shift = max(0, (high - low).bit_length() - (bins.bit_length() - 1))
            if shift >= torch.iinfo(INTEGER[dtype]).bits:
                continue
            expected = [0] * bins
            for key, count in Counter(keys).items():
                if low <= key <= high:
                    expected[(key - low) >> shift] += count
            got = both("key_histogram", scores, mask, low, high, shift, bins)
            assert got.dtype == torch.int64 and got.tolist() == expected


# --- squares_above --------------------------------------------------------------------------------


def naive_squares(scores: Tensor, keys: list[int], key: int, exponent: int) -> list[int]:
    """The definition, in Python's floats and integers."""
    sums, half = [0, 0], exponent // 2
    for score, its_key in zip(scores.flatten().tolist(), keys, strict=True):
        if its_key > key:
            scaled = score * 2.0**-half * 2.0 ** (half - exponent)
            upper, lower = divmod(int(scaled * scaled * 2.0**60), 2**30)
            sums = [sums[0] + upper, sums[1] + lower]
    return sums


@masked
@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "infinite"])
@each_size
@each_scores
def test_squares_above(dtype: torch.dtype, size: int, name: str, masked: bool) -> None:
    scores, mask = HOSTILE[name](size, dtype), mask_of(size, masked)
    keys = keys_of(scores, mask)
    exponent = math.frexp(float(scores.max()))[1] if size else 0
    for key in ends(keys, dtype):
        for larger in (0, 1, 400):
            e = min(exponent + larger, 1024)
            got = both("squares_above", scores, mask, key, e)
            assert got.tolist() == naive_squares(scores, keys, key, e)


@each_scores
def test_squares_at_both_ends_of_the_range(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    least = torch.tensor([1], dtype=INTEGER[dtype]).view(dtype)
    below_one = torch.nextafter(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype))
    largest = torch.tensor([info.max], dtype=dtype)
    for scores in (least, below_one, largest, torch.cat([least, below_one, largest])):
        keys, exponent = keys_of(scores, None), math.frexp(float(scores.max()))[1]
        got = both("squares_above", scores, None, -1, exponent)
        assert got.tolist() == naive_squares(scores, keys, -1, exponent)
    assert both("squares_above", torch.zeros(70, dtype=dtype), None, -1, -1073).tolist() == [0, 0]


@each_scores
@pytest.mark.parametrize("call", [schema.squares_above, reference.squares_above])
def test_squares_of_too_large_scores(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    scores = torch.tensor([0.25, 1.0, 0.5], dtype=dtype)
    dropped = torch.tensor([True, False, True])
    with pytest.raises(LapValueError, match=r"scores below 2\*\*0, got larger ones"):
        schema.call(call, scores, None, -1, 0)
    with pytest.raises(LapValueError, match="scores below"):
        schema.call(call, torch.full((9,), math.inf, dtype=dtype), None, -1, 1024)
    assert call(scores, dropped, -1, 0).tolist() == [2**30 // 16 + 2**30 // 4, 0]


# --- threshold_mask -------------------------------------------------------------------------------


@masked
@each_hostile
@each_size
@each_scores
def test_threshold_mask(dtype: torch.dtype, size: int, name: str, masked: bool) -> None:
    scores, mask = HOSTILE[name](size, dtype), mask_of(size, masked)
    live = [True] * size if mask is None else mask.tolist()
    keys = keys_of(scores, mask)
    for key in ends(keys, dtype):
        equal = sum(k == key for k in keys)
        for ties in sorted({0, 1, equal // 2, max(equal - 1, 0), equal, equal + 5}):
            expected, left = [], ties
            for k, is_live in zip(keys, live, strict=True):
                tie = is_live and k == key and left > 0
                left -= tie
                expected.append(is_live and (k > key or tie))
            kept, taken = both("threshold_mask", scores, mask, key, ties)
            assert kept.tolist() == expected and kept.dtype == torch.bool
            assert taken.tolist() == [ties - left]


def test_threshold_mask_has_the_shape_of_the_scores() -> None:
    scores = torch.rand(3, 4, 5)
    kept, _ = both("threshold_mask", scores, None, 0, 0)
    assert kept.shape == scores.shape
    kept, _ = both("threshold_mask", scores[:, 1:], torch.ones(3, 3, 5, dtype=torch.bool), 0, 0)
    assert torch.equal(kept, scores[:, 1:] > 0)


# --- random_scores_, masked_zero_, nonzero_mask ---------------------------------------------------


@each_size
@each_scores
def test_random_scores(dtype: torch.dtype, size: int) -> None:
    for start, first, step in ((0, 0, 1), (-1, 5, 3), (2**63 - 1, 2**40, 1), (-(2**63), 0, 2**20)):
        got, plain = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
        schema.random_scores_(got, start, first, step)
        reference.random_scores_(plain, start, first, step)
        assert torch.equal(got, plain)
        for index in {0, 1, size // 2, size - 1} & set(range(size)):
            x = (start + (first + index * step) * 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            assert float(got[index]) == ((x >> 40) + 1) / 2**24


@each_dtype
@each_size
def test_masked_zero(dtype: torch.dtype, size: int) -> None:
    """No bit of what is kept changes, be it a NaN with a payload; the rest becomes +0.0."""
    integer = INTEGER[dtype]
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, (size,), dtype=integer)
    mask = torch.rand(size) < 0.5
    expected = [x if kept else 0 for x, kept in zip(bits.tolist(), mask.tolist(), strict=True)]
    for call in (schema.masked_zero_, reference.masked_zero_):
        weight = bits.clone().view(dtype)
        call(weight, mask)
        assert weight.view(integer).tolist() == expected


def test_masked_zero_of_any_shape() -> None:
    for call in (schema.masked_zero_, reference.masked_zero_):
        weight, mask = torch.randn(3, 4, 5), torch.rand(60) < 0.5
        expected = torch.where(mask.view(3, 4, 5), weight, torch.zeros(()))
        call(weight, mask)
        assert torch.equal(weight, expected)


def with_zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Weights of random bits, NaN and inf among them; every third is +0.0, -0.0 or subnormal."""
    integer = INTEGER[dtype]
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, (size,), dtype=integer)
    special = torch.tensor([0, info.min, 1, info.min + 1], dtype=integer)
    chosen = special[torch.randint(0, 4, (size,))]
    return torch.where(torch.rand(size) < 0.3, chosen, bits).view(dtype)


@masked
@each_dtype
@each_size
def test_nonzero_mask(dtype: torch.dtype, size: int, masked: bool) -> None:
    random, zero = with_zeros(size, dtype), torch.zeros(size, dtype=dtype)
    for weight in (random, zero, -zero, torch.ones_like(random)):
        mask = mask_of(size, masked)
        may = [True] * size if mask is None else mask.tolist()
        pairs = zip(weight.tolist(), may, strict=True)
        expected = [x != 0 and allowed for x, allowed in pairs]
        live, count = both("nonzero_mask", weight, mask)
        assert live.tolist() == expected and live.dtype == torch.bool
        assert count.tolist() == [sum(expected)] and count.dtype == torch.int64


@each_dtype
def test_what_is_zero(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, math.nan, math.inf, -math.inf, info.tiny, info.max, -info.max, 0.0]
    weight = torch.tensor(values, dtype=dtype).repeat(20)  # in vectors, and behind them
    subnormal = torch.tensor([1], dtype=INTEGER[dtype]).view(dtype)
    weight = torch.cat([weight, subnormal, -subnormal])
    live, count = both("nonzero_mask", weight, None)
    assert live.tolist() == [*([False] * 2 + [True] * 6 + [False]) * 20, True, True]
    assert count.tolist() == [122]


def test_nonzero_mask_has_the_shape_of_the_weight() -> None:
    weight, mask = (torch.rand(3, 5, 4) < 0.5).float(), torch.rand(60) < 0.5
    live, count = both("nonzero_mask", weight, mask)
    assert live.shape == (3, 5, 4) and int(count) == int(live.sum())
    assert torch.equal(live, (weight == 1) & mask.view(3, 5, 4))
    strided = weight.transpose(1, 2)
    live, _ = both("nonzero_mask", strided, None)
    assert torch.equal(live, strided == 1)


# --- all ------------------------------------------------------------------------------------------


@each_threads
@masked
@pytest.mark.parametrize("name", ["uniform", "few", "equal"])
@each_scores
def test_threads_change_nothing(dtype: torch.dtype, name: str, masked: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    scores, mask = HOSTILE[name](MANY, dtype), mask_of(MANY, masked)
    key = int(scores.view(INTEGER[dtype])[MANY // 2])
    both("count_keys", scores, mask, key, key + 2**20, True)
    both("count_keys", scores, mask, 0, LARGEST[dtype], True)
    both("key_histogram", scores, mask, key, key + 2**20, 6, 1 << 15)
    both("squares_above", scores, mask, key, 1)
    for ties in (0, 3, MANY // 3, MANY):
        both("threshold_mask", scores, mask, key, ties)
    got, plain = torch.empty(MANY, dtype=dtype), torch.empty(MANY, dtype=dtype)
    schema.random_scores_(got, 1, 2, 3)
    reference.random_scores_(plain, 1, 2, 3)
    assert torch.equal(got, plain)
    weight = torch.randn(MANY, dtype=dtype)
    expected = torch.where(got > 0.5, weight, torch.zeros((), dtype=dtype))
    schema.masked_zero_(weight, got > 0.5)
    assert torch.equal(weight, expected)
    live, count = both("nonzero_mask", weight, mask)
    assert int(count) == sum(live.tolist())


SCORE = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0**-149, math.inf]),
    st.floats(0, 1, width=32),
    st.floats(min_value=0, width=32, allow_nan=False),
)


@given(st.lists(SCORE, max_size=200), st.data())
def test_any_cut_into_chunks_gives_the_same(values: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    cut = data.draw(st.integers(0, len(values)))
    keys = keys_of(scores, None)
    edge = st.sampled_from([-1, 0, *keys, LARGEST[torch.float32]])
    low, high = sorted([data.draw(edge), data.draw(edge)])
    ties = data.draw(st.integers(0, len(values)))
    counts, found = both("count_keys", scores, None, low, high, True)
    kept, taken = both("threshold_mask", scores, None, low, ties)
    halves = scores[:cut], scores[cut:]
    parts = [both("count_keys", part, None, low, high, True) for part in halves]
    assert torch.equal(counts, parts[0][0] + parts[1][0])
    assert torch.equal(found, torch.cat([parts[0][1], parts[1][1]]))
    first, left = both("threshold_mask", halves[0], None, low, ties)
    second, rest = both("threshold_mask", halves[1], None, low, ties - int(left))
    assert torch.equal(kept, torch.cat([first, second])) and int(taken) == int(left) + int(rest)
    assert int(kept.sum()) == sum(key > low for key in keys) + int(taken)


@each_scores
def test_arguments_that_are_refused(dtype: torch.dtype) -> None:
    """The kernels name the same mistake in the same words."""
    scores, top = torch.rand(5, dtype=dtype), LARGEST[dtype]
    wrong: list[tuple[Any, ...]] = [
        ("count_keys", -2, 5, True),
        ("count_keys", 5, 4, True),
        ("key_histogram", -2, 5, 0, 8),
        ("key_histogram", 0, 8, 0, 8),
        ("key_histogram", 0, 8, -1, 9),
        ("key_histogram", 0, top, torch.iinfo(INTEGER[dtype]).bits, 1),
        ("key_histogram", 0, 0, 0, 0),
        ("key_histogram", 0, 0, 0, (1 << 15) + 1),
        ("squares_above", -2, 0),
        ("squares_above", 0, 1025),
        ("squares_above", 0, -1074),
        ("threshold_mask", -2, 0),
    ]
    if dtype == torch.float32:
        wrong += [("count_keys", 0, top + 1, False), ("threshold_mask", top + 1, 0)]
    for op, *args in wrong:
        said = []
        for kernels in (schema, reference):
            with pytest.raises(LapValueError) as raised:
                schema.call(getattr(kernels, op), scores, None, *args)
            said.append((raised.value.expected, raised.value.got))
        assert said[0] == said[1] and said[0][0] and said[0][1]


def test_masks_of_another_size() -> None:
    for op, *args in (("count_keys", 0, 1, False), ("threshold_mask", 0, 0)):
        with pytest.raises((LapValueError, RuntimeError)):
            schema.call(getattr(schema, op), torch.rand(5), torch.ones(4, dtype=torch.bool), *args)
    with pytest.raises((LapValueError, RuntimeError)):
        schema.call(schema.masked_zero_, torch.rand(5), torch.ones(4, dtype=torch.bool))
    with pytest.raises((LapValueError, RuntimeError)):
        schema.call(schema.nonzero_mask, torch.rand(5), torch.ones(4, dtype=torch.bool))
