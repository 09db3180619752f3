# SPDX-License-Identifier: MIT
"""Models that export but are hard to follow: a trace is right or refuses by name, never guesses.

Channels that mix outside any weight layer (local response norm, Fourier transform, running sum,
mean over channels), weights that are computed (weight norm, standardized, masked), memory that is
shared (in-place results dropped, slices assigned), channels in a data-dependent order, a
state-space model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.zoo.common import ConvBN, Entry, images
from tests.zoo.hf import IDS, hf, text


class Between(nn.Module):
    """conv1 (6 channels), a function, conv2."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv2 = nn.Conv2d(6, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 8, 8]
        return self.conv2(self.function(self.conv1(x)))


def dropped_add(x: Tensor) -> Tensor:
    """The in-place result is not used by name: x itself has changed."""
    x.add_(x.roll(1, dims=2))
    F.relu(x, inplace=True)
    return x


def assigned_slice(x: Tensor) -> Tensor:
    """Half of the channels are overwritten by the others, through a view."""
    y = x.clone()
    y[:, :3] = x[:, 3:]
    return y


def strongest_first(x: Tensor) -> Tensor:
    """Channels in the order of their means: which is where depends on the data."""
    order = x.mean((0, 2, 3)).argsort()
    return x[:, order]


class CBAM(nn.Module):
    """A gate of positions from the mean and the maximum over channels, then one of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(3, 6), nn.Conv2d(6, 4, 1)
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)
        self.eca = nn.Conv1d(1, 1, 3, padding=1)  # slides over the channels

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 8, 8]
        x = self.conv1(x)
        stats = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        x = x * self.spatial(stats).sigmoid()
        gate = self.eca(x.mean((2, 3)).unsqueeze(1)).sigmoid()  # [N, 1, 6]
        return self.conv2(x * gate.transpose(1, 2).unsqueeze(-1))


class Standardized(nn.Conv2d):
    """Weight standardization: the weight that convolves is computed from the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias)


def standardized() -> nn.Module:
    return nn.Sequential(Standardized(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 3))


def weight_norm() -> nn.Module:
    """The parameters are 0.parametrizations.weight.original0 (length) and original1."""
    first = parametrizations.weight_norm(nn.Linear(5, 6))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(6, 4))


def pruned() -> nn.Module:
    """torch.nn.utils.prune: the weight is weight_orig * weight_mask."""
    first = nn.Linear(5, 6)
    prune.random_unstructured(first, "weight", 0.5)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(6, 4))


class FNet(nn.Module):
    """Tokens and channels mixed by a Fourier transform in place of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 5]
        x = self.inlet(x)
        return self.outlet(x + torch.fft.fft2(x).real)


class Bilinear(nn.Module):
    """nn.Bilinear: a weight [O, I, J] between two producers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 4)
        self.bilinear, self.outlet = nn.Bilinear(3, 4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outlet(self.bilinear(self.left(x), self.right(x)).relu())


ENTRIES: list[Entry] = [
    images("local_response_norm", lambda: Between(nn.LocalResponseNorm(3)), 3, 8, 8),
    images("running_sum", lambda: Between(lambda x: x.cumsum(dim=1)), 3, 8, 8),
    images("dropped_add", lambda: Between(dropped_add), 3, 8, 8),
    images("assigned_slice", lambda: Between(assigned_slice), 3, 8, 8),
    images("sorted_channels", lambda: Between(strongest_first), 3, 8, 8),
    images("softmax_channels", lambda: Between(nn.Softmax(dim=1)), 3, 8, 8),
    images("cbam", CBAM, 3, 8, 8),
    images("standardized", standardized, 3, 8, 8),
    images("weight_norm", weight_norm, 5),
    images("pruned", pruned, 5),
    images("fnet", FNet, 4, 5),
    images("bilinear", Bilinear, 5),
    hf(
        *("hf_mamba", "MambaForCausalLM", text, IDS),
        hidden_size=8,
        num_hidden_layers=1,
        state_size=3,
    ),
]
