# SPDX-License-Identifier: MIT
"""Topologies of transformers and recurrent nets, worked out by hand (notation: test_edges.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.networks import Net
from tests.helpers.topologies import agree, check, pairs, traced


def coupled(topology: lap_ext.Topology, layer: str) -> dict[str, list[tuple[int, int]]]:
    """Neighbors that a layer is multiplied with -> (its channel, the neighbor's)."""
    edges = [edge for edge in topology.layers[layer].next if edge.kind == "coupled"]
    return {e.name: list(zip(e.here.tolist(), e.there.tolist(), strict=True)) for e in edges}


def packed(width: int) -> list[tuple[int, int]]:
    """Queries are rows 0 to width - 1, keys the next ones: partners of each other."""
    first = [(i, width + i) for i in range(width)]
    return first + [(k, q) for q, k in first]


@pytest.mark.parametrize("name", ["vit_sdpa", "vit_by_hand"])
def test_packed_query_key_value(name: str) -> None:
    """ViT: values are rows 16 to 23; the class token and the positions are passed by."""
    t = traced(name)
    block = "blocks.1.attn"
    stream = "patch: same scaled via flatten transpose cat add layer_norm; " + "; ".join(
        f"blocks.0.{branch}: same scaled via mul add layer_norm"
        for branch in ("attn.proj", "mlp.3")
    )
    check(t, f"{block}.qkv", stream, f"{block}.proj: offset -16; {block}.qkv: permuted")
    check(
        t,
        f"{block}.proj",
        f"{block}.qkv: offset +16 via reshape permute unbind transpose",
        "blocks.1.mlp.0: same scaled via mul add layer_norm; "
        "head: same scaled via mul add layer_norm select",
    )
    assert coupled(t, f"{block}.qkv") == {f"{block}.qkv": packed(8)}
    gains = (t.model.blocks[0].ls1 * t.model.blocks[1].norm1.weight).double()  # of attn.proj
    scale = t.layers[f"{block}.qkv"].prev[1].scale
    torch.testing.assert_close(scale, gains.abs().detach(), rtol=1e-6, atol=0)


def test_multi_head_attention_module() -> None:
    t = traced("vit_mha")
    block = "blocks.0.self_attention"
    assert t.layers[f"{block}.in_proj_weight"].parameter == f"{block}.in_proj_weight"
    check(
        t,
        f"{block}.in_proj_weight",
        "patch: same scaled via cat add layer_norm",
        f"{block}.out_proj: offset -16; {block}.in_proj_weight: permuted",
    )
    assert coupled(t, f"{block}.in_proj_weight") == {f"{block}.in_proj_weight": packed(8)}


def test_cross_attention_with_a_packed_weight() -> None:
    """Two roles of one weight: rows 0 to 7 read the target, 8 to 23 what the encoder has made."""
    t = traced("transformer")
    cross = "transformer.decoder.layers.0.multihead_attn"
    encoder, decoder = "transformer.encoder.layers.0", "transformer.decoder.layers.0"
    mine = f"{cross}.in_proj_weight"
    assert [role.part.rows for role in t.layers[mine].roles] == [(0, 8), (8, 24)]
    check(
        t,
        mine,
        f"target: same scaled; {decoder}.self_attn.out_proj: same scaled; "
        f"source: same scaled; {encoder}.self_attn.out_proj: same scaled; "
        f"{encoder}.linear2: same scaled via dropout add layer_norm",
        f"{mine}: offset +8; {cross}.out_proj: offset -16; {mine}: offset -8",
    )
    check(
        t,
        f"{cross}.out_proj",
        f"{mine}: offset +16",
        f"{decoder}.linear1: same scaled via add; head: same scaled via add layer_norm",
    )


def test_windows_and_merged_patches() -> None:
    """Swin: windows and shifts move positions; four adjacent positions are four times 6 inputs."""
    t = traced("swin")
    every = {f"stage1.{i}.{branch}" for i in (0, 1) for branch in ("attn.proj", "mlp.3")} | {
        "patch"
    }
    assert {edge.name for edge in t.layers["merge.reduction"].prev} == every
    for name in every:
        assert pairs(t, "merge.reduction", name) == [(n, n % 6) for n in range(24)]
    gains = t.model.merge.norm.weight.double().abs()
    (own,) = [e.scale for e in t.layers["merge.reduction"].prev if e.name == "stage1.1.mlp.3"]
    torch.testing.assert_close(own, gains.detach(), rtol=1e-6, atol=0)
    attention = "stage1.1.attn"
    assert coupled(t, f"{attention}.qkv") == {f"{attention}.qkv": packed(6)}
    check(
        t,
        f"{attention}.proj",
        f"{attention}.qkv: offset +12",
        "stage1.1.mlp.0: same scaled via roll add layer_norm; "
        "merge.reduction: 24 pairs scaled via roll add cat layer_norm",
    )


def test_grouped_queries() -> None:
    """Query heads 0 and 1 read key and value head 0, heads 2 and 3 head 1, each of 4 channels."""
    t = traced("decoder_gqa")
    owner = [4 * (i // 8) + i % 4 for i in range(16)]
    for block in ("attention.0", "attention.1"):  # repeated; the operator is told
        assert pairs(t, f"{block}.wo", f"{block}.wv") == list(enumerate(owner))
        turned = [4 * (i // 8) + (i + 2) % 4 for i in range(16)]  # rotary positions: d with d + 2
        both = sorted([*enumerate(owner), *enumerate(turned)])
        assert sorted(coupled(t, f"{block}.wq")[f"{block}.wk"]) == both
        assert sorted(coupled(t, f"{block}.wk")[f"{block}.wq"]) == sorted((k, q) for q, k in both)
        (edge,) = t.layers[f"{block}.wq"].next
        torch.testing.assert_close(edge.scale, torch.full((32,), 0.5**0.5).double())
    check(
        t,
        "feed_forward.0.w2",
        "feed_forward.0.w1: same via silu mul; feed_forward.0.w3: same via mul",
        "; ".join(f"attention.1.{w}: same scaled via add mul" for w in ("wq", "wk", "wv"))
        + "; feed_forward.1.w1: same scaled via add mul; head: same scaled via add rms_norm",
    )
    halves = sorted([(i, i) for i in range(9)] + [(i, 9 + i) for i in range(9)])
    assert sorted(pairs(t, "feed_forward.1.w2", "feed_forward.1.w1")) == halves


@pytest.mark.parametrize("name", ["hf_gpt2_eager", "hf_gpt2_sdpa"])
def test_weights_kept_as_in_out_and_a_tied_head(name: str) -> None:
    """GPT-2: Conv1D's rows are inputs; the head is the embedding's second role."""
    t = traced(name)
    block = "transformer.h.1"
    assert t.layers[f"{block}.attn.c_attn"].shape == (8, 24)
    assert all(role.part.transposed for role in t.layers[f"{block}.attn.c_attn"].roles)
    stream = [
        f"transformer.{source}" for source in ("wte", "wpe", "h.0.attn.c_proj", "h.0.mlp.c_proj")
    ]
    check(
        t,
        f"{block}.attn.c_attn",
        "; ".join(f"{source}: same scaled" for source in stream),
        f"{block}.attn.c_proj: offset -16; {block}.attn.c_attn: permuted",
    )
    assert coupled(t, f"{block}.attn.c_attn") == {f"{block}.attn.c_attn": packed(8)}
    check(
        t,
        f"{block}.mlp.c_proj",
        f"{block}.mlp.c_fc: same via tanh",
        "transformer.wte: same scaled via add layer_norm",
    )
    assert "lm_head" not in t.layers
    embedding, head = t.layers["transformer.wte"].roles
    assert (embedding.kind, head.kind) == ("embedding", "linear")
    assert embedding.part.transposed and not head.part.transposed
    last = [*stream, f"{block}.attn.c_proj", f"{block}.mlp.c_proj"]
    agree(
        t.layers["transformer.wte"].prev,
        [f"{source}: same scaled via layer_norm" for source in last],
    )
    assert [e.name for e in t.layers["transformer.wte"].next][-2:] == ["transformer.wte", "output"]
    assert "addmm" in t.layers[f"{block}.mlp.c_proj"].next[0].via


@pytest.mark.parametrize("name", ["hf_t5_eager", "hf_t5_sdpa"])
def test_cross_attention(name: str) -> None:
    """T5: queries read the decoder's stream, keys and values the encoder's after its last norm."""
    t = traced(name)
    sources = [
        f"encoder.block.{i}.layer.{layer}"
        for i in (0, 1)
        for layer in ("0.SelfAttention.o", "1.DenseReluDense.wo")
    ]
    encoder = "; ".join(f"{source}: same scaled" for source in ["shared", *sources])
    for i in (0, 1):
        cross = f"decoder.block.{i}.layer.1.EncDecAttention"
        check(t, f"{cross}.k", encoder, f"{cross}.q: same")
        check(t, f"{cross}.v", encoder, f"{cross}.o: same via view transpose reshape")
        assert coupled(t, f"{cross}.k") == {f"{cross}.q": [(j, j) for j in range(6)]}
    agree(
        t.layers["decoder.block.0.layer.1.EncDecAttention.q"].prev,
        ["shared: same scaled", "decoder.block.0.layer.0.SelfAttention.o: same scaled via add"],
    )
    norm = t.model.encoder.final_layer_norm.weight.double().abs().detach()
    for edge in t.layers["decoder.block.1.layer.1.EncDecAttention.v"].prev:
        torch.testing.assert_close(edge.scale, norm)
    bias = t.layers["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"]
    assert [(edge.name, edge.kind) for edge in bias.next] == [("attention", "boundary")]
    torch.testing.assert_close(bias.next[0].scale, torch.full((2,), 2**0.5).double())  # two blocks
    assert [(len(t.layers["shared"].roles), role.kind) for role in t.layers["shared"].roles][
        1:
    ] == [(3, "embedding"), (3, "linear")]


def test_a_block_that_is_shared() -> None:
    """ALBERT calls one block twice: the second call reads the first one, and is read by the end."""
    t = traced("hf_albert")
    layer = "encoder.albert_layer_groups.0.albert_layers.0.ffn_output"
    assert len(t.layers[layer].roles) == 2
    assert [edge.name for edge in t.layers[layer].prev] == [layer.removesuffix("_output")] * 2
    assert layer in [edge.name for edge in t.layers[layer.removesuffix("_output")].prev]


# ---- recurrent nets ---------------------------------------------------------------------------
def gates(n: int, width: int) -> list[tuple[int, int]]:
    """Channel j of the state is made by row j of every gate."""
    return [(j, gate * width + j) for j in range(width) for gate in range(n)]


@pytest.mark.parametrize("name, n", [("lstm", 4), ("gru", 3), ("rnn", 1)])
def test_gates(name: str, n: int) -> None:
    t = traced(name)
    ih, hh = (t.layers[f"rnn.weight_{which}_l0"] for which in ("ih", "hh"))
    assert ih.shape == (4 * n, 5) and ih.kind in ("lstm", "gru", "rnn_tanh")
    agree(ih.prev, ["embedding: same"])
    readers = ["rnn.weight_hh_l0", "rnn.weight_ih_l1" if name == "gru" else "fc"]
    for layer in (ih, hh):  # each row of a gate is read by what reads the state, hh itself too
        assert [edge.name for edge in layer.next] == readers
    for reader in readers:
        for source in (ih, hh):
            assert sorted(pairs(t, reader, source.name)) == sorted(gates(n, 4))


def test_both_directions() -> None:
    """The second layer reads [forward, backward]: 4 channels of each."""
    t = traced("lstm_bidirectional")
    for reader in ("rnn.weight_ih_l1", "rnn.weight_ih_l1_reverse"):
        assert sorted(pairs(t, reader, "rnn.weight_hh_l0")) == sorted(gates(4, 4))
        back = [(4 + j, row) for j, row in sorted(gates(4, 4))]
        assert sorted(pairs(t, reader, "rnn.weight_hh_l0_reverse")) == back
    assert [e.name for e in t.layers["rnn.weight_hh_l1_reverse"].next] == [
        "rnn.weight_hh_l1_reverse",
        "fc",
    ]


def test_final_states() -> None:
    """Of an LSTM in two layers and directions, the head reads the last layer's two final states."""
    t = traced("lstm_last_state")
    assert [edge.name for edge in t.layers["fc"].prev] == [
        f"lstm.weight_{which}_l1{side}" for side in ("", "_reverse") for which in ("ih", "hh")
    ]
    assert sorted(pairs(t, "fc", "lstm.weight_ih_l1_reverse")) == sorted(
        (4 + j, r) for j, r in gates(4, 4)
    )


def test_projected_state() -> None:
    """Gates make the cell, the projection reads it, and everything else reads the projection."""
    t = traced("lstm_projected")
    check(t, "rnn.weight_hh_l0", "rnn.weight_hr_l0: same", "rnn.weight_hr_l0: 16 pairs")
    check(
        t,
        "rnn.weight_hr_l0",
        "rnn.weight_ih_l0: 16 pairs; rnn.weight_hh_l0: 16 pairs",
        "rnn.weight_hh_l0: same; fc: same via lstm select",
    )


def states(m: Any, x: Tensor) -> Tensor:
    """First states that are computed, as of an image that is put into words."""
    first = tuple(layer(x)[None] for layer in m.first)
    y, final = m.rnn(x[None], first if len(m.first) == 2 else first[0])
    return m.b(y[0]) + m.c((final[1] if len(m.first) == 2 else final)[0])


@pytest.mark.parametrize("cell, size", [("LSTM", 3), ("LSTM", 0), ("GRU", 0), ("RNN", 0)])
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_first_and_final_states(cell: str, size: int) -> None:
    """hh reads the first output; the first cell continues as the cell, GRU's as its state."""
    rnn = getattr(nn, cell)(4, 5, **({"proj_size": size} if size else {}))
    first = nn.ModuleList(nn.Linear(4, n) for n in ([size or 5, 5] if cell == "LSTM" else [5]))
    t = lap_ext.trace(
        Net(states, rnn=rnn, first=first, b=nn.Linear(size or 5, 2), c=nn.Linear(5, 2)),
        torch.randn(3, 4),
    )
    readers = {name: [edge.name for edge in t.layers[name].next] for name in t.layers}
    cellwise = ["rnn.weight_hr_l0"] if size else ["rnn.weight_hh_l0", "b"]
    if cell == "LSTM":
        assert readers["first.0"] == ["rnn.weight_hh_l0"]
        assert readers["first.1"] == [*cellwise, "c"]
    elif cell == "GRU":
        assert readers["first.0"] == ["rnn.weight_hh_l0", "b", "c"]
    else:
        assert readers["first.0"] == ["rnn.weight_hh_l0"]
    assert readers["rnn.weight_ih_l0"] == [*cellwise, "c"]
    for name in ("first.0", "first.1")[: len(first)]:
        assert all(
            edge.channel_map == "same" and edge.scale is None for edge in t.layers[name].next
        )


def test_columns_of_an_image_as_steps() -> None:
    """CRNN: 4 channels of 3 rows are the 12 inputs of a step."""
    t = traced("crnn")
    for side in ("", "_reverse"):
        layer = f"lstm.weight_ih_l0{side}"
        agree(
            t.layers[layer].prev,
            ["conv: repeat 3 scaled via batch_norm relu max_pool2d permute reshape"],
        )
        assert pairs(t, layer, "conv") == [(n, n // 3) for n in range(12)]


def test_gates_in_one_layer() -> None:
    """F.glu and chunk: halves of one layer meet, the second starts at 3."""
    t = traced("wavenet")
    assert sorted(pairs(t, "out.0", "dilated.0")) == sorted(
        (i, i + 3 * h) for i in range(3) for h in (0, 1)
    )
    assert pairs(t, "dilated.1", "out.0") == [(i, i) for i in range(4)]
    assert pairs(t, "head.1", "out.0") == [(i, 4 + i) for i in range(5)]
    assert sorted(pairs(t, "head.3", "head.1")) == sorted(
        (i, i + 5 * h) for i in range(5) for h in (0, 1)
    )


def test_tied_autoencoder() -> None:
    """The weight's second role is its transpose: it reads the first one's outputs."""
    t = traced("tied_autoencoder")
    encoder, decoder = t.layers["weight"].roles
    assert encoder.part.channels == (6, 4) and decoder.part.channels == (4, 6)
    check(
        t,
        "weight",
        "inlet: same via relu; weight: same via sigmoid",
        "weight: same via sigmoid; outlet: same",
    )


def test_keys_without_queries() -> None:
    """Learned queries are no layer: the keys' channels end in the attention, the values go on."""

    def rule(m: Any, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(m.queries, m.k(x)[:, None], m.v(x)[:, None])
        return m.o(y.flatten(1))

    layers = {"k": nn.Linear(5, 4), "v": nn.Linear(5, 4), "o": nn.Linear(8, 3)}
    model = Net(rule, queries=nn.Parameter(torch.randn(1, 1, 2, 4)), **layers)
    t = lap_ext.trace(model, torch.randn(1, 6, 5))
    check(t, "k", "inputs_0: all", "attention: all")
    assert pairs(t, "o", "v") == [(n, n % 4) for n in range(8)]
    assert t.others == ["queries"]
