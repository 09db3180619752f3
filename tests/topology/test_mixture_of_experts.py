# SPDX-License-Identifier: MIT
"""Mixtures of experts: only expert e's up and gate projections feed its down projection.

The experts of the next block read the results of all experts of this one: the tokens have met in
between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net, randomized
from tests.helpers.topologies import C, E, H, gated, pairs, traced
from tests.zoo.hf import IDS, LLAMA, hf, text


def own(hidden: int, experts: int = E, interleaved: bool = False) -> set[tuple[int, int]]:
    """(Input of down, output of gate and up), counted through all experts."""
    result = set()
    for e in range(experts):
        for h in range(hidden):
            halves = (2 * h, 2 * h + 1) if interleaved else (h, hidden + h)
            result |= {(e * hidden + h, e * 2 * hidden + half) for half in halves}
    return result


def every(width: int, readers: int, makers: int) -> set[tuple[int, int]]:
    """(Input c of each of some readers, output c of each of some makers)."""
    return {
        (r * width + c, m * width + c)
        for r in range(readers)
        for m in range(makers)
        for c in range(width)
    }


# ---- written here --------------------------------------------------------------------------------


def by_einsum(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    y = torch.einsum("teh,eoh->teo", gated(torch.einsum("tc,eoc->teo", x, m.up)), m.down)
    return torch.einsum("te,teo->to", F.one_hot(ids, E).to(x.dtype), y)


def by_bmm(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    y = torch.bmm(gated(torch.bmm(x.expand(E, *x.shape), m.up.mT)), m.down.mT)
    return (y * F.one_hot(ids, E).to(x.dtype).t().unsqueeze(-1)).sum(0)


def by_loop(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    y = [F.linear(gated(F.linear(x, m.up[e])), m.down[e]) for e in range(E)]
    return sum(part * (ids == e)[:, None] for e, part in enumerate(y))


def picked_for_each_token(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The tokens' own experts, as matrices times columns."""
    y = torch.bmm(m.up[ids], x.unsqueeze(-1)).squeeze(-1)
    return torch.bmm(m.down[ids], gated(y).unsqueeze(-1)).squeeze(-1)


WAYS: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
    by_einsum, by_bmm, by_loop, picked_for_each_token]  # fmt: skip


def block(way: Any) -> nn.Module:
    rule = lambda m, x, ids: m.b(way(m, m.a(x), ids))  # noqa: E731
    model = Net(rule, a=nn.Linear(2, C), b=nn.Linear(C, 2))
    model.up, model.down = (nn.Parameter(torch.randn(E, *s)) for s in ((2 * H, C), (C, H)))
    return randomized(model)


