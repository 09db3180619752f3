# SPDX-License-Identifier: MIT
"""Units across layers of checkpoint directories: bit for bit what pruning in memory gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lap_ext
from lap_ext import checkpoint
from lap_ext.allocation import params
from tests.helpers.checkpoints import check_same, least_memory, saved

WAYS: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
    "llama heads": ("hf_llama_sdpa", "head", 0.5, {}),
    "llama channels in rounds": ("hf_llama_sdpa", "channel", 0.4, {"rounds": 2, "scope": "global"}),
    "llama units to a target": ("hf_llama_sdpa", "unit", params(0.9), {"scope": "global"}),
    "llama units, exact": ("hf_llama_sdpa", "unit", 0.5, {"aggregate": "exact"}),
    "mixtral experts": ("hf_mixtral_batched_mm", "expert", 0.5, {"uniform": True}),
    "mixtral units": ("hf_mixtral_batched_mm", "unit", 0.5, {"cost": "weights", "rounds": 2}),
    "gpt2 heads, flops": ("hf_gpt2_sdpa", "head", 0.5, {"cost": "flops"}),
    "gpt2 units, mean": ("hf_gpt2_sdpa", "unit", 0.6, {"aggregate": "mean", "scope": "global"}),
    "t5 heads": ("hf_t5_gated", "head", 0.5, {"scope": "global", "rounds": 2}),
    "t5 units": ("hf_t5_gated", "unit", 0.5, {"criterion": "magnitude"}),
}


@pytest.mark.parametrize("memory", ["least", "4GB"])
@pytest.mark.parametrize("way", WAYS)
def test_a_directory_is_pruned_as_its_model(way: str, memory: str, tmp_path: Path) -> None:
    """With the smallest budget, layers pass by in chunks of a row or two."""
    name, structure, sparsity, options = WAYS[way]
    model, inputs = saved(name, tmp_path / "dense")
    options = {"structure": structure} | options
    if memory == "least":
        memory = str(least_memory(lambda few: _prune(tmp_path, sparsity, few, **options)))
        memory = f"{int(memory) * (8 if options.get('aggregate') == 'exact' else 1)}B"
    got = _prune(tmp_path, sparsity, memory, **options)
    want = lap_ext.prune(model, inputs, sparsity, **options)
    check_same(tmp_path / "out", got, model, want)
    assert list(got.families) == list(want.families)
    assert list(got.fixed) == list(want.fixed)
    assert str(got) == str(want)
    assert 0 < want.sparsity < 1
    verdict = checkpoint.verify(tmp_path / "out", tmp_path / "dense")
    assert verdict.ok, verdict


def _prune(path: Path, sparsity: Any, memory: int | str, **options: Any) -> Any:
    return checkpoint.prune(path / "dense", path / "out", sparsity, memory=memory, **options)
