# SPDX-License-Identifier: MIT
"""normalize="lamp" of a checkpoint: the result in memory, however few candidates are held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import plan
from lap_ext.places.place import row_length
from lap_ext.pruning import shares
from lap_ext.pruning.scoring import Scorer
from tests.helpers.checkpoints import INPUTS, check_same, network, prune, saved, write

LAMP: dict[str, Any] = {"scope": "global", "normalize": "lamp"}


def narrow(patch: pytest.MonkeyPatch, capacity: int) -> None:
    """Limits the candidates, and chunks to a row; no layer fits."""
    real = plan.limits

    def limits(*given: Any) -> Any:
        result = real(*given)
        rows = {name: row_length(given[1].layers[name]) for name in result.chunk}
        return replace(result, candidates=capacity, chunk=rows, rest=0)

    patch.setattr(plan, "limits", limits)


def same(source: Path, out: Path, net: nn.Module, sparsity: float, **options: Any) -> None:
    """Checks that the checkpoint's masks are those of the model in memory."""
    inputs = INPUTS.to(next(net.parameters()).dtype)
    mine = {"model": net, "example_inputs": inputs} | LAMP | options
    got = prune(source, out, sparsity, **mine)
    want = lap_ext.prune(net, inputs, sparsity, apply=False, **LAMP, **options)
    assert list(got.layers) == list(want.layers)
    assert got.masks == want.masks


@pytest.mark.parametrize("capacity", [1, 40, 10**6])
def test_few_candidates(capacity: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    narrow(monkeypatch, capacity)
    source = write(tmp_path / "dense", net.state_dict())
    for sparsity in (0.3, 0.9):
        same(source, tmp_path / f"{sparsity}", net, sparsity)


def test_a_model_takes_three_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for the shares, one for the thresholds, if the candidates fit."""
    net, read = network(), []
    narrow(monkeypatch, 11_000)  # each layer by itself, not all of them
    monkeypatch.setattr(shares, "_LEAST_BINS", 1 << 15)
    real = Scorer.of

    def counted(self: Any, chunk: Any) -> Any:
        read.append(chunk.weight.numel())
        return real(self, chunk)

    source = write(tmp_path / "dense", net.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "of", counted)
        prune(source, tmp_path / "out", 0.5, **LAMP)
    total = sum(x.numel() for x in net.parameters() if x.dim() == 2)
    assert sum(read) <= 4 * total  # the last one writes the masks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(dtype)
    narrow(monkeypatch, 50)
    source = write(tmp_path / "dense", net.state_dict())
    same(source, tmp_path / "lookahead", net, 0.6)
    same(source, tmp_path / "magnitude", net, 0.6, criterion="magnitude")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_and_zeros(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three values: more scores are equal than can be held; zeros are kept too."""
    net = network(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randint(0, 3, parameter.shape))
        net[5].weight.zero_()
    narrow(monkeypatch, 50)
    source = write(tmp_path / "dense", net.state_dict())
    for sparsity in (0.1, 0.5, 0.9995):
        same(source, tmp_path / f"{sparsity}", net, sparsity, criterion="magnitude")


def test_experts_and_tied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer in slices of several tensors; a weight with two roles."""
    for name in ("hf_qwen3_moe", "hf_qwen2"):
        model, inputs = saved(name, tmp_path / name)
        with monkeypatch.context() as patch:
            narrow(patch, 50)
            got = checkpoint.prune(tmp_path / name, tmp_path / f"{name} out", 0.7, **LAMP)
        if name == "hf_qwen3_moe":
            model.set_experts_implementation("batched_mm")  # as the zoo has it
        want = lap_ext.prune(model, inputs, 0.7, **LAMP)
        check_same(tmp_path / f"{name} out", got, model, want)


def test_scores_that_leave_the_range(tmp_path: Path) -> None:
    """Infinite scores have no norm and no LAMP scores."""
    net = network()
    with torch.no_grad():
        net[3].weight.mul_(1e20)
        net[5].weight.mul_(1e30)
    source = write(tmp_path / "dense", net.state_dict())
    for normalize in ("norm", "lamp"):
        with pytest.raises(ValueError, match=r"^checkpoint.prune, layer '3': expected .*finite"):
            prune(source, tmp_path / "out", 0.5, scope="global", normalize=normalize, model=net)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_squares_that_underflow(tmp_path: Path) -> None:
    """Scores of one LAMP score are ranked by themselves, as in memory."""
    least = 2.0**-537  # its square is the least float64
    counts = torch.tensor([3.0, 4.0, 5.0] * 12, dtype=torch.float64)
    weight = counts.sqrt() * least
    weight[-2:] = 1.0
    net = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    net[0].weight.data = weight.view(6, 6)
    source = write(tmp_path / "dense", net.state_dict(), shards=1)
    same(source, tmp_path / "two", net, 34 / 36, criterion="magnitude")
    same(source, tmp_path / "out", net, 0.5, criterion="magnitude")
