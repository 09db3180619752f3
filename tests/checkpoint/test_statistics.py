# SPDX-License-Identifier: MIT
"""Criteria of data on a checkpoint: a file of statistics gives the masks of batches in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lap_ext
from lap_ext import checkpoint
from lap_ext.criteria import Wanda
from tests.helpers.checkpoints import least_memory, prune, write

INPUTS = torch.zeros(2, 6)


def net() -> nn.Sequential:
    """A norm, a tied weight, and some weights that are zero."""
    torch.manual_seed(2)
    tied = nn.Linear(40, 40)
    layers = (nn.Linear(6, 40), nn.LayerNorm(40), nn.ReLU(), tied, nn.ReLU(), tied, nn.ReLU())
    result = nn.Sequential(*layers, nn.Linear(40, 9))
    with torch.no_grad():
        tied.weight[torch.rand(40, 40) < 0.2] = 0
    return result.eval()


def batches(criterion: str) -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    every = [torch.randn(7, 6, generator=generator) for _ in range(3)]
    if criterion == "weight_gradient":
        return [(x, torch.arange(7) % 9) for x in every]
    return every


CASES: dict[str, dict[str, Any]] = {
    "wanda": {"criterion": "wanda"},
    "wanda_all": {"criterion": Wanda(per_row=False)},
    "wanda_global": {"criterion": "wanda", "scope": "global"},
    "wanda_rounds": {"criterion": "wanda", "rounds": 2},
    "act": {"criterion": "lookahead_act"},
    "act_order": {"criterion": "lookahead_act", "order": "backward"},
    "act_norm": {"criterion": "lookahead_act", "scope": "global", "normalize": "norm"},
    "act_fold": {"criterion": "lookahead_act", "batch_norm": "fold"},
    "gradient": {"criterion": "weight_gradient"},
    "gradient_global": {"criterion": "weight_gradient", "scope": "global", "rounds": 2},
    "gradient_raw": {"criterion": "weight_gradient", "scope": "global", "normalize": "none"},
}


def measured(path: Path, criterion: Any) -> Path:
    """Writes the statistics of a criterion."""
    given = batches(criterion if isinstance(criterion, str) else criterion.name)
    save_file(lap_ext.criteria.measure(net(), INPUTS, criterion, given), path)
    return path


def dense(tmp_path: Path) -> Path:
    """The tied weight is stored twice."""
    return write(tmp_path / "dense", {n: x.clone() for n, x in net().state_dict().items()}, 3)


@pytest.mark.parametrize("memory", ["least", "4GB"])
@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_batches_in_memory(name: str, memory: int | str, tmp_path: Path) -> None:
    options, source = CASES[name], dense(tmp_path)
    criterion = options["criterion"]
    path = measured(tmp_path / "statistics", criterion)
    mine = options | {"data": path, "model": net(), "example_inputs": INPUTS}
    if memory == "least":
        memory = least_memory(lambda few: prune(source, tmp_path / "no", memory=few, **mine))
    got = prune(source, tmp_path / "out", memory=memory, **mine)
    given = batches(criterion if isinstance(criterion, str) else criterion.name)
    want = lap_ext.prune(net(), INPUTS, 0.6, data=given, apply=False, **options)
    assert got.masks == want.masks
    assert got.to_json() == want.to_json()


@pytest.mark.parametrize("name", ["wanda", "act", "gradient"])
def test_scores_are_those_of_batches_in_memory(name: str, tmp_path: Path) -> None:
    criterion, source = CASES[name]["criterion"], dense(tmp_path)
    path = measured(tmp_path / "statistics", criterion)
    given: dict[str, Any] = {"model": net(), "example_inputs": INPUTS, "criterion": criterion}
    few = least_memory(lambda few: checkpoint.scores(source, data=path, memory=few, **given))
    want = lap_ext.scores(net(), INPUTS, criterion, data=batches(criterion))
    for memory in (few, "1GB"):
        stream = checkpoint.scores(source, data=path, memory=memory, **given)
        got = {layer.name: scores for layer, scores in stream}
        assert list(got) == list(want)
        assert all(torch.equal(got[layer], scores) for layer, scores in want.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.pop("3.mean_square.1"), r"'3\.mean_square\.1' in data"),
        (lambda x: x.update({"0.mean_square": torch.ones(5)}), r"'0\.mean_square' of shape \[6\]"),
    ],
    ids=["missing", "shape"],
)
@pytest.mark.parametrize("memory", ["least", "4GB"])
def test_statistics_that_do_not_fit(
    change: Any, said: str, memory: int | str, tmp_path: Path
) -> None:
    """One error that names the statistic; nothing is left behind."""
    source, path = dense(tmp_path), measured(tmp_path / "statistics", "wanda")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    mine: dict[str, Any] = {"model": net(), "example_inputs": INPUTS}
    mine |= {"criterion": "wanda", "data": path}
    if memory == "least":
        memory = least_memory(lambda few: prune(source, tmp_path / "no", memory=few, **mine))
    with pytest.raises(ValueError, match=rf"^checkpoint\.prune.*: expected {said}"):
        prune(source, tmp_path / "out", memory=memory, **mine)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["dense", "statistics"]
