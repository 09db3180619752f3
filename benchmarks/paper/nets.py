# SPDX-License-Identifier: MIT
"""The paper's networks in their true sizes, and two small ones for 8x8 digits.

Shapes are those of the public code of the paper (github.com/alinlab/lookahead_pruning), written
anew. Names that contain "shortcut" are the projections, which the paper neither prunes nor counts.
Weights start from Xavier's normal distribution and biases from zero, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

VGG = {  # output channels; 0 is a 2x2 max-pooling
    11: (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    16: (64, 64, 0, 128, 128, 0, *(256,) * 3, 0, *(512,) * 3, 0, *(512,) * 3, 0),
    19: (64, 64, 0, 128, 128, 0, *(256,) * 4, 0, *(512,) * 4, 0, *(512,) * 4, 0),
}
DROPOUT = 0.3  # of the wide ResNet


def initialized(net: nn.Module) -> nn.Module:
    """Gives the net the paper's initial weights."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


def mlp(widths: Sequence[int]) -> nn.Module:
    """Makes linear layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet() -> nn.Module:
    """Makes LeNet-5 for 3x32x32 images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def conv6() -> nn.Module:
    """Makes six convolutions and three linear layers for 3x32x32 images."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(n_out, n_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def vgg(depth: int, *, classes: int = 10, stride: int = 1) -> nn.Module:
    """Makes VGG with batch norms and one linear layer; the first convolution has this stride."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_out in VGG[depth]:
        if n_out == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        first = not layers
        conv = nn.Conv2d(n_in, n_out, 3, stride=stride if first else 1, padding=1)
        layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU()]
        n_in = n_out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes))


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3 and a four times wider 1x1."""

    def __init__(self, n_in: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        n_out = 4 * width if bottleneck else width
        # (outputs, window, stride) of each convolution
        plan = [(width, 3, stride), (width, 3, 1)]
        if bottleneck:
            plan = [(width, 1, 1), (width, 3, stride), (n_out, 1, 1)]
        layers: list[nn.Module] = []
        n = n_in
        for n_next, window, step in plan:
            layers.append(nn.Conv2d(n, n_next, window, step, window // 2, bias=False))
            layers += [nn.BatchNorm2d(n_next), nn.ReLU()]
            n = n_next
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut.append(nn.Conv2d(n_in, n_out, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ReLU of the sum of both paths."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(
    blocks: Sequence[int],
    *,
    channels: int = 3,
    widths: Sequence[int] = (64, 128, 256, 512),
    bottleneck: bool = False,
    classes: int = 10,
    stride: int = 1,
) -> nn.Module:
    """Makes a ResNet for small images: a 3x3 stem with this stride, then stages of blocks."""
    n = widths[0]
    stem = nn.Conv2d(channels, n, 3, stride, 1, bias=False)
    stages: list[nn.Module] = []
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for number in range(count):
            step = 2 if stage and not number else 1
            stages.append(Block(n, width, step, bottleneck=bottleneck))
            n = 4 * width if bottleneck else width
    return nn.Sequential(
        *(stem, nn.BatchNorm2d(widths[0]), nn.ReLU(), *stages),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, classes)),
    )


class WideBlock(nn.Module):
    """A pre-activation block: batch norm and ReLU come before each convolution."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, width, 3, 1, 1)
        self.dropout = nn.Dropout(DROPOUT)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != width:
            self.shortcut.append(nn.Conv2d(n_in, width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum of both paths, before any activation."""
        y = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(y))) + self.shortcut(x)


def wide_resnet(depth: int, factor: int, classes: int) -> nn.Module:
    """Makes WRN-depth-factor for 3x64x64 images."""
    n, stages = 16, list[nn.Module]()
    for stage, width in enumerate((16 * factor, 32 * factor, 64 * factor)):
        for number in range((depth - 4) // 6):
            stages.append(WideBlock(n, width, 2 if stage and not number else 1))
            n = width
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), *stages, nn.BatchNorm2d(n, momentum=0.9), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, classes)),
    )


RESIDUAL = (Block, WideBlock)
