# SPDX-License-Identifier: MIT
"""Weights that are computed from parameters: what is scored, and where their masks are."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lap_ext
from tests.helpers import computed_weights as cases
from tests.helpers.computed_weights import ATTRIBUTES, FACTORS, FORWARDS, network, plain

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
ALL = {**FACTORS, **ATTRIBUTES, **FORWARDS}
PRUNABLE = {**FACTORS, **ATTRIBUTES}


@pytest.mark.parametrize("name", ALL)
def test_scores_are_those_of_the_effective_weight(name: str) -> None:
    kind = ALL[name]
    model = network(kind)
    expected = lap_ext.scores(plain(model, kind.effective(model[2])), X)
    model.train()
    state = {key: x.clone() for key, x in model.state_dict().items()}
    scores = lap_ext.scores(model, X)
    assert list(scores) == ["0", f"2{kind.name}", "4"]
    for ours, of_plain in zip(scores.values(), expected.values(), strict=True):
        torch.testing.assert_close(ours, of_plain)
    assert model[2].training and state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_weights_are_zero_in_the_forward(name: str) -> None:
    """The pruned model computes what it would with its effective weight times the mask."""
    kind = PRUNABLE[name]
    model = network(kind)
    before = kind.effective(model[2])
    result = lap_ext.prune(model, X, sparsity=0.6)
    mask = result.masks[f"2{kind.name}"]
    row = result.layers[1]
    assert row.kept == int(mask.sum()) == 12
    reference = plain(model, torch.where(mask, before, 0.0))
    assert torch.equal(model.eval()(X), reference(X))
    assert torch.equal(kind.effective(model[2]), reference[2].weight)
    assert row.pruned_by == ("mask" if name in ATTRIBUTES else "zeros")
    assert ("computed weights, multiplied by a mask: 2" in str(result)) == (name in ATTRIBUTES)
    assert '"pruned_by": "mask"' in result.to_json() or name in FACTORS
