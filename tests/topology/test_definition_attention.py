# SPDX-License-Identifier: MIT
"""lap_ext.scores == the brute-force definition, weight by weight: attention and transformers.

There are as many positions as heads, so that every head of the oracle's fixed mixing reads another
one, and one position of the model's output is looked at. q and k meet in the logits: their score is
the change of the bilinear form W_q^T W_k of each head.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import lap_ext
from tests.helpers.network_oracle import distortions
from tests.helpers.networks import RTOL, Net, check, randomized

LAST = {"read": lambda y: y[:, -1]}


def heads(x: Tensor, width: int = 2) -> Tensor:
    """[1, positions, features] -> [1, heads, positions, width]."""
    return x.view(x.shape[0], x.shape[1], -1, width).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    return m.o(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def plain(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    return m.o(joined(torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v))


def one_head(m: Any, x: Tensor) -> Tensor:
    logits = torch.bmm(m.q(x), m.k(x).transpose(1, 2))
    return m.o(torch.bmm(F.softmax(logits, dim=-1), m.v(x)))


def grouped(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    return m.o(joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


def repeated(m: Any, x: Tensor) -> Tensor:
    q = heads(m.q(x))
    k, v = (heads(y).repeat_interleave(2, dim=1) for y in (m.k(x), m.v(x)))
    return m.o(joined(F.softmax(q @ k.mT, dim=-1) @ v))


def expanded(m: Any, x: Tensor) -> Tensor:
    """The repeat of transformers' Llama."""
    q, *kv = (heads(y) for y in (m.q(x), m.k(x), m.v(x)))
    n, h, t, d = kv[0].shape
    k, v = (y[:, :, None].expand(n, h, 2, t, d).reshape(n, 2 * h, t, d) for y in kv)
    return m.o(joined(F.scaled_dot_product_attention(q, k, v)))


def split(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(y) for y in m.qkv(x).split(4, dim=-1))
    return m.o(joined(F.scaled_dot_product_attention(q, k, v)))


def unbound(m: Any, x: Tensor) -> Tensor:
    """timm's ViT."""
    q, k, v = m.qkv(x).reshape(1, x.shape[1], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(joined(F.scaled_dot_product_attention(q, k, v)))


def normed(m: Any, x: Tensor) -> Tensor:
    """A norm for each head of q and k, as in Qwen."""
    q, k, v = m.nq(heads(m.q(x))), m.nk(heads(m.k(x))), heads(m.v(x))
    return m.o(joined(F.scaled_dot_product_attention(q, k, v)))


def windowed(m: Any, x: Tensor) -> Tensor:
    """Swin: two shifted windows of two positions each."""
    y = m.qkv(x.roll(1, dims=1)).view(2, 2, 12)
    q, k, v = (heads(z) for z in y.chunk(3, dim=-1))
    y = joined(F.scaled_dot_product_attention(q, k, v)).view(1, 4, 4)
    return m.o(y).roll(-1, dims=1)


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is [in, out]."""

    def __init__(self, out: int, into: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(into, out))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


def turned(y: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary positions by quarter turns: over all pairs of positions, cos^2 and sin^2 are 1/2."""
    angle = torch.arange(y.shape[-2], dtype=y.dtype)[:, None] * torch.pi / 2
    half = y.shape[-1] // 2
    if interleaved:
        other = torch.stack([-y[..., 1::2], y[..., ::2]], dim=-1).flatten(-2)
    else:
        other = torch.cat([-y[..., half:], y[..., :half]], dim=-1)
    return y * angle.cos() + other * angle.sin()


def rotary(m: Any, x: Tensor) -> Tensor:
    q, k, v = turned(heads(m.q(x), 4)), turned(heads(m.k(x), 4)), heads(m.v(x), 4)
    return m.o(joined(F.scaled_dot_product_attention(q, k, v)))


def interleaved(m: Any, x: Tensor) -> Tensor:
    q, k = (turned(heads(y, 4), interleaved=True) for y in (m.q(x), m.k(x)))
    return m.o(joined(F.scaled_dot_product_attention(q, k, heads(m.v(x), 4))))


def partly(m: Any, x: Tensor) -> Tensor:
    """Phi: only the first features are rotated."""
    q, k = (heads(y, 4) for y in (m.q(x), m.k(x)))
    q, k = (torch.cat([turned(y[..., :2]), y[..., 2:]], dim=-1) for y in (q, k))
    return m.o(joined(F.scaled_dot_product_attention(q, k, heads(m.v(x), 4))))


def rms(x: Tensor, gain: Tensor) -> Tensor:
    """As transformers writes it."""
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def qwen(m: Any, tokens: Tensor) -> Tensor:
    """Two of its blocks: norms of q and k, rotary positions, grouped heads, a gate, a tied head."""
    x = m.tokens(tokens)
    for b in m.blocks:
        h = rms(x, b.n1)
        q, k, v = turned(rms(heads(b.q(h)), b.nq)), turned(rms(heads(b.k(h)), b.nk)), heads(b.v(h))
        k, v = (y[:, :, None].expand(1, 1, 2, 4, 2).reshape(1, 2, 4, 2) for y in (k, v))
        x = x + b.o(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        h = rms(x, b.n2)
        x = x + b.down(F.silu(b.gate(h)) * b.up(h))
    return F.linear(rms(x, m.norm), m.tokens.weight)


def broadcast(m: Any, x: Tensor) -> Tensor:
    """One key and value head for all, never repeated."""
    weights = torch.softmax(heads(m.q(x)) @ m.k(x)[:, None].mT, dim=-1)
    return m.o(joined(weights @ m.v(x)[:, None]))


def einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (2, 2)) for y in (m.q(x), m.k(x), m.v(x)))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return m.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def square(out: int = 4, into: int = 4) -> nn.Linear:
    return nn.Linear(into, out)


