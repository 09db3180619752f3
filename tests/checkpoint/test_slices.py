# SPDX-License-Identifier: MIT
"""Layers that are stored in many tensors (experts): every selection has the bits of that in memory.

A stored slice is smaller than its layer, so that no slice can be masked as a full layer is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.checkpoint import pruning
from lap_ext.criteria import Criterion, Wanda
from lap_ext.criteria.statistics.measured import name_of
from lap_ext.report import Histogram
from tests.helpers.checkpoints import least_memory, saved
from tests.helpers.interrupted import contents, stopping


class Distant(Criterion):
    """The distance to 0.01: it replaces weights, and has norms."""

    name = "distant"

    def weight(self, network: Any, chunk: Any) -> Tensor:
        return chunk.weight - 0.01

    def norms(self, network: Any, role: Any) -> Any:
        return network.norms(role)


def squares(layer: Any) -> Tensor:
    """A function of a full layer: not of each weight by itself."""
    return (layer.weight - layer.weight.mean()).square()


WAYS: dict[str, dict[str, Any]] = {
    "layer": {},
    "forward": {"order": "forward"},
    "backward": {"order": "backward", "rounds": 2},
    "rounds": {"rounds": 3},
    "lamp": {"scope": "global", "rounds": 2},
    "norm": {"scope": "global", "normalize": "norm"},
    "raw": {"scope": "global", "normalize": "none", "rounds": 2, "min_keep": 0.2},
    "magnitude": {"criterion": "magnitude"},
    "rows": {"criterion": "wanda"},
    "rows_global": {"criterion": "wanda", "scope": "global"},
    "not_rows": {"criterion": Wanda(per_row=False), "rounds": 2},
    "function": {"criterion": squares},
    "function_lamp": {"criterion": squares, "scope": "global", "rounds": 2},
    "class": {"criterion": Distant(), "order": "forward"},
}


@dataclass
class Experts:
    """A checkpoint, its model in memory, and statistics for wanda.

    Attributes:
        directory: of the checkpoint.
        statistics: the file.
        model, topology: in memory.
    """

    directory: Path
    statistics: Path
    model: nn.Module
    topology: lap_ext.Topology

    def given(self, name: str) -> dict[str, Any]:
        """The options of a way."""
        options = dict(WAYS[name])
        return options | ({"data": self.statistics} if "rows" in name else {})

    def wanted(self, name: str) -> Any:
        """The result in memory."""
        given = {"topology": self.topology, "apply": False} | self.given(name)
        return lap_ext.prune(self.model, None, 0.7, **given)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experts]:
    """Traced once."""
    folder = tmp_path_factory.mktemp("experts")
    model: Any
    model, inputs = saved("hf_qwen3_moe", folder / "dense")
    model.set_experts_implementation("batched_mm")  # as the zoo has it: eager does not export
    topology = lap_ext.trace(model, inputs)
    torch.manual_seed(5)
    named = {name_of(topology, x, "mean_square"): x.part.channels[0] for x in topology.roles}
    save_file(
        {name: torch.rand(count, dtype=torch.float64) for name, count in named.items()},
        folder / "statistics",
    )
    real, traced = pruning.structure_of, []

    def once(*args: Any) -> Any:
        traced.append(traced[0] if traced else real(*args))
        return traced[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "structure_of", once)
        yield Experts(folder / "dense", folder / "statistics", model, topology)


def prune(experts: Experts, out: Path, **options: Any) -> Any:
    return checkpoint.prune(experts.directory, out, 0.7, **options)


def test_there_are_such_layers(experts: Experts) -> None:
    stored = [load_file(path) for path in experts.directory.glob("*.safetensors")]
    names = {name for tensors in stored for name in tensors}
    layers = {layer for layer in experts.topology.layers if f"{layer}.weight" not in names}
    assert any("experts" in name for name in layers)


@pytest.mark.parametrize("memory", ["least", "4GB"])
@pytest.mark.parametrize("name", WAYS)
def test_masks_are_those_in_memory(
    name: str, memory: int | str, experts: Experts, tmp_path: Path
) -> None:
    options = experts.given(name)
    if memory == "least":
        memory = least_memory(lambda few: prune(experts, tmp_path / "no", memory=few, **options))
        if "function" in name:
            with pytest.raises(ValueError, match=r"room for a full layer, .* in memory, got"):
                prune(experts, tmp_path / "out", memory=memory, **options)
            assert not list(tmp_path.iterdir())
            return
    got = prune(experts, tmp_path / "out", memory=memory, count_scores=True, **options)
    want = experts.wanted(name)
    assert got.masks == want.masks
    assert list(got.layers) == list(want.layers)
    normalize = "norm" if name == "norm" else "none"
    given = {x: y for x, y in options.items() if x in ("criterion", "data")}
    topology = {"topology": experts.topology, "normalize": normalize}
    scores = lap_ext.scores(experts.model, **topology, **given)
    for layer, counts in got.scores.items():
        histogram = Histogram()
        histogram.add(scores[layer], got.masks[layer])
        assert counts == histogram, layer


@pytest.mark.parametrize("name", ["layer", "backward", "function_lamp", "rows"])
def test_a_stopped_run_goes_on(name: str, experts: Experts, tmp_path: Path) -> None:
    options = experts.given(name) | {"count_scores": True}
    full = prune(experts, tmp_path / "full", **options)
    for step, count in (("rank", 2), ("write", 9)):
        with pytest.raises(KeyboardInterrupt):
            stop = stopping(step, count, KeyboardInterrupt())
            prune(experts, tmp_path / "out", on_progress=stop, **options)
    again = prune(experts, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "full")
    assert again.scores == full.scores
    assert sorted(x.name for x in tmp_path.iterdir()) == ["full", "out"]
