# SPDX-License-Identifier: MIT
"""Normalized scores are ranked as their definition says, though they are never stored."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.pruning import normalization, shares

FEW = (1, 30, 1 << 20)  # keys that may be held


def by_definition(layers: list[Tensor], keep: int, how: str) -> list[int]:
    """Counts what each layer keeps of the highest normalized scores, by sorting all of them."""
    values = [normalization.normalized(x, how, None) for x in layers]
    counts = [0] * len(layers)
    ranked = [(-v, index) for index, x in enumerate(values) for v in x.flatten().tolist()]
    for _, index in sorted(ranked)[:keep]:
        counts[index] += 1
    return counts


def source(scores: Tensor, how: str, step: int) -> shares.Source:
    size = None
    if how == "norm":
        size = normalization.size_of(normalization.squares_of(scores))

    def read() -> Iterator[tuple[Tensor, None]]:
        yield from ((chunk, None) for chunk in scores.flatten().split(step))

    return shares.Source("x", read, scores.numel(), scores.dtype, size)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n).abs(),
    "far apart": lambda n: torch.randn(n).mul(8).exp(),
    "three values": lambda n: torch.randint(0, 3, (n,)).float(),
    "equal": lambda n: torch.full((n,), 0.3),
    "neighbors": lambda n: 1 + torch.randint(0, 40, (n,)) * 2.0**-23,
    "zero": torch.zeros,
    "tiny": lambda n: torch.randn(n).abs() * 1e-43,
    "one large": lambda n: torch.cat([torch.tensor([1e30]), torch.rand(n)[1:]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["lamp", "norm"])
def test_shares_are_those_of_the_definition(how: str, dtype: torch.dtype) -> None:
    """Whatever the scores, the chunks, and how many keys are held."""
    random.seed(1)
    for _ in range(30):
        kinds = random.choices(list(KINDS.values()), k=random.randint(1, 4))
        layers = [kind(random.choice([1, 2, 40, 300])).to(dtype) for kind in kinds]
        layers = [x * 10.0 ** random.randint(-4, 4) for x in layers]
        total = sum(x.numel() for x in layers)
        keep = random.choice([0, 1, total // 10, total // 2, total - 1, total, total + 1])
        step, few = random.choice([7, 1000]), random.choice(FEW)
        got = shares.shares(
            [source(x, how, step) for x in layers], keep, few, lambda counts: counts
        )
        assert got == by_definition(layers, keep, how)


def test_sums_are_exact() -> None:
    """LAMP scores of 100,000 weights against fractions; neither order nor chunks matter."""
    scores = torch.rand(30_000).square().unique()
    values, order = scores.sort(descending=True)
    found = normalization.lamp(scores)[order]
    above = Fraction(0)
    for index, s in enumerate(values.tolist()):
        above += Fraction(s) ** 2
        if index % 2999 == 0:
            assert math.isclose(float(found[index]), float(Fraction(s) ** 2 / above), rel_tol=1e-13)
    shuffled = torch.randperm(scores.numel())
    assert torch.equal(normalization.lamp(scores[shuffled]), normalization.lamp(scores)[shuffled])


def test_a_float64_layer_is_ranked_by_its_scores() -> None:
    """Squares that underflow to one LAMP score: normalizing changes no ranking inside a layer."""
    weight = torch.tensor([3.0, 4.0, 5.0] * 12, dtype=torch.float64).sqrt() * 2.0**-537
    weight[-2:] = 1.0
    net = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    net[0].weight.data = weight.view(6, 6)
    prune = partial(lap_ext.prune, net, torch.ones(1, 6).double(), 0.5, criterion="magnitude")
    want = prune(apply=False).masks
    assert prune(scope="global", normalize="lamp", apply=False).masks == want