def qkvo(rule: Any, query: int = 4, key: int = 4) -> Net:
    """A layer, the attention and a layer, so that the outer ones have neighbors."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.tail(rule(m, m.head(x)))

    layers = {"q": square(query, 3), "k": square(key, 3), "v": square(key, 3)}
    return Net(forward, head=square(3, 2), o=square(3, query), tail=square(2, 3), **layers)


def packed(rule: Any) -> Net:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.head(x)
        return m.tail(x + rule(m, m.n(x)))

    layers = {"head": square(3, 2), "n": nn.LayerNorm(3), "tail": square(2, 3)}
    return Net(forward, qkv=square(12, 3), o=square(3), **layers)


def with_norms() -> Net:
    model = qkvo(normed)
    model.nq, model.nk = nn.RMSNorm(2), nn.LayerNorm(2)
    return model


ATTENTION = {
    "fused": lambda: (qkvo(fused), 2),
    "plain": lambda: (qkvo(plain), 2),
    "one_head": lambda: (qkvo(one_head), 2),
    "grouped": lambda: (qkvo(grouped, 8, 4), 4),
    "repeated": lambda: (qkvo(repeated, 8, 4), 4),
    "expanded": lambda: (qkvo(expanded, 8, 4), 4),
    "multi_query": lambda: (qkvo(grouped, 6, 2), 3),
    "broadcast": lambda: (qkvo(broadcast, 6, 2), 3),
    "einsum": lambda: (qkvo(einsum), 2),
    "split": lambda: (packed(split), 2),
    "unbound": lambda: (packed(unbound), 2),
    "windowed": lambda: (packed(windowed), 4),
    "normed": lambda: (with_norms(), 2),
}


# A number that the logits are multiplied with, as in the fused form, counts as 1: softmax has a
# temperature of its own.
SCALED = {
    "logits": lambda q, k: q @ k.mT / 2**0.5,
    "queries": lambda q, k: (q * 2**-0.5) @ k.mT,
}


@pytest.mark.parametrize("name", list(SCALED))
def test_scaled_logits(name: str) -> None:
    def rule(form: Any) -> Any:
        def attend(m: Any, x: Tensor) -> Tensor:
            q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
            return m.o(joined(F.softmax(form(q, k), dim=-1) @ v))

        return attend

    model = randomized(qkvo(rule(SCALED[name])))
    x = torch.randn(1, 2, 2, dtype=torch.float64)
    got = lap_ext.scores(model, x, layers="*")
    bare = qkvo(plain)
    bare.load_state_dict(model.state_dict())
    expected = distortions(bare, x, **LAST)
    for layer, score in got.items():
        torch.testing.assert_close(score, expected[layer], rtol=RTOL, atol=0)


@pytest.mark.parametrize("name", list(ATTENTION))
def test_attention(name: str) -> None:
    model, positions = ATTENTION[name]()
    check(model, torch.randn(1, positions, 2, dtype=torch.float64), **LAST)


@pytest.mark.parametrize("rule", [rotary, interleaved, partly])
def test_rotary_positions(rule: Any) -> None:
    """The two features of a rotated pair are swapped: the squares of both count one half."""
    check(qkvo(rule, 8, 8), torch.randn(1, 4, 2, dtype=torch.float64), pairs="mean", **LAST)


def test_language_model_with_rotary_positions() -> None:
    def gains(*names: str, width: int) -> dict[str, Any]:
        return {name: nn.Parameter(torch.empty(width)) for name in names}

    def block() -> Net:
        layers = {"q": square(4, 4), "k": square(2, 4), "v": square(2, 4), "o": square(4, 4)}
        gated = {"gate": square(3, 4), "up": square(3, 4), "down": square(4, 3)}
        return Net(
            qwen, **layers, **gated, **gains("n1", "n2", width=4), **gains("nq", "nk", width=2)
        )

    blocks = nn.ModuleList(block() for _ in range(2))
    model = Net(qwen, tokens=nn.Embedding(5, 4), blocks=blocks, **gains("norm", width=4))
    check(model, torch.tensor([[3, 1, 0, 1]]), pairs="mean", **LAST)


def test_cross_attention() -> None:
    """q from one stream, k and v from another."""

    def rule(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = m.a(x), m.b(y)
        q, k, v = heads(m.q(x)), heads(m.k(y)), heads(m.v(y))
        return m.tail(x + m.o(joined(F.scaled_dot_product_attention(q, k, v))))

    layers = {"a": square(3, 2), "b": square(5, 2), "k": square(4, 5), "v": square(4, 5)}
    model = Net(rule, q=square(4, 3), o=square(3, 4), tail=square(2, 3), **layers)
    x, y = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    check(model, x, y, **LAST)


def test_language_model() -> None:
    """Embeddings, two pre-norm blocks (packed attention; grouped heads and a gate), a tied head."""

    def rule(m: Any, tokens: Tensor) -> Tensor:
        x = m.tokens(tokens) + m.places(torch.arange(tokens.shape[1])[None])
        x = x + split(m, m.n1(x))
        x = x + m.down(F.gelu(m.up(m.n2(x))))
        x = x + grouped(m.attn, m.n3(x))
        h = m.n4(x)
        x = x + m.out(F.silu(m.gate(h)) * m.into(h))
        return m.lm_head(m.n5(x))

    norms = {f"n{i}": nn.RMSNorm(4) if i > 2 else nn.LayerNorm(4) for i in range(1, 6)}
    model = Net(
        rule,
        tokens=nn.Embedding(5, 4),
        places=nn.Embedding(4, 4),
        qkv=square(12, 4),
        o=square(),
        up=square(3, 4),
        down=square(4, 3),
        gate=square(3, 4),
        **{"into": square(3, 4), "out": square(4, 3), "attn": nn.Module(), **norms},
        lm_head=nn.Linear(4, 5, bias=False),
    )
    for name, out, into in (("q", 8, 4), ("k", 4, 4), ("v", 4, 4), ("o", 4, 8)):
        setattr(model.attn, name, square(out, into))
    model.lm_head.weight = model.tokens.weight
    check(model, torch.tensor([[3, 1, 0, 1]]), **LAST)


def test_vision_transformer() -> None:
    """Patches of an image become tokens after a class token; the head reads a patch's position."""

    def rule(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], dim=1) + m.pos
        x = x + unbound(m, m.n1(x))
        x = x + m.down(F.gelu(m.up(m.n2(x))))
        return m.head(m.n3(x)[:, -1])

    layers = {"patch": nn.Conv2d(2, 4, 2, stride=2), "qkv": square(12), "o": square()}
    mlp = {"up": square(5), "down": square(4, 5), "head": square(2)}
    norms = {f"n{i}": nn.LayerNorm(4) for i in (1, 2, 3)}
    tokens = {"cls": nn.Parameter(torch.ones(1, 1, 4)), "pos": nn.Parameter(torch.ones(1, 3, 4))}
    check(
        Net(rule, **layers, **mlp, **norms, **tokens), torch.randn(1, 2, 2, 4, dtype=torch.float64)
    )


