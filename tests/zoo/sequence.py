# SPDX-License-Identifier: MIT
"""Recurrent nets and transformers in plain torch: what people write themselves.

LSTM, GRU and RNN classifiers, a CRNN, TextCNN, a gated temporal convolution; torch's own
transformer modules; a GPT with a tied head; a decoder with rotary positions, grouped queries and
SwiGLU; the same with a mixture of experts (Mixtral), dispatched densely: every expert sees every
token, and a [tokens, experts] matrix that is zero outside the chosen ones weighs the results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from tests.zoo.common import Entry, entry, images

VOCABULARY = 11


def tokens(length: int = 6) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length))


class Recurrent(nn.Module):
    """Embedding, recurrent layers, a linear head on the last step or on the mean over steps."""

    def __init__(self, cell: type[nn.RNNBase], mean: bool = False, **options: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5, padding_idx=0)
        self.rnn = cell(5, 4, batch_first=True, **options)
        self.dropout = nn.Dropout(0.5)
        self.mean = mean
        width = options.get("proj_size", 4)
        self.fc = nn.Linear(width * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T]
        y, _ = self.rnn(self.embedding(x))
        y = y.mean(dim=1) if self.mean else y[:, -1, :]
        return self.fc(self.dropout(y))


class LastState(nn.Module):
    """A bidirectional LSTM read through its final states: [h_forward, h_backward] of layer 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.lstm = nn.LSTM(5, 4, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T]
        _, (h, _) = self.lstm(self.embedding(x.t()))  # h [4, N, 4]
        return self.fc(torch.cat((h[-2], h[-1]), dim=1))


class CRNN(nn.Module):
    """Text recognition: the columns of a feature map, C * H values each, through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(4 * 3, 5, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(10, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, 6, 16]
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)  # [N, 4, 3, 8]
        n, channels, height, width = x.shape
        x = x.permute(0, 3, 1, 2).reshape(n, width, channels * height)
        return self.fc(self.lstm(x)[0])


class TextCNN(nn.Module):
    """Convolutions of three widths over an embedded text, maximum over time, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.convs = nn.ModuleList(nn.Conv1d(5, 3 + k, k) for k in (2, 3, 4))
        self.fc = nn.Linear(5 + 6 + 7, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T]
        x = self.embedding(x).transpose(1, 2)  # [N, 5, T]
        return self.fc(torch.cat([F.relu(conv(x)).amax(dim=2) for conv in self.convs], dim=1))


class WaveNet(nn.Module):
    """Causal dilated convolutions, tanh * sigmoid halves, a residual and a skip output each."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(1, 4, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(4, 6, 2, dilation=2**i) for i in range(2))
        self.out = nn.ModuleList(nn.Conv1d(3, 4 + 5, 1) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(5, 10, 1), nn.GLU(dim=1), nn.Conv1d(5, 2, 1))

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, T]
        x = self.inlet(x)
        skips: list[Tensor] = []
        for i, (dilated, out) in enumerate(zip(self.dilated, self.out, strict=True)):
            a, b = dilated(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            residual, skip = torch.split(out(torch.tanh(a) * torch.sigmoid(b)), [4, 5], dim=1)
            x = x + residual
            skips.append(skip)
        return self.head(torch.stack(skips).sum(dim=0))


class Encoder(nn.Module):
    """nn.TransformerEncoder on embedded tokens with learned positions and a padding mask."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.position = nn.Parameter(torch.randn(6, 8) * 0.1)
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T]
        y = self.embedding(x) * 8**0.5 + self.position
        return self.fc(self.encoder(y, src_key_padding_mask=x == 0).mean(dim=1))


class Translator(nn.Module):
    """nn.Transformer: encoder, decoder with cross attention and a causal mask, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, 8), nn.Embedding(9, 8)
        self.transformer = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
        self.head = nn.Linear(8, 9, bias=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:  # [N, S], [N, T]
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.transformer(
            self.source(source), self.target(target), tgt_mask=mask, tgt_is_causal=True
        )
        return self.head(y)


class CrossAttention(nn.Module):
    """Learned queries over keys and values of their own widths: three separate in-projections."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.keys, self.values = nn.Linear(5, 6), nn.Linear(5, 7)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=7, batch_first=True)
        self.fc = nn.Linear(3 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 5]
        queries = self.queries.unsqueeze(0).expand(x.shape[0], -1, -1)
        y, weights = self.attention(queries, self.keys(x), self.values(x))
        return self.fc(y.flatten(1)) + weights.mean()


