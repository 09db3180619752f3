# SPDX-License-Identifier: MIT
"""Checkpoints of models that compute a weight: what is stored is not what they use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lap_ext
import lap_ext.checkpoint as store
from tests.helpers.checkpoints import write
from tests.helpers.computed_weights import ATTRIBUTES, FACTORS, FORWARDS, network

KINDS = {**FACTORS, **ATTRIBUTES, **FORWARDS}


@pytest.mark.parametrize("name", ["weight_norm", "old_spectral_norm", "gain", "standardized"])
def test_computed_weights_are_refused(name: str, tmp_path: Path) -> None:
    model, x = network(KINDS[name]), torch.randn(1, 6)
    source, options = write(tmp_path / "model", model.state_dict()), {"example_inputs": x}
    with pytest.raises(ValueError) as caught:
        store.prune(source, tmp_path / "out", sparsity=0.5, model=model, **options)
    assert str(caught.value) == (
        "checkpoint.prune, layer '2': expected weights that the model uses as they are stored, got "
        "one that it computes from what is stored. Load the model into memory and call "
        "lap_ext.prune."
    )
    assert not (tmp_path / "out").exists()
    lap_ext.prune(model, x, sparsity=0.5, exclude="2")  # the way out
