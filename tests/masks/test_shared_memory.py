# SPDX-License-Identifier: MIT
"""Two Parameters over one memory are one layer, as one Parameter in two modules is.

`head.weight.data = emb.weight.data` ties what no id tells: what is pruned in one is pruned in the
other, so counts are true only if both are one layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lap_ext
from lap_ext.masks import Masks


class Tied(nn.Module):
    """An embedding and a head over the same memory, with a layer between them."""

    def __init__(self, tie: Any = None) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        if tie is None:
            self.head.weight.data = self.emb.weight.data
        else:
            tie(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.emb(x)))


IDS = torch.arange(4).reshape(1, 4)
BOTH = {"layers": ["emb", "mid"]}


def by_parameter(model: Tied) -> None:
    model.head.weight = model.emb.weight


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_true(scope: Any) -> None:
    """As for the same tie by one Parameter: layers, masks and counts."""
    torch.manual_seed(0)
    model = Tied()
    torch.manual_seed(0)
    other = Tied(by_parameter)
    result = lap_ext.prune(model, IDS, sparsity=0.5, scope=scope, **BOTH)
    expected = lap_ext.prune(other, IDS, sparsity=0.5, scope=scope, **BOTH)
    assert result.masks == expected.masks and result.kept == 72
    assert result.kept == sum(int(x.weight.count_nonzero()) for x in (model.emb, model.mid))
    assert lap_ext.sparsity(model) == lap_ext.sparsity(other) == 0.5
    topology = lap_ext.trace(model, IDS)
    assert list(topology.layers) == ["emb", "mid"] and topology.others == []
    assert [role.kind for role in topology.layers["emb"].roles] == ["embedding", "linear"]


def test_masks_know_both_names() -> None:
    model = Tied()
    mask = torch.rand(10, 8) < 0.5
    Masks({"head": mask}).apply(model)
    assert torch.equal(model.emb.weight != 0, mask)
    with pytest.raises(ValueError, match=r"'head': the same parameter as 'emb' \(tied\)"):
        Masks({"emb": mask, "head": mask}).apply(model)


def test_keep_holds_in_both() -> None:
    """Each Parameter has its own gradient and moments, those from before the pruning too."""
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    train(model, optimizer)
    masks = Masks({"emb": torch.rand(10, 8) < 0.5})
    masks.keep(model, optimizer)
    for _ in range(3):
        train(model, optimizer)
        assert masks.check(model) == {}
        for weight in (model.emb.weight, model.head.weight):
            assert not weight.grad[~masks["emb"]].any()
            assert not optimizer.state[weight]["exp_avg"][~masks["emb"]].any()


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(IDS).square().mean().backward()
    optimizer.step()


def test_torch_prune_has_both() -> None:
    model = Tied()
    masks = Masks({"emb": torch.rand(10, 8) < 0.5})
    masks.to_torch_prune(model)
    assert torch.nn.utils.prune.is_pruned(model.head)
    model(IDS)
    assert torch.equal(model.head.weight != 0, masks["emb"])
    masks.remove(model)
    assert model.head.weight.data_ptr() == model.emb.weight.data_ptr()
    assert torch.equal(model.head.weight != 0, masks["emb"])


def rows(model: Tied) -> None:
    model.mid.weight.data = model.emb.weight.data[1:9]


def transposed(model: Tied) -> None:
    model.mid.weight.data = model.emb.weight.data[:8].t()


@pytest.mark.parametrize("tie", [rows, transposed], ids=lambda f: f.__name__)
def test_a_part_that_is_shared_is_an_error_that_says_so(tie: Any) -> None:
    model = Tied(tie)
    before = model.emb.weight.clone()
    with pytest.raises(ValueError, match=r"^prune: expected masks that fit") as caught:
        lap_ext.prune(model, IDS, sparsity=0.5, layers=["emb", "mid"])
    assert (
        "\n  'mid': it shares a part of its memory with 'emb', or all of it in another order, so "
        "that one mask would prune weights of the other. Leave one of the two out, or give it "
        "memory of its own: weight.data = weight.data.clone()." in str(caught.value)
    )
    assert torch.equal(model.emb.weight, before)
    lap_ext.prune(model, IDS, sparsity=0.5, layers="mid")
    model.mid.weight.data = model.mid.weight.data.clone()
    result = lap_ext.prune(model, IDS, sparsity=0.5, layers=["emb", "mid"])
    assert result.masks.check(model) == {}


def flat(model: Tied) -> None:
    """All weights side by side in one buffer, two of them as columns of one matrix."""
    buffer = torch.randn(8 * 18)
    matrix = buffer.reshape(8, 18)
    model.mid.weight.data = matrix[:, :8]
    model.head.weight.data = matrix[:, 8:].t()


def test_one_buffer_without_overlap_is_fine() -> None:
    model = Tied(flat)
    assert list(lap_ext.trace(model, IDS).layers) == ["emb", "mid", "head"]
    result = lap_ext.prune(model, IDS, sparsity=0.5, layers="*")
    assert result.masks.check(model) == {} and lap_ext.sparsity(model) == 0.5