IDS_OF_TOKENS = torch.tensor([0, 2, 1, 1, 0, 2])
TOKENS = torch.randn(6, 2, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_scores_by_hand(way: Any) -> None:
    """However experts are run: their weights are e times three matrices of their own."""
    model = block(way)
    scores = lap_ext.scores(model, (TOKENS, IDS_OF_TOKENS))
    a, b, up, down = (w.detach() for w in (model.a.weight, model.b.weight, model.up, model.down))
    made, read = a.norm(dim=1), b.norm(dim=0)  # [C]
    through = down.norm(dim=1).repeat(1, 2)  # [E, 2 H]: the column that a gate and an up row feed
    into = (up.square().sum(2).reshape(E, 2, H).sum(1)).sqrt()  # [E, H]: gate and up rows
    expected = {
        "a": a.abs() * up.square().sum((0, 1)).sqrt()[:, None],
        "up": up.abs() * made * through[..., None],
        "down": down.abs() * into[:, None] * read[:, None],
        "b": b.abs() * down.square().sum((0, 2)).sqrt(),
    }
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


def test_pairs_of_dense_experts() -> None:
    topology = lap_ext.trace(block(by_bmm), (TOKENS, IDS_OF_TOKENS))
    assert topology.layers["up"].groups == topology.layers["down"].groups == E
    assert set(pairs(topology, "down", "up")) == own(H)
    assert set(pairs(topology, "up", "a")) == every(C, E, 1)
    assert set(pairs(topology, "b", "down")) == every(C, 1, E)


def test_experts_that_are_called_one_by_one() -> None:
    """A role for each of them: its rows of the weight, counted through the full parameter."""
    topology = lap_ext.trace(block(by_loop), (TOKENS, IDS_OF_TOKENS))
    assert [role.part.rows for role in topology.layers["up"].roles] == [(0, 10), (10, 20), (20, 30)]
    result = [(e.here.tolist(), e.there.tolist()) for e in topology.layers["down"].prev]
    halves = [sorted((h, 10 * e + h + half) for h in range(H) for half in (0, H)) for e in range(E)]
    assert [sorted(zip(*edge, strict=True)) for edge in result] == halves


def two_blocks(m: Any, x: Tensor, ids: Tensor, other: Tensor) -> Tensor:
    x = m.a(x)
    x = x + picked_for_each_token(m.one, x, ids)
    return m.b(x + picked_for_each_token(m.two, x, other))


@pytest.mark.parametrize("same", [True, False])
def test_experts_behind_experts(same: bool) -> None:
    """Tokens that are routed again bring any expert's results; to the same experts, their own."""
    model = Net(two_blocks, a=nn.Linear(2, C), b=nn.Linear(C, 2), one=nn.Module(), two=nn.Module())
    for part in (model.one, model.two):
        part.up, part.down = (nn.Parameter(torch.randn(E, *s)) for s in ((2 * H, C), (C, H)))
    rule = two_blocks if not same else (lambda m, x, ids, _: two_blocks(m, x, ids, ids))
    model.rule = rule
    inputs = (TOKENS.float(), IDS_OF_TOKENS, IDS_OF_TOKENS.flip(0))
    topology = lap_ext.trace(model, inputs)
    assert set(pairs(topology, "two.down", "two.up")) == own(H)
    own_alone = {(i, i) for i in range(E * C)}
    assert set(pairs(topology, "two.up", "one.down")) == (own_alone if same else every(C, E, E))
    assert set(pairs(topology, "b", "one.down")) == every(C, 1, E)


def test_biases_of_the_tokens_experts_are_no_embeddings() -> None:
    def way(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        return picked_for_each_token(m, x, ids) + m.down_bias[ids] + m.table[ids]

    model = block(way)
    model.down_bias = nn.Parameter(torch.randn(E, C).double())
    model.table = nn.Parameter(torch.randn(E, C).double())  # this one is
    topology = lap_ext.trace(model, (TOKENS, IDS_OF_TOKENS))
    assert topology.others == ["down_bias"] and topology.layers["table"].kind == "embedding"
    assert [edge.name for edge in topology.layers["b"].prev] == ["down", "table"]


ELSEWHERE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "aten.mean.dim": lambda m, x, ids: m.up[ids].mean(1) * x,
    "aten.mul.Tensor": lambda m, x, ids: (m.up[ids] * x[:, None]).sum(1),
    "aten.transpose.int": lambda m, x, ids: torch.bmm(x[:, None], m.up[ids].transpose(1, 2))[
        :, 0, :C
    ],
    "aten.index.Tensor": lambda m, x, ids: torch.bmm(x[:, None], m.up.mT[ids])[:, 0, :C],
}


@pytest.mark.parametrize("operation", list(ELSEWHERE))
def test_picked_weights_are_for_products(operation: str) -> None:
    """Anything else that is done to the weights of the tokens' experts is refused."""
    with pytest.raises(
        lap_ext.TopologyError, match=f"lap_ext can follow, got {re.escape(operation)}, fed by"
    ):
        lap_ext.trace(block(ELSEWHERE[operation]), (TOKENS, IDS_OF_TOKENS))


# ---- transformers' ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["hf_mixtral_batched_mm", "hf_mixtral_grouped_mm",
                                  "hf_mixtral_bfloat16", "hf_qwen3_moe"])  # fmt: skip
