# SPDX-License-Identifier: MIT
"""The data: scikit-learn's digits, or the paper's sets through torchvision from files you have.

Nothing is downloaded. --data names the directory that torchvision's classes read:

    mnist, fashion-mnist   DIR/MNIST/raw/*-ubyte, DIR/FashionMNIST/raw/*-ubyte
    cifar10                DIR/cifar-10-batches-py/
    tiny-imagenet          DIR/tiny-imagenet-200/{train,val}/<class>/*.JPEG (val by class, too)

Images are kept as bytes; a batch is augmented and normalized when it is drawn, as in the paper's
code. All random numbers come from torch's global state, so that a seed gives the same batches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from lap_ext import demo

MOMENTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # mean, deviation per channel
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.0,), (1.0,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "tiny-imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
NAMES = ("digits", *MOMENTS)
CIFAR_PADDING = 4
TEST_BATCH = 500

Transform = Callable[[Tensor], Tensor]


class MissingDataError(Exception):
    """The data, or what reads it, is not there."""


@dataclass(frozen=True)
class Data:
    """Images and labels; prepare makes floats of a batch, augment changes it at random first."""

    name: str
    x_train: Tensor  # [n, C, H, W]
    y_train: Tensor  # [n]
    x_test: Tensor
    y_test: Tensor
    prepare: Transform
    augment: Transform
    device: torch.device

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Draws different images at random, augmented, and their labels."""
        index = torch.randperm(len(self.x_train))[:size]
        x = self.prepare(self.augment(self.x_train[index].to(self.device)))
        return x, self.y_train[index].to(self.device)

    def calibration(self, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """Returns at most so many batches of training images, not augmented, none twice."""
        order = torch.randperm(len(self.x_train))[: count * size]
        return [
            (self.prepare(self.x_train[index].to(self.device)), self.y_train[index].to(self.device))
            for index in order.split(size)
        ]

    def example(self) -> Tensor:
        """Returns two images as a net takes them."""
        return self.prepare(self.x_train[:2].to(self.device))

    def tests(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all test images."""
        parts = (self.x_test.split(TEST_BATCH), self.y_test.split(TEST_BATCH))
        for x, y in zip(*parts, strict=True):
            yield self.prepare(x.to(self.device)), y.to(self.device)


def load(name: str, directory: Path | None, device: torch.device) -> Data:
    """Loads the data of this name.

    Raises:
        MissingDataError: torchvision or the files are not there; the message names the cure.
    """
    if name == "digits":
        digits = demo.load_digits()
        x_train, x_test = (x.view(-1, 1, 8, 8) for x in (digits.x_train, digits.x_test))
        return Data(
            name, x_train, digits.y_train, x_test, digits.y_test, _as_it_is, _as_it_is, device
        )
    if directory is None:
        raise MissingDataError(
            f"{name} needs --data, the directory with its files (nothing is loaded)"
        )
    try:
        vision = importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise MissingDataError(
            f"{name} needs a torchvision that fits torch {torch.__version__} (pip install "
            f"torchvision): {error}"
        ) from error
    parts = _images(name, directory, vision)
    prepare = partial(normalized, *MOMENTS[name])
    augments: dict[str, Transform] = {"cifar10": shifted, "tiny-imagenet": partial(resized, vision)}
    augment = augments.get(name, _as_it_is)
    return Data(name, *parts[0], *parts[1], prepare, augment, device)


def _images(name: str, directory: Path, vision: Any) -> list[tuple[Tensor, Tensor]]:
    """Reads (images, labels) for training and for the test."""
    try:
        if name == "tiny-imagenet":
            root = directory / "tiny-imagenet-200"
            sets = [vision.datasets.ImageFolder(root / part) for part in ("train", "val")]
            return [_decoded(found) for found in sets]
        kind = getattr(vision.datasets, CLASSES[name])
        sets = [kind(str(directory), train=train, download=False) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise MissingDataError(f"{name} was not found in {directory}: {error}") from error
    return [(_channels_first(torch.as_tensor(s.data)), torch.as_tensor(s.targets)) for s in sets]


def _decoded(directory: Any) -> tuple[Tensor, Tensor]:
    """Decodes all images of an ImageFolder: 1.2 GB for the training set of Tiny-ImageNet."""
    import numpy as np

    images = torch.stack([torch.from_numpy(np.array(image)) for image, _ in directory])
    return _channels_first(images), torch.tensor(directory.targets)


def _channels_first(images: Tensor) -> Tensor:
    """Moves channels: [n, H, W] or [n, H, W, C] -> [n, C, H, W]."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _as_it_is(x: Tensor) -> Tensor:
    return x


def normalized(mean: tuple[float, ...], deviation: tuple[float, ...], x: Tensor) -> Tensor:
    """Turns bytes into floats without the data set's mean and deviation."""
    shape = (1, -1, 1, 1)
    middle, scale = (torch.tensor(m, device=x.device).view(shape) for m in (mean, deviation))
    return (x.float() / 255 - middle) / scale


def shifted(x: Tensor) -> Tensor:
    """Crops each image at random after padding with 4 black pixels, mirrored half of the time."""
    n, _, height, width = x.shape
    padded = F.pad(x, (CIFAR_PADDING,) * 4)
    down, right = torch.randint(2 * CIFAR_PADDING + 1, (2, n, 1))
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns) + right
    rows = torch.arange(height) + down
    image = torch.arange(n)
    found = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [n, H, W, C]
    return found.permute(0, 3, 1, 2)


def resized(vision: Any, x: Tensor) -> Tensor:
    """Resizes random crops of the images to their size, mirrored half of the time."""
    transforms = vision.transforms
    change = transforms.Compose(
        [transforms.RandomResizedCrop(tuple(x.shape[-2:])), transforms.RandomHorizontalFlip()]
    )
    return torch.stack([change(image) for image in x])
