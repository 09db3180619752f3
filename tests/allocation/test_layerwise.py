# SPDX-License-Identifier: MIT
"""Layer-wise sparsity: cases worked by hand, exact totals, and the errors by their text."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lap_ext import allocation
from lap_ext.allocation import Allocation, compounded, er, erk, of, per_layer, uniform, uniform_plus
from lap_ext.ops import check

SOLVED = (er, erk, uniform_plus)
Shapes = dict[str, tuple[int, ...]]

MLP = {"0": (500, 784), "1": (500, 500), "2": (500, 500), "3": (500, 500), "4": (10, 500)}

dims = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 30)),
)
models = st.lists(dims, max_size=6).map(lambda layers: {f"l{i}": d for i, d in enumerate(layers)})
sparsities = st.one_of(
    st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    st.floats(0, 1),
    st.fractions(0, 1, max_denominator=1000),
)


def kept(allocated: Allocation, shapes: Shapes) -> dict[str, int]:
    """What it keeps, once it is known to be possible."""
    keeps = allocated.keeps(shapes)
    assert list(keeps) == list(shapes)
    for name, count in keeps.items():
        assert type(count) is int
        assert 0 <= count <= math.prod(shapes[name])
    return keeps


def total(sparsity: float | Fraction, shapes: Shapes) -> int:
    n = sum(math.prod(shape) for shape in shapes.values())
    return math.floor((1 - Fraction(sparsity)) * n + Fraction(1, 2))


@pytest.mark.parametrize("kind", [er, erk], ids=lambda kind: kind.__name__)
@given(shapes=models, sparsity=sparsities)
@example(shapes={"scalar": (), "a": (2, 2)}, sparsity=0.0)
def test_totals_are_exact(kind: type[er], shapes: Shapes, sparsity: float) -> None:
    assert sum(kept(kind(sparsity), shapes).values()) == total(sparsity, shapes)


@given(shapes=models, sparsity=sparsities)
def test_uniform_plus(shapes: Shapes, sparsity: float) -> None:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    first = next((name for name, shape in shapes.items() if len(shape) > 2), None)
    last = list(shapes)[-1] if shapes else None
    least = dict.fromkeys(shapes, 0)
    if last is not None:
        least[last] = -(-sizes[last] // 5)
    if first is not None:
        least[first] = sizes[first]
    if sum(least.values()) > total(sparsity, shapes):
        with pytest.raises(ValueError, match=r"uniform_plus: expected a sparsity that leaves"):
            uniform_plus(sparsity).keeps(shapes)
        return
    keeps = kept(uniform_plus(sparsity), shapes)
    assert sum(keeps.values()) == total(sparsity, shapes)
    assert all(keeps[name] >= least[name] for name in keeps)
    # the others share one density d: |keep - d * size| < 1, so their intervals for d meet
    rest = [(keeps[x], sizes[x]) for x in keeps if x not in (first, last) and sizes[x]]
    if rest:
        assert max(Fraction(k - 1, n) for k, n in rest) < min(Fraction(k + 1, n) for k, n in rest)


@given(shapes=models, sparsity=sparsities)
def test_uniform_rounds_each_layer(shapes: Shapes, sparsity: float) -> None:
    for name, count in kept(uniform(sparsity), shapes).items():
        assert count == check.keep_count(sparsity, None, math.prod(shapes[name]))


@pytest.mark.parametrize("kind", [er, erk, uniform], ids=lambda kind: kind.__name__)
@given(shapes=models, sparsity=sparsities)
def test_one_ranking_over_all_layers(kind: type[er], shapes: Shapes, sparsity: float) -> None:
    """A uniform sparsity means the same number for it, though its layers round by themselves."""
    assert allocation.total(kind(sparsity), shapes) == total(sparsity, shapes)


@pytest.mark.parametrize("kind", [er, erk, uniform], ids=lambda kind: kind.__name__)
@given(shapes=models, both=st.tuples(sparsities, sparsities))
def test_more_sparsity_keeps_no_more(
    kind: type[er], shapes: Shapes, both: tuple[float, float]
) -> None:
    """The shares fall with the sparsity; rounding to a total may move one weight."""
    less, more = (kept(kind(sparsity), shapes) for sparsity in (max(both), min(both)))
    slack = 0 if kind is uniform else 1
    assert all(less[name] <= more[name] + slack for name in shapes)


@pytest.mark.parametrize("kind", [er, erk], ids=lambda kind: kind.__name__)
@given(shapes=models, sparsity=sparsities)
def test_shares_follow_the_density(kind: type[er], shapes: Shapes, sparsity: float) -> None:
    """One scale fits all layers that are not dense: keep / weight, up to the rounding."""
    keeps = kept(kind(sparsity), shapes)
    low, high = Fraction(0), Fraction(10**9)
    for name, shape in shapes.items():
        size = math.prod(shape)
        if not size:
            continue
        window = math.prod(shape[2:])
        density = Fraction(sum(shape), size)  # times the size, per unit of the scale
        if kind is er:
            density = Fraction(sum(shape[:2]) * window, size)
        weight = density * size
        low = max(low, (keeps[name] - 1) / weight)
        if keeps[name] < size:
            high = min(high, (keeps[name] + 1) / weight)
    assert low < high


def test_er_and_erk_by_hand() -> None:
    # 16 * 9 + 8 * 4 = 176 weights, 44 to keep
    shapes = {"conv": (4, 4, 3, 3), "fc": (8, 4)}
    # er: (4 + 4) * 9 : 8 + 4 = 72 : 12 -> 44 * 72 / 84 = 37.7, 6.3
    assert er(0.75).keeps(shapes) == {"conv": 38, "fc": 6}
    # erk: 4 + 4 + 3 + 3 : 8 + 4 = 14 : 12 -> 23.7, 20.3
    assert erk(0.75).keeps(shapes) == {"conv": 24, "fc": 20}


def test_dense_layers_leave_the_rest_to_the_others() -> None:
    # 100 + 4 weights, 52 to keep: 20 : 4 would be 43.3, 8.7 of 4; so 4 are dense, 48 left
    assert erk(0.5).keeps({"wide": (10, 10), "thin": (2, 2)}) == {"wide": 48, "thin": 4}


def test_equal_remainders_go_to_the_earlier() -> None:
    shapes = dict.fromkeys("abcd", (1, 5))  # 20 weights, 10 to keep, 2.5 each
    assert list(erk(0.5).keeps(shapes).values()) == [3, 3, 2, 2]


def test_uniform_plus_by_hand() -> None:
    shapes = {"stem": (2, 3, 3, 3), "conv": (4, 2, 5, 5), "head": (10, 10)}  # 54 + 200 + 100
    # 35 % of 354 = 123.9 -> 124: 54 dense, 70 of 300 = 0.233 each: 46.7, 23.3
    assert uniform_plus(0.65).keeps(shapes) == {"stem": 54, "conv": 47, "head": 23}
    # 25 %: 88.5 -> 89 (the half goes up): 54 dense, the head's minimum 20, the rest 15
    assert uniform_plus(0.75).keeps(shapes) == {"stem": 54, "conv": 15, "head": 20}
    named = uniform_plus(0.65, first="head", last="stem")
    # 100 dense; 24 of 254 is below a fifth: stem 11 (10.8 rounded up), conv 13
    assert named.keeps(shapes) == {"stem": 11, "conv": 13, "head": 100}


def test_the_papers_ratios_on_its_net() -> None:
    """1,147,000 weights; 6.36 % are left after 4 rounds."""
    keeps = compounded([0.5, 0.5, 0.5, 0.5, 0.25], 4).keeps(MLP)
    # 392000 / 16, 250000 / 16 (x3), 5000 * 81 / 256 = 1582.03
    assert list(keeps.values()) == [24500, 15625, 15625, 15625, 1582]
    by_name = compounded({"4": 0.25, "*": 0.5}, 4)
    assert by_name.keeps(MLP) == keeps
    assert compounded({"4": 0.25}, 0).keeps(MLP) == {name: math.prod(x) for name, x in MLP.items()}


@given(times=st.integers(0, 30), ratio=st.floats(0, 1))
def test_compounded_is_exact(times: int, ratio: float) -> None:
    n = 1_000_003
    left = (1 - Fraction(ratio)) ** times * n
    assert compounded([ratio], times).keeps({"l": (n,)}) == {"l": math.floor(left + Fraction(1, 2))}


def test_patterns() -> None:
    shapes = {"a.conv1": (10, 10), "a.conv2": (10, 10), "b.conv1": (10, 10), "odd[0]": (10, 10)}
    patterns = per_layer({"a.conv2": 0.1, "a.*": 0.2, "*.conv1": 0.3, "odd[0]": 0.4})
    # b.conv1 only is left for the third; a name is a pattern for itself, brackets or not
    assert list(patterns.keeps(shapes).values()) == [80, 90, 70, 60]
    assert list(per_layer({"a*": 1.0}).keeps(shapes).values()) == [0, 0, 100, 100]
    assert per_layer({}).keeps({"x": (3,)}) == {"x": 3}


def test_of() -> None:
    half = uniform(0.5)
    assert of(half) is half
    assert of(Decimal("0.9")) == uniform(Decimal("0.9"))
    assert of(Fraction(9, 10)).keeps({"x": (5,)}) == {"x": 1}  # 0.5 + 1/2; the double 0.9 is more
    assert of(0.9).keeps({"x": (5,)}) == {"x": 0}
    assert of({"x": 1}) == per_layer({"x": 1})
    assert isinstance(half, Allocation)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: uniform(90), "uniform: expected 0 <= sparsity <= 1 (the fraction removed), got 90."
         " Did you mean 0.90?"),
        (lambda: erk(-0.1), "erk: expected 0 <= sparsity <= 1 (the fraction removed), got -0.1."),
        (lambda: er(math.nan), "er: expected 0 <= sparsity <= 1 (the fraction removed), got nan."),
        (lambda: of({"fc": 2.0}), "per_layer: expected 0 <= sparsity['fc'] <= 1"),
        (lambda: of({"fc3": 0.5}).keeps({"fc1": (2, 2), "conv": (1, 1)}),
         "per_layer: expected a pattern that names a layer, got 'fc3'. Did you mean 'fc1'?"),
        (lambda: per_layer({"layer*": 0.5}).keeps({"0": (2, 2), "2": (2, 2)}),
         "per_layer: expected a pattern that names a layer, got 'layer*'. The layers are 0, 2."),
        (lambda: per_layer({"x": 0.5}).keeps({}), "got 'x'. There are no layers."),
        (lambda: per_layer({"fc*": 0.5, "fc1": 0.9}).keeps({"fc1": (2, 2)}),
         "expected each pattern to be the first match of some layer, got 'fc1', whose layers all "
         "match 'fc*' before it. Put it first."),
        (lambda: uniform_plus(0.95).keeps({"stem": (2, 2, 2), "out": (10, 8)}),
         "uniform_plus: expected a sparsity that leaves 24 of 88 weights (the first convolution "
         "stays dense, the last layer keeps a fifth), got 0.95, which leaves 4."),
        (lambda: uniform_plus(0.5, last="fc2").keeps({"fc": (2, 2)}),
         "uniform_plus: expected last that names a layer, got 'fc2'. Did you mean 'fc'?"),
        (lambda: compounded([0.5], 2).keeps({"a": (2,), "b": (2,)}),
         "compounded: expected one ratio for each of the 2 layers (a, b), got 1."),
        (lambda: compounded([0.5], -1), "compounded: expected times to be a whole number >= 0"),
        (lambda: compounded([15], 1),
         "compounded: expected 0 <= ratio <= 1 (the fraction removed), got 15. Did you mean 0.15?"),
    ],
)  # fmt: skip
def test_errors(call: object, text: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


@pytest.mark.parametrize("given", [True, "0.9", None, [0.9], erk])
def test_other_types(given: object) -> None:
    name = "erk" if given is erk else type(given).__name__
    with pytest.raises(TypeError, match=rf"^expected sparsity to be .* got {name}\."):
        of(given)  # type: ignore[arg-type]


def test_repr_is_the_call() -> None:
    for made in (uniform(0.5), erk(0.9), uniform_plus(0.5, first="a"), compounded([0.5], 3)):
        assert eval(repr(made), vars(allocation)) == made
    assert repr(erk(0.9)) == "erk(sparsity=0.9)"
