# SPDX-License-Identifier: MIT
"""The facts of a report: a checkpoint in chunks and its module in memory give the same ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint.reporting import checkpoint_facts
from lap_ext.pruning.reporting import model_facts
from lap_ext.report import Facts, facts
from tests.helpers.checkpoints import INPUTS, network, prune, write

GIVEN: dict[str, Any] = {"model": network(), "example_inputs": INPUTS}


def in_memory(sparsity: Any = 0.6, **more: Any) -> Facts:
    """The facts of network() pruned in memory, with its scores."""
    net = network()
    topology = lap_ext.trace(net, INPUTS)
    result = lap_ext.prune(net, None, sparsity, topology=topology, apply=False)
    return model_facts(
        topology, result, lap_ext.scores(net, topology=topology), title="net", **more
    )


@pytest.mark.parametrize("rows", [1 << 22, 300])
def test_a_checkpoint_and_its_module_have_the_same_facts(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(facts, "_CHUNK", rows)
    result = prune(dense, tmp_path / "out", count_scores=True)
    measured = checkpoint_facts(dense, result, options={"scope": "layer"}, **GIVEN)
    expected = in_memory(options={"scope": "layer"})
    assert len(measured.layers) == 3
    for mine, theirs in zip(measured.layers, expected.layers, strict=True):
        assert (mine.square_kept, mine.square_total) == (
            pytest.approx(theirs.square_kept, rel=1e-12),
            pytest.approx(theirs.square_total, rel=1e-12),
        )
        others = {"square_kept", "square_total"}
        assert {k: v for k, v in vars(mine).items() if k not in others} == {
            k: v for k, v in vars(theirs).items() if k not in others
        }
        assert mine.scores is not None and mine.threshold is not None
    assert (measured.criterion, measured.options, measured.version) == (
        expected.criterion,
        {"scope": "layer"},
        lap_ext.__version__,
    )
    assert (measured.title, expected.title) == (str(dense), "net")


def test_sizes(dense: Path, tmp_path: Path) -> None:
    result = prune(dense, tmp_path / "out", 0.75)
    measured = checkpoint_facts(dense, result, **GIVEN)
    size = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    assert measured.bytes_before == measured.bytes_after == size
    pruned = sum(row.total - row.kept for row in result.layers)
    bits = sum((row.total + 7) // 8 for row in result.layers)
    assert measured.bytes_sparse == size - 4 * pruned + bits
    memory = in_memory(0.75)
    assert (
        memory.bytes_before
        == memory.bytes_after
        == 4 * sum(x.numel() for x in network().parameters())
    )
    assert memory.bytes_sparse == memory.bytes_before - 4 * pruned + bits


def test_a_weight_that_is_stored_twice_saves_twice(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[2].weight = net[0].weight
    twice = {f"{name}.weight": net[0].weight.detach().clone() for name in "02"}
    source = write(tmp_path / "dense", twice)
    result = prune(source, tmp_path / "out", 0.5, model=net)
    measured = checkpoint_facts(source, result, model=net, example_inputs=INPUTS)
    assert measured.bytes_before is not None
    assert measured.bytes_sparse == measured.bytes_before - 2 * (18 * 4 - 5)


def test_masks_must_be_saved(dense: Path, tmp_path: Path) -> None:
    result = prune(dense, tmp_path / "out", save_masks=False)
    with pytest.raises(ValueError, match="expected a result with its masks saved, got none"):
        checkpoint_facts(dense, result, **GIVEN)


def test_progress_adds_up(dense: Path, tmp_path: Path) -> None:
    result = prune(dense, tmp_path / "out")
    for work in (
        lambda seen: checkpoint_facts(dense, result, on_progress=seen.append, **GIVEN),
        lambda seen: in_memory(on_progress=seen.append),
    ):
        seen: list[checkpoint.Progress] = []
        work(seen)
        assert [(x.step, x.name) for x in seen] == [("measure", name) for name in "035"]
        assert seen[-1].done == seen[-1].total == 4 * 12030


def test_the_module_is_left_alone() -> None:
    net, before = network(), network().state_dict()
    topology = lap_ext.trace(net, INPUTS)
    result = lap_ext.prune(net, None, 0.5, topology=topology, apply=False)
    model_facts(topology, result, {}, title="net")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- result.report --------------------------------------------------------------------------------


def test_a_result_in_memory_reports(tmp_path: Path) -> None:
    net = network()
    result = lap_ext.prune(net, INPUTS, 0.5, apply=False)
    result.report(tmp_path / "a.html", net, INPUTS)
    result.report(tmp_path / "b.html", lap_ext.trace(net, INPUTS))
    result.apply(net)
    result.report(tmp_path / "c.html", network(), INPUTS)
    pages = [(tmp_path / f"{name}.html").read_text() for name in "abc"]
    assert pages[0] == pages[1] == pages[2] and "Pruning of Sequential" in pages[0]
    for original, kind, said in (
        (net, ValueError, "original with the weights before the pruning, got a model whose pruned"),
        (network()[:1], ValueError, "original with a layer '3' of shape [70, 150], got none."),
        (tmp_path, TypeError, "original to be a torch.nn.Module or its topology, got PosixPath"),
    ):
        with pytest.raises(kind, match=rf"^PruneResult\.report: expected {re.escape(said)}"):
            result.report(tmp_path / "d.html", original, INPUTS)
    assert not (tmp_path / "d.html").exists()


def test_a_result_on_disk_reports(dense: Path, tmp_path: Path) -> None:
    result = prune(dense, tmp_path / "out", 0.5, count_scores=True)
    result.report(tmp_path / "page.html", dense, INPUTS, model=network())
    assert "lowest score kept" in (tmp_path / "page.html").read_text()
    with pytest.raises(TypeError, match=r"^CheckpointResult\.report: expected original to be a ch"):
        result.report(tmp_path / "page.html", network())
    bare = prune(dense, tmp_path / "bare", 0.5, save_masks=False)
    with pytest.raises(ValueError, match=r"^CheckpointResult\.report: .* with its masks saved"):
        bare.report(tmp_path / "page.html", dense, INPUTS, model=network())
