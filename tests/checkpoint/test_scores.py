# SPDX-License-Identifier: MIT
"""count_scores: scores of a checkpoint in bins, those of lap_ext.scores, without reading again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import reading
from lap_ext.report import Histogram
from tests.helpers.checkpoints import INPUTS, least_memory, network, prune, saved, write
from tests.helpers.interrupted import facts, interrupt

OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {},
    "global": {"scope": "global"},
    "norm": {"scope": "global", "normalize": "norm"},
    "lamp": {"scope": "global", "normalize": "lamp"},
    "random": {"criterion": "random"},
    "bf16": {"dtype": torch.bfloat16},
    "dict": {"sparsity": {"3": 0.9, "5": 0.0}},
}


def wanted(model: nn.Module, inputs: Any, masks: Any, **options: Any) -> dict[str, Histogram]:
    """Histograms of scores in memory."""
    if options.get("normalize") == "lamp":
        options["normalize"] = "none"
    options.pop("scope", None)
    scores = lap_ext.scores(model, inputs, **options)
    histograms = {name: Histogram() for name in masks}
    for name, histogram in histograms.items():
        histogram.add(scores[name], masks[name])
    return histograms


@pytest.mark.parametrize("memory", ["4GB", "least"])
@pytest.mark.parametrize("name", OPTIONS)
def test_counts_are_those_of_scores_in_memory(name: str, memory: str, tmp_path: Path) -> None:
    options = {"sparsity": 0.6} | OPTIONS[name]
    net = network(options.pop("dtype", torch.float32))
    inputs, source = INPUTS.to(net[0].weight.dtype), write(tmp_path / "dense", net.state_dict())
    mine = {"model": net, "example_inputs": inputs, "count_scores": True} | options
    if memory == "least":
        few = least_memory(lambda few: prune(source, tmp_path / "out", memory=few, **mine))
        memory = str(few)
    got = prune(source, tmp_path / "out", memory=memory, **mine)
    options.pop("sparsity")
    want = wanted(net, inputs, got.masks, **options)
    assert list(got.scores) == list(want) == [row.name for row in got.layers]
    for layer, counts in want.items():
        assert got.scores[layer] == counts, layer
    assert {row.name: row.kept for row in got.layers} == {
        name: counts.kept.total() + counts.zeros_kept for name, counts in got.scores.items()
    }


def test_a_tied_weight_is_counted_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[2].weight = net[0].weight
    twice = {"0.weight": net[0].weight.detach(), "2.weight": net[0].weight.detach().clone()}
    source = write(tmp_path / "dense", twice)
    got = prune(source, tmp_path / "out", model=net, count_scores=True)
    assert got.scores == wanted(net, INPUTS, got.masks)


def test_experts_in_many_tensors_and_shards(tmp_path: Path) -> None:
    model, inputs = saved("hf_qwen3_moe", tmp_path / "dense")
    got = checkpoint.prune(tmp_path / "dense", tmp_path / "out", 0.7, count_scores=True)
    model.set_experts_implementation("batched_mm")  # as the zoo has it: eager does not export
    scores = lap_ext.scores(model, inputs)
    for name, counts in got.scores.items():
        want = Histogram()
        want.add(scores[name], got.masks[name])
        assert counts == want, name


def test_nothing_is_read_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "dense", network().state_dict())
    reads: list[int] = []
    real = reading.Source.fill

    def fill(self: Any, entry: Any, offset: int, into: memoryview) -> None:
        reads[-1] += len(into)
        real(self, entry, offset, into)

    monkeypatch.setattr(reading.Source, "fill", fill)
    for counted in (False, True):
        reads.append(0)
        got = prune(source, tmp_path / str(counted), scope="global", count_scores=counted)
        assert bool(got.scores) == counted
    assert reads[0] == reads[1]


@pytest.mark.parametrize("count", range(1, 8))
def test_counts_of_a_run_that_was_stopped(count: int, tmp_path: Path) -> None:
    """Also where a finished shard is lost: no weight is counted twice."""
    source = write(tmp_path / "dense", network().state_dict(), 3)
    full = prune(source, tmp_path / "full", count_scores=True)
    work = interrupt(source, count=count, count_scores=True)
    lost = list(facts(work)["done"])[: count % 2]
    for name in lost:
        (work / "files" / name).unlink()
    with pytest.warns(UserWarning, match="are done again") if lost else nullcontext():
        again = prune(source, tmp_path / "out", count_scores=True)
    assert again.scores == full.scores