def test_multi_head_attention_module() -> None:
    """Its packed in-projection is a parameter of its own; the norms come after the sums."""

    def rule(m: Any, x: Tensor) -> Tensor:
        x = m.head(x)
        x = m.n1(x + m.attn(x, x, x, need_weights=False)[0])
        return m.tail(m.n2(x + m.down(F.relu(m.up(x)))))

    layers = {"head": square(4, 2), "up": square(5, 4), "down": square(4, 5), "tail": square(2, 4)}
    norms = {"n1": nn.LayerNorm(4), "n2": nn.LayerNorm(4)}
    model = Net(rule, attn=nn.MultiheadAttention(4, 2, batch_first=True), **layers, **norms)
    check(model, torch.randn(1, 2, 2, dtype=torch.float64), **LAST)


def test_weights_kept_as_in_out() -> None:
    """GPT-2's block, and a parameter that is multiplied from the right."""

    def rule(m: Any, x: Tensor) -> Tensor:
        x = m.head(x)
        x = x + split(m, m.n(x))
        x = x + m.down(F.gelu(m.up(x)))
        return x @ m.tail

    layers = {"qkv": Conv1D(12, 3), "o": Conv1D(3, 4), "up": Conv1D(5, 3), "down": Conv1D(3, 5)}
    tail = nn.Parameter(torch.empty(3, 2))
    model = Net(rule, head=Conv1D(3, 2), n=nn.LayerNorm(3), tail=tail, **layers)
    check(model, torch.randn(1, 2, 2, dtype=torch.float64), **LAST)
