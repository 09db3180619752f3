# SPDX-License-Identifier: MIT
"""Criteria of the user's own on directories: what decides a resumed run, dtypes, full layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lap_ext
from lap_ext import checkpoint, criteria
from lap_ext.checkpoint.identity import criterion_of
from tests.helpers.checkpoints import INPUTS, network, prune, write
from tests.helpers.interrupted import SHARDS, interrupt


class Power(criteria.Criterion):
    """Weights to a power that an attribute gives."""

    def __init__(self, power: Any) -> None:
        self.__dict__["power"] = power

    def weight(self, network: Any, chunk: Any) -> Tensor:
        return chunk.weight.abs() ** self.power


class Callable2:
    """A function with an attribute."""

    def __init__(self, power: int) -> None:
        self.power = power

    def __call__(self, layer: Any) -> Tensor:
        return layer.weight.abs() ** self.power


def power_of(layer: Any, power: int = 2, *, plus: float = 0.0) -> Tensor:
    return layer.weight.abs() ** power + plus


def closed(power: int) -> Callable[[Any], Tensor]:
    return lambda layer: layer.weight.abs() ** power


PAIRS: dict[str, tuple[Any, Any]] = {
    "code": (lambda layer: layer.weight**2, lambda layer: layer.weight**4),
    "partial": (partial(power_of, power=2), partial(power_of, power=3)),
    "closure": (closed(2), closed(3)),
    "object": (Callable2(2), Callable2(3)),
    "attribute": (Power(2), Power(3)),
    "tuple": (Power((1, 2)), Power((1, 3))),
    "tensor": (Power(torch.ones(2)), Power(torch.zeros(2))),
    "seed": (criteria.Random(1), criteria.Random(2)),
    "kind": (criteria.Lookahead(), criteria.Lookback()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_decides_a_score_decides_a_resumed_run(name: str) -> None:
    first, second = (criterion_of(criteria.of(x)) for x in PAIRS[name])
    assert first != second
    assert first == criterion_of(criteria.of(PAIRS[name][0]))


def test_a_default_argument_decides() -> None:
    def of(power: int) -> list[str]:
        def score(layer: Any, p: int = power) -> Tensor:
            return layer.weight.abs() ** p

        return criterion_of(criteria.of(score))

    assert of(2) != of(3)
    assert of(2) == of(2)


def test_an_interrupted_run_of_another_function_starts_anew(tmp_path: Path) -> None:
    source = write(tmp_path / "dense", network().state_dict(), SHARDS)
    interrupt(source, "write", 3, criterion=closed(2))
    with pytest.warns(UserWarning, match="starts anew"):
        prune(source, tmp_path / "out", criterion=PAIRS["code"][1])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_values_of_another_dtype(kind: torch.dtype, scope: Any, tmp_path: Path) -> None:
    """Scores have the dtype of the weights' scores, whatever a criterion computes in."""
    other = torch.float32 if kind == torch.float64 else torch.float64

    def square(layer: Any) -> Tensor:
        return layer.weight.to(other) ** 2

    source = write(tmp_path / "dense", network(kind).state_dict())
    options: dict[str, Any] = {"scope": scope, "criterion": square}
    held = lap_ext.prune(network(kind), INPUTS.to(kind), 0.6, apply=False, **options)
    prune(source, tmp_path / "out", model=network(kind), example_inputs=INPUTS.to(kind), **options)
    masks = lap_ext.Masks.load(tmp_path / "out" / "lap_ext_masks.safetensors")
    assert masks == held.masks
    given = {"model": network(kind), "example_inputs": INPUTS.to(kind)}
    checkpoint.scores(source, criterion=square, **given).save(tmp_path / "scores")
    stored = load_file(tmp_path / "scores")
    held_scores = lap_ext.scores(network(kind), INPUTS.to(kind), square)
    for name, scores in held_scores.items():
        assert scores.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
        assert torch.equal(stored[name], scores)


def test_rows_are_inputs(tmp_path: Path) -> None:
    """Wanda's masks of transposed weights, whose rows are inputs, through rounds and orders."""
    torch.manual_seed(1)
    net = nn.Sequential(Conv1D(40, 6), nn.ReLU(), Conv1D(5, 40))
    source = write(tmp_path / "dense", net.state_dict())
    save_file(criteria.measure(net, INPUTS, "wanda", [torch.rand(9, 6)]), tmp_path / "statistics")
    how: dict[str, Any] = {"criterion": "wanda", "data": tmp_path / "statistics"}
    for number, order in enumerate(({"rounds": 2}, {"order": "forward"})):
        out, options = tmp_path / f"out {number}", how | order
        held = lap_ext.prune(net, INPUTS, 0.6, apply=False, **options)
        checkpoint.prune(source, out, 0.6, model=net, example_inputs=INPUTS, **options)
        assert lap_ext.Masks.load(out / "lap_ext_masks.safetensors") == held.masks
        assert all(mask.is_contiguous() for mask in held.masks.values())


def test_statistics_that_change_meanwhile(tmp_path: Path) -> None:
    source = write(tmp_path / "dense", network().state_dict())
    path = tmp_path / "statistics"
    save_file(criteria.measure(network(), INPUTS, "wanda", [torch.rand(9, 6)]), path)

    def touch(_: checkpoint.Progress) -> None:
        path.write_bytes(path.read_bytes())

    with pytest.raises(ValueError, match="statistics"):
        prune(source, tmp_path / "out", criterion="wanda", data=path, on_progress=touch)
    assert not (tmp_path / "out").exists()


def test_data_that_a_criterion_of_ones_own_takes(tmp_path: Path) -> None:
    class Own(criteria.Criterion):
        def prepare(self, network: Any, data: Any) -> None:
            pass

    source = write(tmp_path / "dense", network().state_dict())
    with pytest.raises(TypeError, match=r"expected data to be the path of a file, got list"):
        prune(source, tmp_path / "out", criterion=Own(), data=[INPUTS])
