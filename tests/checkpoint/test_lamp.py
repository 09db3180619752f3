# SPDX-License-Identifier: MIT
"""normalize="lamp" of a checkpoint: the result in memory, however few scores are sorted at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import lamp, plan, ranking
from lap_ext.pruning import selection
from tests.helpers.checkpoints import INPUTS, check_same, network, prune, saved, write

LAMP: dict[str, Any] = {"scope": "global", "normalize": "lamp"}


def narrow(patch: pytest.MonkeyPatch, capacity: int, few: int, chunk: int | None = None) -> None:
    """Limits the scores to sort and the candidates; small layers get several chunks and marks."""
    real = plan.limits

    def limits(*given: Any) -> Any:
        result = real(*given)
        chunks = result.chunk if chunk is None else dict.fromkeys(result.chunk, chunk)
        none: frozenset[str] = frozenset()
        return replace(result, sorted=few, candidates=capacity, chunk=chunks, masked_full=none)

    patch.setattr(plan, "limits", limits)
    patch.setattr(ranking, "CHUNK", 64)
    patch.setattr(lamp, "_BETWEEN", 100)


def same(source: Path, out: Path, net: nn.Module, sparsity: float, **options: Any) -> None:
    """Checks that the checkpoint's masks are those of the model in memory."""
    inputs = INPUTS.to(next(net.parameters()).dtype)
    mine = {"model": net, "example_inputs": inputs} | LAMP | options
    got = prune(source, out, sparsity, **mine)
    want = lap_ext.prune(net, inputs, sparsity, apply=False, **LAMP, **options)
    assert list(got.layers) == list(want.layers)
    assert got.masks == want.masks


@pytest.mark.parametrize("few, capacity", [(1, 1), (100, 40), (900, 10**6), (10**6, 3)])
def test_few_scores_at_a_time(
    few: int, capacity: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: nn.Module = network()
    if few == 1:  # each score is a reading of its own
        net = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 5))
    narrow(monkeypatch, capacity, few)
    source = write(tmp_path / "dense", net.state_dict())
    for sparsity in (0.3, 0.9):
        same(source, tmp_path / f"{sparsity}", net, sparsity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(dtype)
    narrow(monkeypatch, 50, 500)
    source = write(tmp_path / "dense", net.state_dict())
    same(source, tmp_path / "lookahead", net, 0.6)
    same(source, tmp_path / "magnitude", net, 0.6, criterion="magnitude")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_and_zeros(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three values: more scores are equal than can be sorted; zeros are kept too."""
    net = network(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randint(0, 3, parameter.shape))
        net[5].weight.zero_()
    narrow(monkeypatch, 50, 500)
    source = write(tmp_path / "dense", net.state_dict())
    for sparsity in (0.1, 0.5, 0.9995):
        same(source, tmp_path / f"{sparsity}", net, sparsity, criterion="magnitude")


def test_a_sample_that_misleads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is far above or below the threshold: marks take the next walk there."""
    net = network()
    source = write(tmp_path / "dense", net.state_dict())
    for factor in (1e-6, 1e6, 0.0):
        with monkeypatch.context() as patch:
            narrow(patch, 50, 500)
            real = lamp._sampled
            patch.setattr(lamp, "_sampled", lambda *x, real=real, f=factor: real(*x) * f)
            same(source, tmp_path / f"{factor}", net, 0.5)


def test_marks_save_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk continues at its marks: what comes before is neither sorted nor counted again."""
    net = network()
    narrow(monkeypatch, 20, 10**6)
    counts: list[int] = []
    real = lamp._Walk._next

    def counted(self: Any, scores: Any, before: Any) -> Any:
        counts.append(scores.numel())
        return real(self, scores, before)

    monkeypatch.setattr(lamp._Walk, "_next", counted)
    source = write(tmp_path / "dense", net.state_dict())
    same(source, tmp_path / "out", net, 0.5)
    assert sum(counts) < 0.75 * sum(x.numel() for x in net.parameters() if x.dim() == 2)


def test_experts_and_tied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer in slices of several tensors; a weight with two roles."""
    for name in ("hf_qwen3_moe", "hf_qwen2"):
        model, inputs = saved(name, tmp_path / name)
        with monkeypatch.context() as patch:
            narrow(patch, 50, 300)
            got = checkpoint.prune(tmp_path / name, tmp_path / f"{name} out", 0.7, **LAMP)
        if name == "hf_qwen3_moe":
            model.set_experts_implementation("batched_mm")  # as the zoo has it
        want = lap_ext.prune(model, inputs, 0.7, **LAMP)
        check_same(tmp_path / f"{name} out", got, model, want)


def test_the_walk_has_the_bits_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All LAMP scores of a layer, sorted, computed both ways; marks change nothing."""
    net, walks = network(), []
    narrow(monkeypatch, 10**6, 700)
    real = lamp._Walk.__init__

    def kept(self: Any, *given: Any) -> None:
        real(self, *given)
        walks.append(self)

    monkeypatch.setattr(lamp._Walk, "__init__", kept)
    source = write(tmp_path / "dense", net.state_dict())
    prune(source, tmp_path / "out", 0.5, **LAMP)
    scores = lap_ext.scores(net, INPUTS)
    for walk, score in zip(walks, scores.values(), strict=True):
        want = selection.lamp(score).flatten().sort(descending=True).values
        for _ in range(2):  # the second time there are marks
            got = torch.cat(list(walk.keys(0, ranking.largest(torch.float64)))).view(torch.float64)
            assert torch.equal(got, want)
        middle = int(ranking.keys_of(want[len(want) // 2 :][:1]))
        got = torch.cat(list(walk.keys(middle, middle + 1000)))
        assert int((got > middle + 1000).sum()) == int(
            (ranking.keys_of(want) > middle + 1000).sum()
        )
        assert int((got == middle).sum()) == int((ranking.keys_of(want) == middle).sum())


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
    """Three to five times the least number there is, over 2, are all 2 of it (the nearest even)."""
    least = 2.0**-537  # its square is the least float64
    counts = torch.tensor([3.0, 4.0, 5.0] * 12, dtype=torch.float64)
    weight = counts.sqrt() * least
    weight[-2:] = 1.0
    net = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    net[0].weight.data = weight.view(6, 6)
    source = write(tmp_path / "dense", net.state_dict(), shards=1)
    same(source, tmp_path / "two", net, 34 / 36, criterion="magnitude")
    with pytest.raises(ValueError, match="layer '0': expected LAMP scores that differ"):
        same(source, tmp_path / "out", net, 0.5, criterion="magnitude")
