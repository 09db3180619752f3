# SPDX-License-Identifier: MIT
"""Whole models in their true sizes with random weights, and what their users do today.

resnet50: 25.5 M weights, float32. transformer_1b: a Llama-shaped decoder, 1.1 G weights, bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import lap_ext
from benchmarks import baselines, cases
from benchmarks.paper import nets
from lap_ext.criteria.context import Network
from lap_ext.options import Scope

SPARSITY = 0.9


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Applies causal attention over [batch, tokens, width]."""
        q, k, v = (
            f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """One block: attention, then SwiGLU, each behind an RMSNorm and around a skip."""

    def __init__(self, width: int, inner: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, groups)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block to [batch, tokens, width]."""
        x = x + self.attention(self.norm(x))
        y = self.norm_mlp(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """A decoder-only language model without position embeddings."""

    def __init__(self, vocabulary: int, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Decoder(width, inner, 32, 8) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of [batch, tokens]."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def resnet50(quick: bool) -> tuple[nn.Module, Tensor]:
    """Makes the ResNet-50 for ImageNet but for its stem's window; quick: ResNet-18's widths."""
    blocks = (1, 1, 1, 1) if quick else (3, 4, 6, 3)
    net = nets.resnet(blocks, bottleneck=True, classes=1000, stride=2)
    return net.eval(), torch.randn(1, 3, 64, 64)


def transformer_1b(quick: bool) -> tuple[nn.Module, Tensor]:
    """Makes a decoder of 1.1 G weights in bfloat16; quick: 4 M."""
    sizes = (1000, 256, 512, 2) if quick else (32000, 2048, 8192, 16)
    with torch.device("meta"):
        net = Transformer(*sizes)
    net = net.to(torch.bfloat16).to_empty(device="cpu")
    source = torch.Generator().manual_seed(cases.SEED)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=source)
            else:
                parameter.fill_(1.0)
    return net.eval(), torch.zeros(1, 8, dtype=torch.int64)


MODELS: dict[str, Callable[[bool], tuple[nn.Module, Tensor]]] = {
    "resnet50": resnet50,
    "transformer_1b": transformer_1b,
}


def keeps(topology: lap_ext.Topology) -> dict[str, int]:
    """Counts what each layer keeps."""
    return {
        name: cases.keep_of(SPARSITY, layer.weight.numel())
        for name, layer in topology.layers.items()
    }


def ours(topology: lap_ext.Topology, scope: Scope = "layer", criterion: str = "lookahead") -> Any:
    """Makes the masks of all layers by lap_ext.prune."""
    result = lap_ext.prune(
        topology.model,
        None,
        SPARSITY,
        topology=topology,
        scope=scope,
        criterion=criterion,
        apply=False,
    )
    return list(result.masks.values())


def eager(topology: lap_ext.Topology, network: Network) -> list[Tensor]:
    """Computes norms, scores and topk in PyTorch; the trace tells for free how channels meet."""
    kept, masks = keeps(topology), []
    for layer in topology.layers.values():
        weight, role = layer.weight.detach(), layer.roles[0]
        torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())))
        torch.linalg.vector_norm(weight, dim=(0, *range(2, weight.dim())))
        norms = [x.float() for x in network.norms(role)]
        into, out = norms[::-1] if role.part.transposed else norms
        score = baselines.eager_score_from_norms(weight.float(), into, out)
        masks.append(baselines.topk(score, kept[layer.name]))
    return masks


def public_code(topology: lap_ext.Topology, _: Network) -> list[Tensor]:
    """Runs the public code's procedure: one producer and one consumer a layer, no skips."""
    kept, masks = keeps(topology), []
    for layer in topology.layers.values():
        weight = layer.weight.detach()
        ones = weight.new_ones(weight.shape[1], 1), weight.new_ones(1, weight.shape[0])
        before, after = (
            [topology.layers[edge.name].weight.detach() for edge in edges if edge.kind == "layer"]
            for edges in (layer.prev, layer.next)
        )
        w_prev = next((w for w in before if w.shape[0] == weight.shape[1]), ones[0])
        w_next = next((w for w in after if w.shape[1] == weight.shape[0]), ones[1])
        masks.append(baselines.public_code(w_prev, weight, w_next, kept[layer.name]))
    return masks
