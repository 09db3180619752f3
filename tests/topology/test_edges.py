# SPDX-License-Identifier: MIT
"""Topologies worked out by hand: neighbors, channels, whether there is a scale, operations.

An edge is written "neighbor: channel map", with "scaled" where there is a factor, and "via" some
operations that must be along the path, in this order. Pairs of channels are spelled out where a
word for the map says too little.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lap_ext
from tests.helpers.networks import Net
from tests.helpers.topologies import check, pairs, traced


# ---- chains and flattening ----------------------------------------------------------------------
def test_lenet() -> None:
    """12 positions a channel when the second convolution is flattened."""
    t = traced("lenet")
    assert [(layer.name, layer.kind, layer.shape) for layer in t.layers.values()] == [
        ("conv1", "conv2d", (3, 1, 5, 5)),
        ("conv2", "conv2d", (5, 3, 5, 5)),
        ("fc1", "linear", (12, 60)),
        ("fc2", "linear", (8, 12)),
        ("fc3", "linear", (4, 8)),
    ]
    check(t, "conv1", "x: all", "conv2: same via relu max_pool2d")
    check(t, "conv2", "conv1: same via relu max_pool2d", "fc1: repeat 12 via relu max_pool2d view")
    check(t, "fc1", "conv2: repeat 12 via relu max_pool2d view", "fc2: same via relu")
    check(t, "fc2", "fc1: same via relu", "fc3: same via relu")
    check(t, "fc3", "fc2: same via relu", "output: all")
    assert pairs(t, "fc1", "conv2") == [(n, n // 12) for n in range(60)]  # channel-major


def test_flatten_with_channels_last() -> None:
    """Column n of the linear layer reads channel n % 5."""
    t = traced("flatten_last")
    check(t, "fc", "conv: 30 pairs via relu permute reshape", "output: all")
    assert pairs(t, "fc", "conv") == [(n, n % 5) for n in range(30)]


def test_pixel_shuffles() -> None:
    """Four channels become one: channels 4 i to 4 i + 3 feed input i of the last convolution."""
    t = traced("super_resolution")
    check(t, "1", "input: all via pixel_unshuffle", "3: same via prelu")
    check(t, "3", "1: same via prelu", "7: repeat 4 via pixel_shuffle relu pad")
    check(t, "7", "3: repeat 4 via pixel_shuffle relu pad", "output: all")
    assert pairs(t, "7", "3") == [(c // 4, c) for c in range(16)]


def test_groups() -> None:
    """Channels are counted through all groups: input 2 g + i is column i of group g."""
    t = traced("conv1d")
    assert (t.layers["4"].shape, t.layers["4"].groups) == ((6, 2, 3), 2)
    check(
        t,
        "4",
        "0: same scaled via batch_norm relu max_pool1d",
        "7: same scaled via group_norm leaky_relu",
    )
    check(
        t,
        "7",
        "4: same scaled via group_norm leaky_relu",
        "12: same scaled via instance_norm prelu adaptive_avg_pool1d flatten",
    )
    assert t.layers["7"].next[0].scale.tolist() == t.model[8].weight.abs().tolist()
    assert pairs(t, "4", "0") == [(i, i) for i in range(4)]


def test_depthwise() -> None:
    """A depthwise layer is a neighbor like any other; 5.0 makes two channels of each."""
    t = traced("mobilenet_v1")
    assert [t.layers[name].groups for name in ("1.0", "2.0", "5.0")] == [4, 1, 8]
    check(t, "2.0", "1.0: same scaled via batch_norm relu", "3.0: same scaled via batch_norm relu")
    check(t, "5.0", "4.0: same scaled via batch_norm relu", "6.0: same scaled via batch_norm relu")
    assert pairs(t, "5.0", "4.0") == [(i, i) for i in range(8)]
    assert pairs(t, "6.0", "5.0") == [(i, i) for i in range(16)]


def test_transposed_convolutions() -> None:
    """Rows are inputs: [6, 4, 4, 4] in two groups has 6 inputs and 8 outputs."""
    t = traced("autoencoder")
    layer = t.layers["6"]
    assert (layer.kind, layer.shape, layer.groups) == ("conv_transpose2d", (6, 4, 4, 4), 2)
    check(t, "6", "3: same scaled via batch_norm leaky_relu", "9: same scaled via batch_norm relu")
    assert pairs(t, "6", "3") == [(i, i) for i in range(6)]
    assert pairs(t, "9", "6") == [(i, i) for i in range(8)]


# ---- sums, concatenations, shuffles --------------------------------------------------------------
def test_residual_block_with_a_projection() -> None:
    """The stream after a projection has two producers, each with the batch norm of its branch."""
    t = traced("resnet_basic")
    stream = "stem.0.0: same scaled; stages.0.0.conv2: same scaled via add; "
    into = stream + "stages.0.1.conv2: same scaled via batch_norm add relu"
    check(t, "stages.1.0.conv1", into, "stages.1.0.conv2: same scaled via batch_norm relu")
    readers = [f"stages.{name}" for name in ("1.1.conv1", "2.0.conv1", "2.0.downsample.0")]
    out = "; ".join(f"{name}: same scaled via batch_norm add relu" for name in readers)
    check(t, "stages.1.0.conv2", "stages.1.0.conv1: same scaled via batch_norm relu", out)
    check(t, "stages.1.0.downsample.0", into, out)
    both = "; ".join(f"stages.1.0.{name}: same scaled" for name in ("conv2", "downsample.0"))
    check(t, "stages.1.1.conv1", both, "stages.1.1.conv2: same scaled via batch_norm relu")
    check(
        t,
        "fc",
        "stages.2.0.conv2: same scaled; stages.2.0.downsample.0: same scaled; "
        "stages.2.1.conv2: same scaled via batch_norm add relu adaptive_avg_pool2d flatten",
        "output: all",
    )
    block = t.model.stages[1][0]
    for edge, norm in zip(t.layers["stages.1.1.conv1"].prev, (block.bn2, block.downsample[1]),
                          strict=True):  # fmt: skip
        scale = norm.weight.double().abs() / (norm.running_var.double() + norm.eps).sqrt()
        torch.testing.assert_close(edge.scale, scale, rtol=1e-12, atol=0)


def test_identity_skip_from_the_input() -> None:
    rule = lambda m, x: m.b(x + m.a(x))  # noqa: E731
    t = lap_ext.trace(Net(rule, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), torch.randn(1, 4))
    check(t, "a", "inputs_0: all", "b: same via add")
    check(t, "b", "inputs_0: all via add; a: same via add", "output: all")


def test_concatenated_layers() -> None:
    """DenseNet: the k-th layer of a block has its producers at 0, 4, 7, and a norm of its own."""
    t = traced("densenet")
    block, scaled = "block1.layers.", "scaled via cat batch_norm relu"
    check(
        t,
        f"{block}2.conv1",
        f"stem.0.0: same scaled; {block}0.conv2: offset -4 scaled; {block}1.conv2: offset -7 "
        f"scaled",
        f"{block}2.conv2: same scaled via batch_norm relu",
    )
    check(
        t,
        f"{block}0.conv2",
        f"{block}0.conv1: same scaled via batch_norm relu",
        f"{block}1.conv1: offset +4 scaled via cat batch_norm; {block}2.conv1: offset +4 scaled; "
        "transition.2: offset +4 scaled via dropout cat batch_norm",
    )
    assert pairs(t, f"{block}2.conv1", f"{block}1.conv2") == [(7, 0), (8, 1), (9, 2)]
    check(
        t,
        "classifier",
        f"transition.2: same {scaled}; block2.layers.0.conv2: offset -6 {scaled}; "
        f"block2.layers.1.conv2: offset -9 {scaled} adaptive_avg_pool2d flatten",
        "output: all",
    )
    norm = t.model.block1.layers[2].norm1
    gain = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).abs()
    scales = [edge.scale for edge in t.layers[f"{block}2.conv1"].prev]
    torch.testing.assert_close(scales[1:], [gain[4:7], gain[7:10]], rtol=1e-12, atol=0)


def test_shuffled_channels() -> None:
    """[a0 a1 a2 a3 b0 b1 b2 b3], shuffled to [a0 b0 a1 b1 a2 b2 a3 b3]; its second half is read."""
    t = traced("shufflenet_v2")
    check(
        t,
        "3.branch2.0.0",
        "2.branch1.1.0: permuted scaled; 2.branch2.2.0: permuted scaled "
        "via batch_norm relu cat view transpose contiguous chunk",
        "3.branch2.1.0: same scaled via batch_norm relu",
    )
    assert pairs(t, "3.branch2.0.0", "2.branch1.1.0") == [(0, 2), (2, 3)]
    assert pairs(t, "3.branch2.0.0", "2.branch2.2.0") == [(1, 2), (3, 3)]
    assert pairs(t, "4.branch2.0.0", "2.branch1.1.0") == [(0, 1)]  # passed by a block
    first = traced("shufflenet_v1").layers["1.conv2.0"].prev[0]  # 6 channels in 2 groups
    assert first.there.tolist() == [0, 3, 1, 4, 2, 5] and first.here.tolist() == [0, 1, 2, 3, 4, 5]


def test_skip_beside_an_upsampled_branch() -> None:
    """U-Net: [skip, up]; the skip goes down through a pooling as well."""
    t = traced("unet_transposed")
    check(
        t,
        "dec2.0.0",
        "down2.1.0: same scaled via batch_norm relu cat; up2: offset -6 via cat",
        "dec2.1.0: same scaled via batch_norm relu",
    )
    check(t, "up2", "bottom.1.0: same scaled via batch_norm relu", "dec2.0.0: offset +6 via cat")
    check(
        t,
        "down2.1.0",
        "down2.0.0: same scaled via batch_norm relu",
        "bottom.0.0: same scaled via batch_norm relu max_pool2d; "
        "dec2.0.0: same scaled via batch_norm relu cat",
    )
    assert t.layers["up2"].kind == "conv_transpose2d"


def test_squeeze_and_excite() -> None:
    """The gate's last layer feeds what its product feeds; its first reads the mean of positions."""
    t = traced("mobilenet_v3")
    gated, gate = "2.block.1.0", "2.block.2"
    check(
        t,
        gated,
        "2.block.0.0: same scaled",
        f"{gate}.reduce: same scaled via batch_norm relu adaptive_avg_pool2d; "
        "2.block.3.0: same scaled via batch_norm relu mul",
    )
    check(
        t,
        f"{gate}.reduce",
        f"{gated}: same scaled via adaptive_avg_pool2d",
        f"{gate}.expand: same via relu",
    )
    check(
        t,
        f"{gate}.expand",
        f"{gate}.reduce: same via relu",
        "2.block.3.0: same via hardsigmoid mul",
    )
    check(
        t,
        "2.block.3.0",
        f"{gated}: same scaled via mul; {gate}.expand: same via hardsigmoid mul",
        "3.block.0.0: same scaled; 4.block.0.0: same scaled via add",
    )


