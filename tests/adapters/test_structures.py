# SPDX-License-Identifier: MIT
"""Structures in the adapters whose host has the notion; the oracle is lap_ext.prune of a copy."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune as torch_prune

import lap_ext
from lap_ext.adapters import torch_prune as adapter
from lap_ext.adapters.torch_ao import LookaheadSparsifier

EXAMPLE = torch.ones(1, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


def expected(model: nn.Module, *sparsity: float, **options: Any) -> lap_ext.Masks:
    return lap_ext.prune(copy.deepcopy(model), EXAMPLE, *sparsity, **options).masks


# --- torch.ao -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "zeros", "structure"),
    [
        ((1, 4), 2, "2:4"),
        ((1, 4), 3, "1:4"),
        ((2, 1), 1, "1:2/out"),
        ((4, 4), None, "4x4"),
        ((1, 4), 4, "1x4"),
        ((1, 1), None, None),
    ],
    ids=str,
)
def test_torch_ao(shape: tuple[int, int], zeros: int | None, structure: str | None) -> None:
    """The names mean what they mean in torch's own sparsifier, whose masks are of the same kind."""
    model, theirs = net(), net()
    pattern = structure is not None and ":" in structure
    level = 1.0 if pattern else 0.5
    want = expected(model, *([] if pattern else [0.5]), structure=structure)
    own = LookaheadSparsifier(EXAMPLE, level, sparse_block_shape=shape, zeros_per_block=zeros)
    own.prepare(model, None)
    assert own.masks.structure is None
    own.step()
    assert own.masks == want and own.masks.structure == want.structure == structure
    other = WeightNormSparsifier(level, shape, zeros)
    other.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    other.step()
    mine, torchs = (
        x[0]
        .parametrizations.weight[0]
        .mask.reshape(12 // shape[0], shape[0], -1, shape[1])
        .sum((1, 3))
        for x in (model, theirs)
    )
    assert set(mine.unique().tolist()) == set(torchs.unique().tolist())
    own.squash_mask()
    assert torch.equal(model[0].weight != 0, want["0"])


def test_torch_ao_leaves_tensors_of_level_0_and_refuses_what_is_no_pattern() -> None:
    model = net()
    sparsifier = LookaheadSparsifier(EXAMPLE, 1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight", "sparsity_level": 0.0}])
    sparsifier.step()
    assert sparsifier.masks.sparsity == 0.0
    sparsifier.groups[0]["sparsity_level"] = 0.5
    with pytest.raises(ValueError, match="expected a sparsity_level of 0 or 1 with zeros_per_bloc"):
        sparsifier.step()
    assert sparsifier.masks.sparsity == 0.0
    for shape, zeros in (((2, 2), 1), ((1, 4), 0), ((1, 4), 5)):
        with pytest.raises(ValueError, match="expected zeros_per_block to be 4 in blocks of"):
            LookaheadSparsifier(EXAMPLE, sparse_block_shape=shape, zeros_per_block=zeros)
    one = LookaheadSparsifier(EXAMPLE, sparse_block_shape=(4, 4))
    with pytest.raises(ValueError, match="expected one structure for all tensors, got zeros_per"):
        one.prepare(net(), [{"tensor_fqn": "0.weight", "zeros_per_block": 2}])
    three = LookaheadSparsifier(EXAMPLE, 1.0, sparse_block_shape=(1, 3), zeros_per_block=1)
    with pytest.raises(ValueError, match="expected layers that 2:3 fits, got '0'"):
        three.prepare(net(), [{"tensor_fqn": "0.weight"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        three.prepare(net(), [{"tensor_fqn": "2.weight"}])


# --- torch.nn.utils.prune -------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["2:4", "row", "4x4"])
def test_torch_prune(structure: str) -> None:
    model = net()
    pattern = structure == "2:4"
    given = [] if pattern else [0.5]
    scope = {} if pattern else {"scope": "global"}
    want = expected(model, *given, structure=structure, **scope)
    masks = adapter.apply_global_(model, EXAMPLE, *given, structure=structure)
    assert masks == want and masks.structure == structure
    assert torch.equal(model[0].weight_mask != 0, want["0"]) and torch_prune.is_pruned(model)
    masks.remove(model)
    assert torch.equal(model[2].weight != 0, want["2"])


def test_torch_prune_of_channels() -> None:
    """Biases get torch's masks too; what torch has pruned of a bias stays pruned."""
    model = net()
    torch_prune.l1_unstructured(model[2], "bias", 2)
    before = model[2].bias_mask.clone()
    for sparsity, kept in ((0.25, 9), (0.5, 6)):
        masks = adapter.apply_global_(model, EXAMPLE, sparsity, structure="channel")
        assert set(masks) == {"0", "2", "0.bias"} and masks.structure == "channel"
        assert int(masks["0.bias"].sum()) == kept
        assert torch.equal(model[0].bias_mask != 0, masks["0.bias"])
        assert torch.equal(model[0].weight_mask.any(1), masks["0.bias"])
    assert torch.equal(model[2].bias_mask, before)
    masks.remove(model)
    assert torch.equal(model[0].bias != 0, masks["0.bias"])


# --- the others -----------------------------------------------------------------------------------


def test_nncf() -> None:
    nncf = pytest.importorskip("nncf", reason="the adapter's framework")
    from lap_ext.adapters import nncf as adapter

    class Held(nn.Module):  # nncf cannot trace an nn.Sequential
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    model, mode = Held(), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    want = expected(model, structure="2:4")
    made = nncf.prune(model, mode, ratio=0.0, examples_inputs=EXAMPLE)
    result = adapter.prune_(made, EXAMPLE, structure="2:4")
    assert result.masks == want == adapter.masks(made) and result.structure == "2:4"


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "row", "aggregate": "mean", "multiple_of": 3, "strict": True},
        {"structure": "channel", "cost": "weights", "uniform": True},
    ],
    ids=["row", "channel"],
)
@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_callbacks_pass_the_structure_on(framework: str, options: dict[str, Any]) -> None:
    pytest.importorskip(framework, reason="the adapter's framework")
    made = importlib.import_module(f"lap_ext.adapters.{framework}").PruningCallback
    schedule, model = lap_ext.linear(0.5, start=0, end=2), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    callback = made(schedule=schedule, example_inputs=EXAMPLE, **options)
    callback._begin(model, [optimizer])
    pruner = lap_ext.Pruner(net(), EXAMPLE, schedule, **options)
    for _ in range(3):
        callback._pruner.step()
        pruner.step()
    callback._take()
    assert callback.masks == pruner.masks
    assert callback.masks.structure == options["structure"]
    callback._end()
    kept = made(pruner.masks)
    assert kept.masks.structure == options["structure"]
    kept._begin(model, [optimizer])
    assert pruner.masks.check(model) == {}
    kept._end()
    with pytest.raises(TypeError, match="got structure too"):
        made(pruner.masks, structure="row")


def test_lightning_checkpoints_hold_the_structure() -> None:
    pytest.importorskip("lightning", reason="the adapter's framework")
    from lap_ext.adapters import lightning

    masks = expected(net(), structure="2:4")
    state = lightning.PruningCallback(masks).state_dict()
    assert lightning._unpacked(state).structure == "2:4"
    assert lightning._unpacked({k: x for k, x in state.items() if k != "structure"}) == masks


@pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llmcompressor is not installed"
)
def test_llmcompressor_prunes_n_of_m() -> None:
    """As SparseGPT and Wanda there: N are pruned of every M, where lap_ext's N are kept."""
    kind = importlib.import_module("lap_ext.adapters.llmcompressor").LookaheadModifier
    model = net()
    for given in ({"sparsity": 0.25}, {}):
        modifier = kind(mask_structure="1:4", example_inputs=EXAMPLE, **given)
        modifier.on_initialize(SimpleNamespace(model=model))
        assert modifier._prune(modifier.sparsity).masks == expected(model, structure="3:4")
    for wrong, said in (({"sparsity": 0.5}, "0.25 or none"), ({"mask_structure": "4:4"}, "N < M")):
        modifier = kind(**{"mask_structure": "1:4", "example_inputs": EXAMPLE} | wrong)
        with pytest.raises(ValueError, match=said):
            modifier.on_initialize(SimpleNamespace(model=model))
    with pytest.raises(ValueError, match="expected sparsity, the fraction to remove, got none"):
        kind(example_inputs=EXAMPLE).on_initialize(SimpleNamespace(model=model))
