# SPDX-License-Identifier: MIT
"""Small convolutional networks: depthwise layers, gates, shuffled channels.

MobileNet V1, V2 and V3, EfficientNet (stochastic depth, off in eval mode), ShuffleNet v1 (grouped
1x1 convolutions, a shuffle between them) and v2 (split, concatenation, shuffle), GhostNet
(channels made from channels).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.common import ConvBN, Entry, SqueezeExcite, images


def head(c_in: int, dropout: float = 0.2) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(c_in, 5)]


def mobilenet_v1() -> nn.Module:
    return nn.Sequential(
        ConvBN(3, 4, 3, 2),
        *(ConvBN(4, 4, 3, groups=4), ConvBN(4, 6, 1)),
        *(ConvBN(6, 6, 3, 2, groups=6), ConvBN(6, 8, 1)),
        ConvBN(8, 16, 3, groups=8),  # two filters a channel
        *(ConvBN(16, 8, 1), *head(8)),
    )


class InvertedResidual(nn.Module):
    """Expand, depthwise, (squeeze-excite), project; a skip where the shape is kept."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        expand: int,
        act: type[nn.Module] = nn.ReLU6,
        gate: type[nn.Module] | None = None,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        hidden = c_in * expand
        layers: list[nn.Module] = [] if expand == 1 else [ConvBN(c_in, hidden, 1, act=act)]
        layers += [ConvBN(hidden, hidden, kernel, stride, hidden, act=act)]
        if gate is not None:
            squeeze_act = nn.SiLU if act is nn.SiLU else nn.ReLU
            layers += [SqueezeExcite(hidden, max(2, hidden // 4), squeeze_act, gate)]
        layers += [ConvBN(hidden, c_out, 1, act=None)]
        self.block = nn.Sequential(*layers)
        self.skip = stride == 1 and c_in == c_out
        self.drop_path = DropPath(0.2) if act is nn.SiLU else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.block(x)) if self.skip else self.block(x)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a whole sample's branch."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.p
        return x * keep / (1 - self.p)


def mobilenet_v2() -> nn.Module:
    return nn.Sequential(
        ConvBN(3, 4, 3, 2, act=nn.ReLU6),
        InvertedResidual(4, 3, 1, 1),
        InvertedResidual(3, 5, 2, 3),
        InvertedResidual(5, 5, 1, 3),
        *(ConvBN(5, 12, 1, act=nn.ReLU6), *head(12)),
    )


def mobilenet_v3() -> nn.Module:
    hard = {"act": nn.Hardswish, "gate": nn.Hardsigmoid}
    return nn.Sequential(
        ConvBN(3, 4, 3, 2, act=nn.Hardswish),
        InvertedResidual(4, 4, 1, 1, nn.ReLU),
        InvertedResidual(4, 6, 2, 3, nn.ReLU, nn.Hardsigmoid, kernel=5),
        InvertedResidual(6, 6, 1, 3, **hard, kernel=5),
        InvertedResidual(6, 8, 2, 2, **hard),
        ConvBN(8, 12, 1, act=nn.Hardswish),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(12, 14), nn.Hardswish(), nn.Dropout(), nn.Linear(14, 5)),
    )


def efficientnet() -> nn.Module:
    swish = {"act": nn.SiLU, "gate": nn.Sigmoid}
    return nn.Sequential(
        ConvBN(3, 4, 3, 2, act=nn.SiLU),
        InvertedResidual(4, 3, 1, 1, **swish),
        InvertedResidual(3, 5, 2, 4, **swish),
        InvertedResidual(5, 5, 1, 4, **swish, kernel=5),
        *(ConvBN(5, 12, 1, act=nn.SiLU), *head(12)),
    )


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel j goes to (j % (C / groups)) * groups + j // (C / groups)."""
    n, channels, height, width = x.size()
    x = x.view(n, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(n, channels, height, width)


class ShuffleV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1; stride 2 joins the pooled input instead."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int = 2) -> None:
        super().__init__()
        self.stride = stride
        c_branch = c_out - c_in if stride == 2 else c_out
        width = c_out // 2
        self.conv1 = ConvBN(c_in, width, 1, groups=groups)
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = ConvBN(width, width, 3, stride, width, act=None)
        self.conv3 = ConvBN(width, c_branch, 1, groups=groups, act=None)
        self.pool = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(self.conv2(self.shuffle(self.conv1(x))))
        out = torch.cat([self.pool(x), out], 1) if self.stride == 2 else x + out
        return torch.relu(out)


class ShuffleV2(nn.Module):
    """Half of the channels pass by (stride 1) or through a branch of their own; then a shuffle."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        half = c_out // 2
        self.branch1 = None
        if stride == 2:
            self.branch1 = nn.Sequential(
                ConvBN(c_in, c_in, 3, 2, c_in, act=None), ConvBN(c_in, half, 1)
            )
        self.branch2 = nn.Sequential(
            ConvBN(c_in if stride == 2 else half, half, 1),
            ConvBN(half, half, 3, stride, half, act=None),
            ConvBN(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is None:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return shuffle(out, 2)


def shufflenet_v1() -> nn.Module:
    blocks = [ShuffleV1(4, 12, 2), ShuffleV1(12, 12, 1)]
    return nn.Sequential(ConvBN(3, 4, 3, 2), *blocks, *head(12))


def shufflenet_v2() -> nn.Module:
    blocks = [ShuffleV2(4, 8, 2), ShuffleV2(8, 8, 1), ShuffleV2(8, 8, 1)]
    stem = [ConvBN(3, 4, 3, 2), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, ConvBN(8, 10, 1), *head(10))


class Ghost(nn.Module):
    """Some channels by a 1x1 convolution, as many again from each of them, cut to c_out."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.c_out = c_out
        width = (c_out + 1) // 2
        self.primary = ConvBN(c_in, width, 1)
        self.cheap = ConvBN(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        out = torch.cat([primary, self.cheap(primary)], dim=1)
        return out[:, : self.c_out, :, :]


def ghostnet() -> nn.Module:
    return nn.Sequential(ConvBN(3, 4, 3, 2), Ghost(4, 7), Ghost(7, 6), *head(6))


ENTRIES: list[Entry] = [
    images("mobilenet_v1", mobilenet_v1, 3, 16, 16),
    images("mobilenet_v2", mobilenet_v2, 3, 16, 16),
    images("mobilenet_v3", mobilenet_v3, 3, 32, 32),
    images("efficientnet", efficientnet, 3, 16, 16),
    images("shufflenet_v1", shufflenet_v1, 3, 16, 16),
    images("shufflenet_v2", shufflenet_v2, 3, 32, 32),
    images("ghostnet", ghostnet, 3, 16, 16),
]