@pytest.mark.parametrize("name", ["feature_pyramid"])
def test_one_layer_called_twice(name: str) -> None:
    """Each call is a role with edges of its own."""
    t = traced(name)
    assert len(t.layers["head"].roles) == 2
    check(
        t,
        "head",
        "lateral3: same via upsample_nearest2d add; lateral2: same via add; lateral3: same",
        "logits: same via relu; logits: same via relu",
    )
    check(t, "logits", "head: same via relu; head: same via relu", "output: all; output: all")


# ---- for people -------------------------------------------------------------------------------
def test_table() -> None:
    """A map that is not one to one is named; what is multiplied with a layer has an x before it."""
    table = str(traced("cross_attention")).splitlines()
    assert [re.split(" {2,}", row) for row in table] == [
        ["layer", "kind", "shape", "fed by", "read by"],
        ["-" * 23, "-" * 6, "-" * 5, "-" * 29, "-" * 25],
        ["keys", "linear", "6x5", "x", "attention.k_proj_weight"],
        ["values", "linear", "7x5", "x", "attention.v_proj_weight"],
        ["attention.q_proj_weight", "linear", "8x8", "x attention.k_proj_weight"],
        ["attention.k_proj_weight", "linear", "8x6", "keys", "x attention.q_proj_weight"],
        ["attention.v_proj_weight", "linear", "8x7", "values", "attention.out_proj"],
        ["attention.out_proj", "linear", "8x8", "attention.v_proj_weight", "fc (24 pairs)"],
        ["fc", "linear", "4x24", "attention.out_proj (24 pairs)", "output"],
        ["no layers, never pruned: queries"],
    ]
    assert table[4].index("x attention") == table[0].index("read by")  # columns are aligned
    topology = traced("hf_gpt2_sdpa")
    assert repr(topology) == f"Topology(10 layers, {topology.graph.channels.size - 1} channels)"
    row = next(row for row in str(topology).splitlines() if row.startswith("transformer.wpe"))
    assert row.endswith("  transformer.h.0.attn.c_attn and 4 more")


