# SPDX-License-Identifier: MIT
"""The paper's numbers: each net with its ratios, levels, training steps and learning rate.

    layer l at level t keeps (1 - ratios[l])^t of its weights

Layers with ratio 0 and the projections of residual blocks are never pruned. The kept per cents of
the text and of the tables are of all weights but the projections', as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from benchmarks.paper import nets
from lap_ext import allocation

BATCH = 60
FAST, SLOW = 1.2e-3, 3e-4  # learning rates of Adam, constant


@dataclass(frozen=True)
class Setting:
    """One network as it is trained, pruned and fine-tuned."""

    build: Callable[[], nn.Module]
    datasets: tuple[str, ...]  # the first is the default
    ratios: tuple[float, ...]  # one a layer, in order, without the projections
    levels: tuple[int, ...]
    train_steps: int
    tune_steps: int
    rate: float

    @cached_property
    def has_norms(self) -> bool:
        """Whether there is a batch norm."""
        return any(isinstance(module, nn.BatchNorm2d) for module in _meta(self).modules())

    @cached_property
    def is_chain(self) -> bool:
        """Whether no path leads around a layer."""
        return not any(isinstance(m, nets.RESIDUAL) for m in _meta(self).modules())

    def net(self) -> nn.Module:
        """Makes a new net, its weights drawn from torch's random state."""
        return nets.initialized(self.build())

    def ratio_of(self, net: nn.Module) -> dict[str, float]:
        """Maps layer name to ratio."""
        names = weights_of(net)
        if len(names) != len(self.ratios):
            raise ValueError(f"expected {len(self.ratios)} layers, got {', '.join(names)}")
        return dict(zip(names, self.ratios, strict=True))

    def pruned(self, net: nn.Module) -> list[str]:
        """Lists the layers that are pruned at all."""
        return [name for name, ratio in self.ratio_of(net).items() if ratio]

    def spared(self, net: nn.Module) -> list[str]:
        """Lists the layers that stay dense: what prune's exclude takes."""
        pruned = set(self.pruned(net))
        return [name for name in weights_of(net, projections=True) if name not in pruned]

    def allocation(self, net: nn.Module, level: int) -> allocation.compounded:
        """Returns how much each layer loses at a level."""
        ratios = self.ratio_of(net)
        return allocation.compounded({name: ratios[name] for name in self.pruned(net)}, level)

    def kept(self, net: nn.Module, level: int) -> tuple[int, int]:
        """Counts (kept, all) weights of the layers that are pruned."""
        pruned = set(self.pruned(net))
        shapes = {name: weight.shape for name, weight in weights_of(net).items() if name in pruned}
        keeps = self.allocation(net, level).keeps(shapes)
        return sum(keeps.values()), sum(map(math.prod, shapes.values()))

    def kept_per_cent(self, net: nn.Module, level: int) -> float:
        """Returns the per cent kept of all weights but the projections'."""
        kept, n = self.kept(net, level)
        everything = sum(weight.numel() for weight in weights_of(net).values())
        return 100 * (kept + everything - n) / everything


def weights_of(net: nn.Module, *, projections: bool = False) -> dict[str, torch.Tensor]:
    """Maps layer name to weight of the linear and convolutional layers, in the paper's order."""
    return {
        name: module.weight
        for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (projections or "shortcut" not in name)
    }


def _meta(setting: Setting) -> nn.Module:
    with torch.device("meta"):
        return setting.build()


def _convs(count: int, *, stem: bool = False) -> tuple[float, ...]:
    """Returns the ratios of convolutions and a linear layer, with a dense stem before them."""
    return (*((0.0,) if stem else ()), *(0.15,) * count, 0.10)


Steps = tuple[int, int]  # of training, of fine-tuning
Ratios = tuple[float, ...]
Levels = Sequence[int]
FIVE = (0.5, 0.5, 0.5, 0.5, 0.25)


def _digits(build: Callable[[], nn.Module], ratios: Ratios, levels: Levels) -> Setting:
    return Setting(build, ("digits",), ratios, tuple(levels), 500, 200, FAST)


def _cifar(
    build: Callable[[], nn.Module],
    ratios: Ratios,
    levels: Levels,
    steps: Steps,
    rate: float = SLOW,
) -> Setting:
    return Setting(build, ("cifar10",), ratios, tuple(levels), *steps, rate)


def _tiny(build: Callable[[], nn.Module], ratios: Ratios, levels: Levels) -> Setting:
    return Setting(build, ("tiny-imagenet",), ratios, tuple(levels), 60_000, 40_000, SLOW)


ODD = range(13, 28, 2)
DIGITS_RESNET = partial(nets.resnet, (1, 1, 1), channels=1, widths=(16, 32, 64))
RESNET50_64 = partial(nets.resnet, (3, 4, 6, 3), bottleneck=True, classes=200, stride=2)

SETTINGS: Mapping[str, Setting] = {
    "digits-mlp": _digits(partial(nets.mlp, (64, *(500,) * 4, 10)), FIVE, range(4, 10)),
    "digits-resnet": _digits(DIGITS_RESNET, _convs(6, stem=True), range(12, 33, 4)),
    "mlp": Setting(
        build=partial(nets.mlp, (784, *(500,) * 4, 10)),
        datasets=("mnist", "fashion-mnist"),
        ratios=FIVE,
        levels=tuple(range(4, 11)),
        train_steps=50_000,
        tune_steps=50_000,
        rate=FAST,
    ),
    "lenet": _cifar(nets.lenet, (0.2, 0.2, 0.3, 0.3, 0.15), (5, 10, 15), (50_000, 50_000), FAST),
    "conv6": _cifar(nets.conv6, (*(0.15,) * 6, 0.2, 0.2, 0.1), range(12, 19), (30_000, 20_000)),
    "vgg11": _cifar(partial(nets.vgg, 11), _convs(8), ODD, (35_000, 25_000)),
    "vgg16": _cifar(partial(nets.vgg, 16), _convs(13), ODD, (50_000, 35_000)),
    "vgg19": _cifar(partial(nets.vgg, 19), _convs(16), ODD, (60_000, 40_000)),
    "resnet18": _cifar(
        partial(nets.resnet, (2, 2, 2, 2)),
        _convs(16, stem=True),
        range(14, 30, 3),
        (35_000, 25_000),
    ),
    "vgg19_64": _tiny(partial(nets.vgg, 19, classes=200, stride=2), _convs(16), range(13, 21)),
    "resnet50_64": _tiny(RESNET50_64, _convs(48, stem=True), range(17, 30, 2)),
    "wrn-16-8_64": _tiny(
        partial(nets.wide_resnet, 16, 8, 200), _convs(12, stem=True), range(13, 30, 2)
    ),
}
