# SPDX-License-Identifier: MIT
"""Residual convolutional networks: what a skip carries, and through what.

Identity and projection shortcuts (basic and bottleneck blocks), option A (strided slice, padded
with zero channels), ResNet-D (pooled projection), pre-activation (WRN), groups (ResNeXt), groups
with squeeze-excite (RegNet).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from tests.zoo.common import ConvBN, Entry, SqueezeExcite, images

Block = Callable[[int, int, int], nn.Module]  # c_in, c_out, stride


class Basic(nn.Module):
    """Two 3x3 convolutions; a projection where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = ConvBN(c_in, c_out, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (in groups), 1x1 to four times the width; pooled: ResNet-D's shortcut."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, groups: int = 1, pooled: bool = False
    ) -> None:
        super().__init__()
        width = c_out // 4 * (2 if groups > 1 else 1)
        self.conv1 = ConvBN(c_in, width, 1)
        self.conv2 = ConvBN(width, width, 3, stride, groups)
        self.conv3 = ConvBN(width, c_out, 1, act=None)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if pooled and stride != 1:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(pool, ConvBN(c_in, c_out, 1, act=None))
        elif stride != 1 or c_in != c_out:
            self.downsample = ConvBN(c_in, c_out, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


class OptionA(nn.Module):
    """CIFAR's parameter-free shortcut: every second position, zero channels on both sides."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(c_in, c_out, 3, stride)
        self.conv2 = ConvBN(c_out, c_out, 3, act=None)
        self.stride = stride
        self.pad = (c_out - c_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class PreActivation(nn.Module):
    """WRN: norm and ReLU before each convolution; a projection reads the activated input."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(0.3)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(out)))))
        return torch.add(out, skip)


class RegNetY(nn.Module):
    """1x1, 3x3 in groups, squeeze-excite, 1x1; a projection where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int, group_width: int = 2) -> None:
        super().__init__()
        self.proj = None
        if stride != 1 or c_in != c_out:
            self.proj = ConvBN(c_in, c_out, 1, stride, act=None)
        self.a = ConvBN(c_in, c_out, 1)
        self.b = ConvBN(c_out, c_out, 3, stride, groups=c_out // group_width)
        self.se = SqueezeExcite(c_out, max(1, c_in // 4))
        self.c = ConvBN(c_out, c_out, 1, act=None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.c(self.se(self.b(self.a(x))))
        return F.relu((x if self.proj is None else self.proj(x)) + out)


class Residual(nn.Module):
    """Stem, stages of two blocks (the first of all but one stage with stride 2), mean, head."""

    def __init__(
        self,
        block: Block,
        widths: list[int],
        stem: int,
        pooled_stem: bool = False,
        last_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvBN(3, stem, 7, 2) if pooled_stem else ConvBN(3, stem, 3)]
        layers += [nn.MaxPool2d(3, 2, 1)] if pooled_stem else []
        self.stem = nn.Sequential(*layers)
        stages = []
        for i, width in enumerate(widths):
            first = block(stem, width, 1 if i == 0 else 2)
            stages.append(nn.Sequential(first, block(width, width, 1)))
            stem = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Sequential(nn.BatchNorm2d(stem), nn.ReLU()) if last_norm else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(stem, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, H, W]
        x = self.avgpool(self.norm(self.stages(self.stem(x))))
        return self.fc(torch.flatten(x, 1))


def wrn() -> nn.Module:
    """The stem is a bare convolution: its norm is the first block's."""
    model = Residual(PreActivation, [8, 12], stem=4, last_norm=True)
    model.stem = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
    return model


def resnet_d() -> nn.Module:
    model = Residual(partial(Bottleneck, pooled=True), [8, 12], stem=6)
    model.stem = nn.Sequential(
        ConvBN(3, 4, 3, 2), ConvBN(4, 4), ConvBN(4, 6), nn.MaxPool2d(3, 2, 1)
    )
    return model


def resnext() -> nn.Module:
    return Residual(
        lambda i, o, s: Bottleneck(i, o, s, groups=2), [8, 12], stem=4, pooled_stem=True
    )


ENTRIES: list[Entry] = [
    images("resnet_basic", lambda: Residual(Basic, [4, 6, 8], 4, pooled_stem=True), 3, 32, 32),
    images("resnet_bottleneck", lambda: Residual(Bottleneck, [8, 12], 4, True), 3, 32, 32),
    images("resnet_option_a", lambda: Residual(OptionA, [4, 8, 12], stem=4), 3, 16, 16),
    images("resnet_d", resnet_d, 3, 32, 32),
    images("wrn", wrn, 3, 16, 16),
    images("resnext", resnext, 3, 32, 32),
    images("regnet", lambda: Residual(RegNetY, [4, 8], stem=6), 3, 16, 16),
]