def test_table_in_html() -> None:
    """Notebooks show the rows of the table and the lines below it."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    topology = lap_ext.trace(model, torch.randn(3, 4))
    html = topology._repr_html_()
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", html)
    assert cells == [
        *("layer", "kind", "shape", "fed by", "read by"),
        *("0", "linear", "8x4", "input", "2"),
        *("2", "linear", "2x8", "0", "output"),
    ]
    topology.others, topology.stops = ["a<b"], ["expected x, got y."]
    assert topology._repr_html_() == (
        f"{html}<p>no layers, never pruned: a&lt;b</p><p>stopped at: expected x, got y.</p>"
    )


def test_table_of_long_names() -> None:
    """Two dots stand for how the layer's own name begins; a column has room for 48 letters."""
    pytest.importorskip("transformers", minversion="5")
    table = str(traced("hf_llama_sdpa")).splitlines()
    cells = {row.split()[0]: [x for x in row.split("  ") if x][3:] for row in table[2:]}
    layer = "model.layers.1"
    assert [x.strip() for x in cells[f"{layer}.mlp.gate_proj"]] == [
        "model.embed_tokens, ..0.self_attn.o_proj and 2 more",
        "..down_proj",
    ]
    assert [x.strip() for x in cells[f"{layer}.self_attn.q_proj"]] == [
        "model.embed_tokens, ..0.self_attn.o_proj and 1 more",
        "x ..k_proj (32 pairs)",
    ]
    assert [x.strip() for x in cells["lm_head"]] == ["model.embed_tokens and 4 more", "output"]
    assert max(map(len, table)) < 160