class NanoGPT(nn.Module):
    """One packed qkv, split in three; the head's weight is the embedding's."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(16, width)
        self.ln_1, self.ln_2, self.ln_f = (nn.LayerNorm(width, bias=False) for _ in range(3))
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.fc_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:  # [N, T]
        n, length = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(length, device=ids.device))
        width = x.shape[-1]
        q, k, v = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(n, length, width))
        x = x + self.fc_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))
        return self.lm_head(self.ln_f(x))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x.float() * norm).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: channel d is turned together with channel d + half."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class GroupedQuery(nn.Module):
    """Rotary attention; query heads 0 and 1 read key/value head 0, heads 2 and 3 head 1.

    The heads are repeated, or, native, the attention operator is told to do so.
    """

    def __init__(self, width: int, native: bool) -> None:
        super().__init__()
        heads, kv_heads, head_width = 4, 2, 4
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.native = native
        self.wq = nn.Linear(width, heads * head_width, bias=False)
        self.wk = nn.Linear(width, kv_heads * head_width, bias=False)
        self.wv = nn.Linear(width, kv_heads * head_width, bias=False)
        self.wo = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, C]
        n, length, _ = x.shape
        half = torch.arange(0, self.head_width, 2) / self.head_width
        angle = torch.outer(torch.arange(length), 10000.0**-half).repeat(1, 2)  # [T, D]
        q = self.wq(x).view(n, length, self.heads, self.head_width).transpose(1, 2)
        k = self.wk(x).view(n, length, self.kv_heads, self.head_width).transpose(1, 2)
        v = self.wv(x).view(n, length, self.kv_heads, self.head_width).transpose(1, 2)
        q, k = rotate(q, angle.cos(), angle.sin()), rotate(k, angle.cos(), angle.sin())
        if not self.native:
            repeats = self.heads // self.kv_heads
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.native)
        return self.wo(y.transpose(1, 2).reshape(n, length, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); fused: gate and up are the halves of one layer."""

    def __init__(self, width: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.w1 = nn.Linear(width, 2 * hidden if fused else hidden, bias=False)
        self.w3 = None if fused else nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).chunk(2, dim=-1) if self.w3 is None else (self.w1(x), self.w3(x))
        return self.w2(F.silu(gate) * up)


class Experts(nn.Module):
    """Mixtral's block: the top 2 of 3 experts, weights [E, O, I], dispatched densely."""

    def __init__(self, width: int, hidden: int, einsum: bool, experts: int = 3) -> None:
        super().__init__()
        self.einsum = einsum
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, width) * width**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, C]
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # [N * T, C]
        chance = F.softmax(self.router(x), dim=-1)
        top, chosen = torch.topk(chance, 2, dim=-1)
        top = top / top.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(chance).scatter(1, chosen, top)  # [N * T, E]
        if self.einsum:
            gate, up = torch.einsum("tc,eoc->teo", x, self.gate_up_proj).chunk(2, dim=-1)
            y = torch.einsum("teh,eoh->teo", F.silu(gate) * up, self.down_proj)
            return torch.einsum("te,teo->to", weights, y).reshape(shape)
        x = x.expand(weights.shape[1], -1, -1)  # [E, N * T, C]
        gate, up = torch.bmm(x, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.down_proj.transpose(1, 2))
        return (y * weights.t().unsqueeze(-1)).sum(dim=0).reshape(shape)


class Decoder(nn.Module):
    """Two blocks: x + attention(norm(x)), x + feed_forward(norm(x)); norm, untied head."""

    def __init__(self, feed_forward: list[nn.Module], width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.attention = nn.ModuleList(
            GroupedQuery(width, native=i > 0) for i in range(len(feed_forward))
        )
        self.feed_forward = nn.ModuleList(feed_forward)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(2 * len(feed_forward)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # [N, T]
        x = self.embed(ids)
        for i, (attention, ff) in enumerate(zip(self.attention, self.feed_forward, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + ff(self.norms[2 * i + 1](x))
        return self.head(self.norm(x))


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(7, 6), nn.Linear(6, 5)
        self.weight = nn.Parameter(torch.randn(4, 6))  # [code, 6]

    def forward(self, x: Tensor) -> Tensor:  # [N, 7]
        code = F.linear(self.inlet(x).relu(), self.weight).sigmoid()
        return self.outlet(F.linear(code, self.weight.t()))


def text(name: str, build: Callable[[], nn.Module]) -> Entry:
    """An entry whose argument is two sequences of six token ids."""
    return entry(name, lambda: (build(), (tokens(),), {}))


ENTRIES: list[Entry] = [
    text("lstm", lambda: Recurrent(nn.LSTM)),
    text("lstm_bidirectional", lambda: Recurrent(nn.LSTM, True, num_layers=2, bidirectional=True)),
    # float64: oneDNN warns that it has no projections in float32
    text("lstm_projected", lambda: Recurrent(nn.LSTM, proj_size=3).double()),
    text("lstm_last_state", LastState),
    text("gru", lambda: Recurrent(nn.GRU, num_layers=2)),
    text("gru_bidirectional", lambda: Recurrent(nn.GRU, True, bidirectional=True)),
    text("rnn", lambda: Recurrent(nn.RNN)),
    images("crnn", CRNN, 1, 6, 16),
    text("textcnn", TextCNN),
    images("wavenet", WaveNet, 1, 10),
    text("transformer_encoder", lambda: Encoder(norm_first=False)),
    text("transformer_encoder_prenorm", lambda: Encoder(norm_first=True)),
    entry("transformer", lambda: (Translator(), (tokens(), torch.randint(0, 9, (2, 5))), {})),
    images("cross_attention", CrossAttention, 4, 5),
    text("nano_gpt", NanoGPT),
    text("decoder_gqa", lambda: Decoder([SwiGLU(6, 9, False), SwiGLU(6, 9, True)])),
    text("moe_einsum", lambda: Decoder([Experts(6, 5, einsum=True) for _ in range(2)])),
    text("moe_bmm", lambda: Decoder([Experts(6, 5, einsum=False) for _ in range(2)])),
    images("tied_autoencoder", TiedAutoencoder, 7),
]
