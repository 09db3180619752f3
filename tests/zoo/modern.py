# SPDX-License-Identifier: MIT
"""Vision networks built on linear layers: channels move between the second and the last dimension.

ConvNeXt (permutes, LayerNorm, layer scale), ViT with its own packed qkv (timm's layout) and with
nn.MultiheadAttention (torchvision's), Swin (roll, windows, relative position bias, mask, patch
merging), MLP-Mixer (tokens and channels change roles).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from tests.zoo.common import Entry, images


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, MLP with channels last, layer scale, skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)  # [N, H, W, C]
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """4x4 patches, one block, 2x2 down, two blocks, mean, LayerNorm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 4, 4), LayerNorm2d(4))
        self.stage1 = ConvNeXtBlock(4)
        self.down = nn.Sequential(LayerNorm2d(4), nn.Conv2d(4, 6, 2, 2))
        self.stage2 = nn.Sequential(ConvNeXtBlock(6), ConvNeXtBlock(6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 16, 16]
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


class Attention(nn.Module):
    """timm's: one qkv layer, rows (3, heads, head width); scaled dot product or by hand."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, C]
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, T, D]
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            q = q * q.shape[-1] ** -0.5
            x = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


def feed_forward(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(), nn.Linear(hidden, width), nn.Dropout()
    )


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP, each with a layer scale."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, fused)
        self.mlp = feed_forward(width, 2 * width + 1)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class MHABlock(nn.Module):
    """torchvision's encoder block around nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.mlp = feed_forward(width, 2 * width + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    """Patches, class token first, position embedding, blocks, norm, the class token's head."""

    def __init__(self, blocks: list[nn.Module], width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 2 * 3, width) * 0.02)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 8, 12]
        x = self.patch(x).flatten(2).transpose(1, 2)  # [N, 6, C]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0])


def vit(fused: bool) -> nn.Module:
    return ViT([ViTBlock(8, 2, fused), ViTBlock(8, 2, fused)])


def vit_mha() -> nn.Module:
    return ViT([MHABlock(8, 2), MHABlock(8, 2)])


class WindowAttention(nn.Module):
    """Attention inside windows of W tokens, a learned bias per relative position."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + window - 1  # [2, W, W]
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # [N * windows, W, C]
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = (q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.bias_table[self.index.view(-1)].view(tokens, tokens, -1)
        logits = logits + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:  # [windows, W, W]
            windows = mask.shape[0]
            logits = logits.view(n // windows, windows, self.heads, tokens, tokens)
            logits = logits + mask.unsqueeze(1).unsqueeze(0)
            logits = logits.view(-1, self.heads, tokens, tokens)
        x = logits.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


def to_windows(x: Tensor, window: int) -> Tensor:
    """[N, H, W, C] -> [N * windows, window * window, C]."""
    n, height, width, channels = x.shape
    x = x.view(n, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, channels)


def from_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of to_windows."""
    n = x.shape[0] // (height * width // window**2)
    x = x.view(n, height // window, width // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(n, height, width, -1)


class SwinBlock(nn.Module):
    """Window attention, shifted or not; the shift masks what was not adjacent."""

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.mlp = feed_forward(width, 2 * width)
        mask = None
        if shift:
            areas = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            labels = torch.zeros(1, size, size, 1)
            for i, rows in enumerate(areas):
                for j, columns in enumerate(areas):
                    labels[:, rows, columns] = 3 * i + j
            label = to_windows(labels, window).squeeze(-1)  # [windows, W]
            mask = torch.where(label.unsqueeze(1) == label.unsqueeze(2), 0.0, -100.0)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:  # [N, H * W, C]
        n, tokens, width = x.shape
        y = self.norm1(x).view(n, self.size, self.size, width)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = self.attn(to_windows(y, self.window), self.mask)
        y = from_windows(y, self.window, self.size, self.size)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + y.view(n, tokens, width)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighboring tokens side by side, normed, to twice the width."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [N, H * W, C]
        n, _, width = x.shape
        x = x.view(n, self.size, self.size, width)
        corners = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        x = torch.cat(corners, -1).view(n, -1, 4 * width)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    """8x8 tokens of width 6, windows of 4, one shifted; merged to 4x4 of width 12; mean, head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, 2)
        self.norm0 = nn.LayerNorm(6)
        self.stage1 = nn.Sequential(SwinBlock(6, 2, 8, 4, 0), SwinBlock(6, 2, 8, 4, 2))
        self.merge = PatchMerging(6, 8)
        self.stage2 = SwinBlock(12, 3, 4, 4, 0)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 16, 16]
        x = self.norm0(self.patch(x).flatten(2).transpose(1, 2))
        x = self.norm(self.stage2(self.merge(self.stage1(x))))
        x = F.adaptive_avg_pool1d(x.transpose(1, 2), 1)  # [N, C, 1]
        return self.head(torch.flatten(x, 1))


class MixerBlock(nn.Module):
    """An MLP over the tokens of each channel, then one over the channels of each token."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mlp, self.channel_mlp = feed_forward(tokens, 5), feed_forward(width, 9)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, C]
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer: six tokens of width 8, two blocks, mean over the tokens, head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(6, 8), MixerBlock(6, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 8, 12]
        x = self.blocks(self.patch(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))


ENTRIES: list[Entry] = [
    images("convnext", ConvNeXt, 3, 16, 16),
    images("vit_sdpa", lambda: vit(fused=True), 3, 8, 12),
    images("vit_by_hand", lambda: vit(fused=False), 3, 8, 12),
    images("vit_mha", vit_mha, 3, 8, 12),
    images("swin", Swin, 3, 16, 16),
    images("mixer", Mixer, 3, 8, 12),
]