def test_graph() -> None:
    """Layers are boxes, inputs and outputs ellipses; q and k are joined by one dotted line."""
    rule = lambda m, x: m.o((m.q(x) @ m.k(x).T).softmax(-1) @ m.v(x).flip(1))  # noqa: E731
    model = Net(rule, **{name: nn.Linear(4, 4) for name in "qkvo"})
    topology = lap_ext.trace(model, torch.randn(3, 4))
    assert topology.to_dot() == "\n".join(
        [
            "digraph topology {",
            "  rankdir=LR; node [shape=box, fontname=Helvetica];",
            r'  n0 [label="q\nlinear 4x4"];',
            r'  n1 [label="k\nlinear 4x4"];',
            r'  n2 [label="v\nlinear 4x4"];',
            r'  n3 [label="o\nlinear 4x4"];',
            '  o0 -> n0 [label="all"];',
            "  n0 -> n1 [style=dotted, dir=none];",
            '  o0 -> n1 [label="all"];',
            '  o0 -> n2 [label="all"];',
            '  n2 -> n3 [label="permuted"];',
            "  n3 -> o1;",
            '  o0 [label="inputs_0", shape=ellipse];',
            '  o1 [label="output", shape=ellipse];',
            "}",
        ]
    )


def test_queries_that_meet_the_input() -> None:
    """The other side of a coupling need not be a layer: the model's input counts 1."""
    model = Net(
        lambda m, x: m.o((m.q(x) @ x.T).softmax(-1) @ m.v(x)),
        **{name: nn.Linear(4, 4) for name in "qvo"},
    )
    topology = lap_ext.trace(model, torch.randn(3, 4))
    (edge,) = topology.layers["q"].next
    assert (edge.name, edge.kind, edge.channel_map) == ("inputs_0", "coupled", "same")
    assert "n0 -> o0 [style=dotted, dir=none];" in topology.to_dot()
    scores = lap_ext.scores(model, topology=topology)
    torch.testing.assert_close(scores["q"], model.q.weight.detach().abs())  # 1 and 1
