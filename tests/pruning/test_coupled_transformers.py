# SPDX-License-Identifier: MIT
"""Heads, experts and feed-forward units of transformers' own classes.

The output must be that of the network without the units: what makes them may hold any values, as
nobody reads it, and what reads them may, as it is zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import lap_ext
from tests.helpers import unit_oracle
from tests.zoo import ENTRIES, hf

pytest.importorskip("transformers", minversion="5")

QWEN2_MOE = hf.LLAMA | {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "shared_expert_intermediate_size": 7,
}
OWN = [hf.hf("hf_qwen2_moe", "Qwen2MoeForCausalLM", hf.text, QWEN2_MOE, **hf.BATCHED)]
MAKERS = {x.name: x for x in [*ENTRIES, *OWN]}
DENSE = (
    *("hf_llama_sdpa", "hf_qwen3", "hf_mistral", "hf_gemma", "hf_gpt2_sdpa"),
    *("hf_bert_sdpa", "hf_t5_gated"),
)
EXPERTS = ("hf_mixtral_batched_mm", "hf_qwen3_moe", "hf_qwen2_moe")
CASES = [(name, kind) for name in DENSE for kind in ("head", "unit")]
CASES += [(name, kind) for name in EXPERTS for kind in ("head", "unit", "expert")]


@cache
def traced(name: str) -> tuple[lap_ext.Topology, Any, Any]:
    """The topology of an entry, and its inputs."""
    model, args, kwargs = MAKERS[name].make()
    return lap_ext.trace(model, args or kwargs), args, kwargs


def output(model: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor that a model puts out: its logits or hidden states."""
    with torch.no_grad():
        result = model(*args, **kwargs)
    return result[0] if isinstance(result, tuple) else next(iter(result.values()))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_pruned_models_compute_what_is_left(name: str, kind: str) -> None:
    known, args, kwargs = traced(name)
    model = copy.deepcopy(known.model).double()
    topology = known.bind(model)
    before = output(model, args, kwargs)
    sparsity = {"head": 0.5, "unit": 0.25, "expert": 0.34}[kind]
    result = lap_ext.prune(model, None, sparsity, topology=topology, structure=kind)
    groups = topology.groups(kind)
    assert result.families
    for row, family in zip(result.families, groups.families, strict=True):
        keep = int((1 - sparsity) * family.size + 0.5)
        assert (row.kept, row.total) == (
            keep * row.total // family.size,
            family.groups.numel(),
        )
    after = output(model, args, kwargs)
    assert bool(after.isfinite().all())
    assert float((after - before).abs().max()) > 1e-9
    removed = [x for x in groups if not _left(model, x)]
    assert len(removed) == sum(x.total - x.kept for x in result.families)
    made, read = set[unit_oracle.Weight](), set[unit_oracle.Weight]()
    for group in removed:
        members = group.members
        if kind == "expert":  # the row of the router is read by all, the last layer goes last
            members = tuple(x for x in members if x.parameter.endswith("gate_up_proj"))
        own = unit_oracle.sides(members, model, unit_oracle.flipped(topology))
        made |= own[0]
        read |= own[1]
    for side in (made, read) if kind != "expert" else (made,):
        changed = copy.deepcopy(model)
        unit_oracle.put_random(changed, side)
        assert side
        torch.testing.assert_close(output(changed, args, kwargs), after, rtol=0, atol=1e-9)


def _left(model: Any, group: Any) -> bool:
    """Whether a group has a weight or bias that is not zero."""
    return any(
        bool(model.get_parameter(name).flatten()[index])
        for name, index in unit_oracle.weights_of(group, model)
    )


def test_heads_of_llama_go_with_their_queries() -> None:
    topology, *_ = traced("hf_llama_sdpa")  # 4 heads of 4 channels, 2 of keys and values
    result = lap_ext.prune(
        topology.model, None, 0.5, topology=topology, structure="head", apply=False
    )
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.self_attn"
        rows = {x: result.masks[f"{prefix}.{x}_proj"].all(1) for x in "qkv"}
        cols = result.masks[f"{prefix}.o_proj"].all(0)
        kept = rows["k"].view(2, 4)
        assert kept.sum(1).sort().values.tolist() == [0, 4]
        assert torch.equal(rows["k"], rows["v"])
        assert torch.equal(rows["q"].view(2, 8), kept.repeat(1, 2))
        assert torch.equal(cols, rows["q"])


def test_shared_experts_are_left_alone() -> None:
    topology, *_ = traced("hf_qwen2_moe")
    result = lap_ext.prune(
        topology.model, None, 0.34, topology=topology, structure="expert", apply=False
    )
    assert not [name for name in result.masks if "shared" in name]
    router = result.masks["model.layers.0.mlp.gate"]
    packed = result.masks["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(router.all(1), packed.flatten(1).all(1))
    assert int(router.all(1).sum()) == 2


def test_one_head_of_keys_for_all_is_named() -> None:
    topology, *_ = traced("hf_falcon")
    with pytest.raises(lap_ext.errors.LapValueError, match="all heads share one head of keys"):
        lap_ext.prune(topology.model, None, 0.5, topology=topology, structure="head")


def test_serving_engines_get_layers_of_one_size() -> None:
    topology, *_ = traced("hf_llama_sdpa")
    how: Any = {"topology": topology, "scope": "global", "uniform": True, "apply": False}
    for kind, multiple_of in (("head", 1), ("unit", 4)):
        own = {"structure": kind, "multiple_of": multiple_of}
        result = lap_ext.prune(topology.model, None, 0.4, **how, **own)
        assert len({x.kept for x in result.families}) == 1
