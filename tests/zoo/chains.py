# SPDX-License-Identifier: MIT
"""Chains: every layer has one producer and one consumer, with pooling and flattening between.

MLP, LeNet-5, Conv-6, VGG without and with batch norm; the same in one and three dimensions; both
memory orders of a flatten; encoders and decoders with transposed convolutions or pixel shuffles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from tests.zoo.common import Entry, images


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Dropout(), nn.Linear(7, 5)
    )


def mlp_bn() -> nn.Module:
    """Images in, batch norm in one dimension between the layers."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(48, 9), nn.BatchNorm1d(9), nn.ReLU()),
        *(nn.Linear(9, 7, bias=False), nn.BatchNorm1d(7), nn.Sigmoid()),
        nn.Linear(7, 5),
    )


class LeNet(nn.Module):
    """LeNet-5, functional style; 3 * 4 positions a channel when the convolutions are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 5)
        self.conv2 = nn.Conv2d(3, 5, 5)
        self.fc1 = nn.Linear(5 * 3 * 4, 12)
        self.fc2 = nn.Linear(12, 8)
        self.fc3 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, 24, 28]
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)  # [N, 5 * 3 * 4]
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return F.log_softmax(self.fc3(x), dim=1)


def _convs(plan: list[int | str], batch_norm: bool) -> nn.Sequential:
    """3x3 convolutions of the widths in a plan, "M" a pooling; the input has 3 channels."""
    layers: list[nn.Module] = []
    channels = 3
    for step in plan:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, step, 3, padding=1))
        layers += [nn.BatchNorm2d(step)] if batch_norm else []
        layers.append(nn.ReLU(inplace=True))
        channels = step
    return nn.Sequential(*layers)


def conv6() -> nn.Module:
    return nn.Sequential(
        *_convs([4, 4, "M", 6, 6, "M", 8, 8, "M"], batch_norm=False),
        nn.Flatten(),  # [N, 8 * 2 * 2]
        *(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)),
    )


class VGG(nn.Module):
    """Features, adaptive pooling to 2x3 positions, three linear layers with dropout."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        self.features = _convs([4, "M", 6, "M", 8, 8, "M", 10, 10, "M"], batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 3))
        self.classifier = nn.Sequential(
            *(nn.Linear(10 * 2 * 3, 14), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(14, 12), nn.ReLU(True), nn.Dropout()),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 48]
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class FlattenLast(nn.Module):
    """Flattened with the channel as the fastest index: column n of fc reads channel n % 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(2 * 3 * 5, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 4, 5]
        x = self.conv(x).relu().permute(0, 2, 3, 1)  # [N, 2, 3, 5]
        return self.fc(x.reshape(x.shape[0], -1))


def conv1d() -> nn.Module:
    """A keyword spotter on raw audio: strided, dilated and grouped convolutions, mean over time."""
    return nn.Sequential(
        *(nn.Conv1d(1, 4, 8, stride=4), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(4, 6, 3, dilation=2, groups=2), nn.GroupNorm(3, 6), nn.LeakyReLU(0.1)),
        *(nn.Conv1d(6, 8, 3), nn.InstanceNorm1d(8, affine=True), nn.PReLU(8)),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


def conv3d() -> nn.Module:
    """A clip classifier: factored space and time, one pooling to 1x2x2 positions."""
    return nn.Sequential(
        *(nn.Conv3d(3, 4, (1, 3, 3)), nn.BatchNorm3d(4), nn.ReLU()),
        *(nn.Conv3d(4, 5, (3, 1, 1)), nn.BatchNorm3d(5), nn.ReLU(), nn.MaxPool3d((1, 2, 2))),
        *(nn.Conv3d(5, 6, 1), nn.ELU(), nn.AdaptiveAvgPool3d((1, 2, 2))),
        *(nn.Flatten(), nn.Linear(6 * 4, 5)),
    )


def autoencoder() -> nn.Module:
    """Strided convolutions down, transposed ones up: one grouped, one padded, one plain."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.2)),
        *(nn.ConvTranspose2d(6, 8, 4, 2, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 5, 3, 2, 1, output_padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(5, 3, 3, padding=1), nn.Tanh()),
    )


def generator() -> nn.Module:
    """DCGAN: a linear layer unflattened to [N, 6, 2, 2], then up."""
    return nn.Sequential(
        *(nn.Linear(7, 24), nn.Unflatten(1, (6, 2, 2)), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh()),
    )


def super_resolution() -> nn.Module:
    """ESPCN, with a pixel unshuffle first: 4 channels are one and the other way round."""
    return nn.Sequential(
        *(nn.PixelUnshuffle(2), nn.Conv2d(12, 5, 3, padding=1), nn.PReLU()),
        *(nn.Conv2d(5, 16, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()),
        *(nn.ReflectionPad2d(1), nn.Conv2d(4, 12, 3), nn.PixelShuffle(2)),
    )


def alexnet() -> nn.Module:
    """Large strides, overlapping pools, groups, padding as a module."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.AvgPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(6 * 2 * 2, 8), nn.ReLU(), nn.Linear(8, 5)),
    )


ENTRIES: list[Entry] = [
    images("mlp", mlp, 12),
    images("mlp_bn", mlp_bn, 3, 4, 4),
    images("lenet", LeNet, 1, 24, 28),
    images("conv6", conv6, 3, 16, 16),
    images("vgg", lambda: VGG(batch_norm=False), 3, 32, 48),
    images("vgg_bn", lambda: VGG(batch_norm=True), 3, 32, 48),
    images("alexnet", alexnet, 3, 32, 32),
    images("flatten_last", FlattenLast, 3, 4, 5),
    images("conv1d", conv1d, 1, 80),
    images("conv3d", conv3d, 3, 4, 8, 8),
    images("autoencoder", autoencoder, 3, 8, 8),
    images("generator", generator, 7),
    images("super_resolution", super_resolution, 3, 8, 8),
]