def test_transformers_experts(name: str) -> None:
    t = traced(name)
    for i in (0, 1):
        experts = f"model.layers.{i}.mlp.experts"
        width, hidden = t.layers[f"{experts}.down_proj"].shape[1:]
        assert t.layers[f"{experts}.gate_up_proj"].groups == 3
        assert set(pairs(t, f"{experts}.down_proj", f"{experts}.gate_up_proj")) == own(hidden)
        attention = f"model.layers.{i}.self_attn.o_proj"
        assert set(pairs(t, f"{experts}.gate_up_proj", attention)) == every(width, 3, 1)
        assert set(pairs(t, "lm_head", f"{experts}.down_proj")) == every(width, 1, 3)
    first, second = (f"model.layers.{i}.mlp.experts" for i in (0, 1))
    assert set(pairs(t, f"{second}.gate_up_proj", f"{first}.down_proj")) == every(width, 3, 3)
    gate = t.layers["model.layers.1.mlp.gate"]  # decides, and weighs what the experts have made
    assert [edge.name for edge in gate.next] == ["lm_head"]
    assert set(pairs(t, "lm_head", gate.name)) == {(c, e) for c in range(width) for e in range(3)}


@pytest.mark.parametrize("zoo_name", ["moe_einsum", "moe_bmm"])
def test_dense_experts_in_a_decoder(zoo_name: str) -> None:
    t = traced(zoo_name)
    for i in (0, 1):
        assert set(
            pairs(t, f"feed_forward.{i}.down_proj", f"feed_forward.{i}.gate_up_proj")
        ) == own(5)
    readers = E if zoo_name == "moe_bmm" else 1  # einsum reads the stream once for all experts
    both = set(pairs(t, "feed_forward.1.gate_up_proj", "feed_forward.0.down_proj"))
    assert both == every(6, readers, E)


@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
def test_gpt_oss(how: str) -> None:
    """Weights kept as [E, in, out], gate and up in turns, and a bias for every expert."""
    pytest.importorskip("transformers", minversion="5")
    sizes = LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2}
    entry = hf(
        "gpt_oss",
        "GptOssForCausalLM",
        text,
        sizes,
        config="GptOssConfig",
        attn_implementation="eager",
        experts_implementation=how,
    )
    model, _, kwargs = entry.make()
    t = lap_ext.trace(model, kwargs)
    experts = "model.layers.1.mlp.experts"
    assert t.layers[f"{experts}.gate_up_proj"].shape == (3, 8, 24)
    result = pairs(t, f"{experts}.down_proj", f"{experts}.gate_up_proj")
    assert set(result) == own(12, interleaved=True)
    names = [
        f"model.layers.{i}.mlp.experts.{w}_proj_bias" for i in (0, 1) for w in ("gate_up", "down")
    ]
    assert t.others == names


def test_shared_experts() -> None:
    """DeepSeek-V3: routed experts beside one that sees every token; latent keys and values."""
    pytest.importorskip("transformers", minversion="5")
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 6,
        "kv_lora_rank": 4,
    }
    heads |= {"qk_rope_head_dim": 2, "qk_nope_head_dim": 4, "v_head_dim": 4}
    routing = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    routing |= {"n_shared_experts": 1, "moe_intermediate_size": 5, "first_k_dense_replace": 1}
    sizes = IDS | heads | routing
    sizes |= {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12}
    entry = hf(
        "deepseek",
        "DeepseekV3ForCausalLM",
        text,
        sizes,
        config="DeepseekV3Config",
        experts_implementation="batched_mm",
    )
    model, _, kwargs = entry.make()
    t = lap_ext.trace(model, kwargs)
    block = "model.layers.1.mlp"
    result = pairs(t, f"{block}.experts.down_proj", f"{block}.experts.gate_up_proj")
    assert set(result) == own(5, experts=4)
    assert [e.name for e in t.layers[f"{block}.shared_experts.down_proj"].prev] == [
        f"{block}.shared_experts.{which}_proj" for which in ("gate", "up")
    ]
    attention = "model.layers.1.self_attn"
    latent = t.layers[
        f"{attention}.kv_a_proj_with_mqa"
    ].next  # rows 0 to 3: latent; 4, 5: rotary key
    assert [(e.name, e.kind) for e in latent] == [
        (f"{attention}.kv_b_proj", "layer"),
        (f"{attention}.q_b_proj", "coupled"),
    ]
    assert latent[0].here.tolist() == [0, 1, 2, 3] and set(latent[1].here.tolist()) == {4, 5}
    values = [8 * head + 4 + i for head in (0, 1) for i in range(4)]  # after 4 keys in each head
    assert pairs(t, f"{attention}.o_proj", f"{attention}.kv_b_proj") == list(enumerate(values))
