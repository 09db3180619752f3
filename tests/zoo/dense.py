# SPDX-License-Identifier: MIT
"""Networks of concatenations: a channel's index depends on what was put before it.

DenseNet (each layer reads all before it through its own batch norm), GoogLeNet (four branches),
Inception-v3 (factored convolutions, a branch that splits again), SqueezeNet, U-Net (skips into
the decoder, transposed convolutions or up-sampling), a feature pyramid (sums at several sizes).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from tests.zoo.common import ConvBN, Entry, images


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 to four times the growth; norm, ReLU, 3x3 to the growth."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.2)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.dropout(self.conv2(self.relu(self.norm2(x))))


class DenseBlock(nn.Module):
    """Every layer reads the input and the outputs of all layers before it."""

    def __init__(self, layers: int, c_in: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(c_in + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Growth 3: 4 -> 13 channels, halved to 6 by the transition, -> 12, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBN(3, 4, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.block1 = DenseBlock(3, 4, growth=3)
        self.transition = nn.Sequential(
            *(nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 6, 1, bias=False), nn.AvgPool2d(2, 2))
        )
        self.block2 = DenseBlock(2, 6, growth=3)
        self.norm = nn.BatchNorm2d(12)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32]
        x = self.block2(self.transition(self.block1(self.stem(x))))
        x = F.adaptive_avg_pool2d(F.relu(self.norm(x), inplace=True), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class Inception(nn.Module):
    """1x1 · 1x1 then 3x3 · 1x1 then 5x5 · pool then 1x1, joined."""

    def __init__(self, c_in: int, one: int, three: tuple[int, int], five: tuple[int, int]) -> None:
        super().__init__()
        self.branch1 = ConvBN(c_in, one, 1)
        self.branch2 = nn.Sequential(ConvBN(c_in, three[0], 1), ConvBN(*three, 3))
        self.branch3 = nn.Sequential(ConvBN(c_in, five[0], 1), ConvBN(*five, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), ConvBN(c_in, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
        return torch.cat(branches, 1)


class GoogLeNet(nn.Module):
    """A plain stem, two inception modules with a pool between, dropout, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBN(3, 4, 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.inception1 = Inception(4, 2, (3, 4), (1, 3))  # 2 + 4 + 3 + 2 = 11
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception2 = Inception(11, 3, (4, 5), (2, 3))  # 3 + 5 + 3 + 2 = 13
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32]
        x = self.inception2(self.pool(self.inception1(self.stem(x))))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


class InceptionV3(nn.Module):
    """A module of factored 7x7 convolutions, a reduction, one whose branch splits again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 6, 3, 2)
        self.c1 = ConvBN(6, 3, 1)
        self.c7 = nn.Sequential(ConvBN(6, 2, 1), ConvBN(2, 3, (1, 7)), ConvBN(3, 4, (7, 1)))
        self.cpool = ConvBN(6, 2, 1)
        self.down = ConvBN(9, 5, 3, 2)  # joined with the 9 pooled channels: 14
        self.e = ConvBN(14, 4, 1)
        self.e13 = ConvBN(4, 3, (1, 3))
        self.e31 = ConvBN(4, 3, (3, 1))
        self.epool = ConvBN(14, 2, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 24, 24]
        x = self.stem(x)
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        x = torch.cat([self.c1(x), self.c7(x), self.cpool(pooled)], 1)  # [N, 9, 12, 12]
        x = torch.cat([self.down(x), F.max_pool2d(x, 3, stride=2, padding=1)], 1)  # [N, 14, 6, 6]
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch = self.e(x)
        branch = torch.cat([self.e13(branch), self.e31(branch)], 1)
        x = torch.cat([branch, self.epool(pooled)], 1)  # [N, 8, 6, 6]
        return self.fc(x.mean((2, 3)))


class Fire(nn.Module):
    """SqueezeNet: 1x1 down, then 1x1 and 3x3 side by side."""

    def __init__(self, c_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1(x).relu(), self.expand3(x).relu()], 1)


def squeezenet() -> nn.Module:
    """The head is a 1x1 convolution and a mean: the last layer is no linear one."""
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(Fire(5, 2, 3), Fire(6, 3, 4), nn.Dropout(), nn.Conv2d(8, 5, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def double(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(ConvBN(c_in, c_out), ConvBN(c_out, c_out))


class UNet(nn.Module):
    """Two levels; each decoder joins [skip, up], padded to the skip's size, up by two ways."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double(3, 4), double(4, 6), double(6, 8)
        self.bilinear = bilinear
        self.up2 = nn.Conv2d(8, 6, 1) if bilinear else nn.ConvTranspose2d(8, 6, 2, 2)
        self.dec2 = double(12, 6)
        self.up1 = nn.Conv2d(6, 4, 1) if bilinear else nn.ConvTranspose2d(6, 4, 2, 2)
        self.dec1 = double(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def join(self, x: Tensor, skip: Tensor, up: nn.Module) -> Tensor:
        if self.bilinear:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = up(x)
        rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 10, 12]
        skip1 = self.down1(x)
        skip2 = self.down2(F.max_pool2d(skip1, 2))
        x = self.bottom(F.max_pool2d(skip2, 2))
        x = self.dec2(self.join(x, skip2, self.up2))
        return self.head(self.dec1(self.join(x, skip1, self.up1)))


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, summed top down; one 3x3 shared by the levels: two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3 = ConvBN(3, 4, 3, 2), ConvBN(4, 6, 3, 2)
        self.lateral2, self.lateral3 = nn.Conv2d(4, 5, 1), nn.Conv2d(6, 5, 1)
        self.head = nn.Conv2d(5, 5, 3, padding=1)
        self.logits = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [N, 3, 16, 16]
        c2 = self.c2(x)
        p3 = self.lateral3(self.c3(c2))
        p2 = self.lateral2(c2) + F.interpolate(p3, size=c2.shape[-2:], mode="nearest")
        return self.logits(self.head(p2).relu()), self.logits(self.head(p3).relu())


ENTRIES: list[Entry] = [
    images("densenet", DenseNet, 3, 32, 32),
    images("googlenet", GoogLeNet, 3, 32, 32),
    images("inception_v3", InceptionV3, 3, 24, 24),
    images("squeezenet", squeezenet, 3, 32, 32),
    images("unet_transposed", lambda: UNet(bilinear=False), 3, 10, 12),
    images("unet_bilinear", lambda: UNet(bilinear=True), 3, 10, 12),
    images("feature_pyramid", FeaturePyramid, 3, 16, 16),
]
