# SPDX-License-Identifier: MIT
"""Random scores: their formula in Python's integers, any part of them, and how random they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from lap_ext.criteria import Random
from lap_ext.places import Chunk
from tests.helpers.checkpoints import INPUTS, least_memory, network, prune, write
from tests.helpers.parameters import SCORE_DTYPE, each_dtype

WRAP = (1 << 64) - 1


def number(seed: int, layer: str, index: int) -> float:
    """The formula of the docstring."""
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    x = (int.from_bytes(digest[:8], "little") + index * 0x9E3779B97F4A7C15) & WRAP
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WRAP
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WRAP
    return ((x >> 40) + 1) / 2**24


def of(seed: int, name: str, weight: Tensor, first: int = 0) -> Tensor:
    """Scores weights of a layer, of which the first one has a flat index."""
    layer: Any = SimpleNamespace(name=name)
    network: Any = None  # is not looked at
    return Random(seed).weight(network, Chunk(layer, weight, first))


def numbers(seed: int, name: str, count: int, first: int = 0) -> Tensor:
    return of(seed, name, torch.zeros(count), first)


def test_the_formula(device: str) -> None:
    for seed, name in ((0, "fc"), (2**64 - 1, "model.layers.0.ä"), (7, "")):
        found = of(seed, name, torch.zeros(40_000, device=device)).cpu()
        for index in (0, 1, 2, 1000, 32_767, 32_768, 39_999):
            assert float(found[index]) == number(seed, name, index)
    assert float(numbers(3, "fc", 5, 2**40)[4]) == number(3, "fc", 2**40 + 4)


def test_any_part_has_the_same_numbers() -> None:
    every = numbers(1, "fc", 100_000)
    for first, count in ((0, 1), (99_999, 1), (12_345, 70_000), (5, 14_000)):
        assert torch.equal(numbers(1, "fc", count, first), every[first:][:count])


def test_in_the_shape_of_a_weight_that_is_not_contiguous() -> None:
    found = of(1, "fc", torch.zeros(50, 20).t())
    assert torch.equal(found, numbers(1, "fc", 1000).view(20, 50))


def test_they_are_uniform_and_unrelated() -> None:
    """Within five standard deviations; the tests of SplitMix64 itself are its authors'."""
    n = 200_000
    some = {key: numbers(*key, n).double() for key in ((0, "a"), (0, "b"), (1, "a"), (1, "b"))}
    for values in some.values():
        assert 0 < float(values.min()) < 1e-3 and 1 - 1e-3 < float(values.max()) <= 1
        assert abs(float(values.mean()) - 1 / 2) < 5 * (12 * n) ** -0.5
        assert abs(float(values.var()) - 1 / 12) < 5 * (180 * n) ** -0.5
        assert abs(float(torch.histc(values, 256, 0, 1).min()) - n / 256) < 5 * 28
        for distance in (1, 2, 32, 1024):
            assert abs(correlation(values[distance:], values[:-distance])) < 5 * n**-0.5
    lists = list(some.values())
    for place, values in enumerate(lists):
        for other in lists[:place]:
            assert abs(correlation(values, other)) < 5 * n**-0.5


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


@each_dtype
def test_exactly_k_in_memory_and_from_files(dtype: torch.dtype, tmp_path: Path) -> None:
    """Scores have the dtype of all scores, whatever torch's default is."""
    net, inputs = network(dtype), INPUTS.to(dtype)
    source = write(tmp_path / "dense", net.state_dict())
    mine: dict[str, Any] = {"model": net, "example_inputs": inputs, "criterion": Random(5)}
    few = least_memory(lambda few: prune(source, tmp_path / "out", memory=few, **mine))
    for scope in ("layer", "global"):
        want = lap_ext.prune(net, inputs, 0.7, criterion=Random(5), scope=scope, apply=False)
        total = sum(row.total for row in want.layers)
        assert sum(row.kept for row in want.layers) == -(-3 * total // 10)
        for memory in (few, "1GB"):
            out = tmp_path / f"{scope} {memory}"
            assert prune(source, out, 0.7, scope=scope, memory=memory, **mine).masks == want.masks
    torch.set_default_dtype(torch.float64)
    try:
        found = lap_ext.scores(net, inputs, criterion=Random(5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in found.values()} == {SCORE_DTYPE[dtype]}
    result = lap_ext.checkpoint.scores(source, **mine)
    assert all(torch.equal(values, found[layer.name]) for layer, values in result)


@pytest.mark.parametrize(
    ("seed", "error", "text"),
    [
        (True, TypeError, "^Random: expected seed to be an integer, got bool"),
        (1.0, TypeError, "^Random: expected seed to be an integer, got float"),
        ("1", TypeError, "^Random: expected seed to be an integer, got str"),
        (-1, ValueError, r"^Random: expected 0 <= seed < 2\*\*64, got a negative integer"),
        (1 << 64, ValueError, r"< 2\*\*64, got an integer of 65 bits"),
        (10**6000, ValueError, "got an integer of 19932 bits"),
    ],
    ids=["bool", "float", "str", "negative", "large", "huge"],
)
def test_seeds(seed: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Random(seed)
    assert Random(0).seed == 0 and Random((1 << 64) - 1) == Random((1 << 64) - 1)


def test_seeds_and_names_do_not_run_together() -> None:
    found = {tuple(numbers(seed, f"{n}", 6).tolist()) for seed in (0, 1, 11) for n in range(120)}
    assert len(found) == 360
