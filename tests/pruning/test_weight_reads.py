# SPDX-License-Identifier: MIT
"""How often a weight is read: for zeros, for norms, for its mask, once each, for any model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lap_ext

UNREAD = {"detach", "view", "_unsafe_view", "alias", "_reshape_alias", "new_zeros"}


class Reads(TorchDispatchMode):
    """Counts operations that get memory of a model's weights, but for those that read none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name.removesuffix(".weight")
                      for name, p in model.named_parameters() if p.dim() > 1}  # fmt: skip
        self.found: dict[str, Counter[str]] = {name: Counter() for name in self.names.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func._schema.name.rpartition("::")[2]
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, Tensor) and x.device.type == "cpu" and operation not in UNREAD:
                name = self.names.get(x.untyped_storage().data_ptr()) if x.numel() else None
                if name is not None:
                    self.found[name][operation] += 1
        return func(*args, **(kwargs or {}))


def residual() -> tuple[nn.Module, Tensor]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.depth, self.up = nn.Conv2d(4, 4, 1, groups=4), nn.ConvTranspose2d(4, 4, 1)
            self.head = nn.Linear(4 * 36, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return self.head((x + self.up(self.depth(x).relu())).flatten(1))

    return Net().eval(), torch.randn(1, 3, 6, 6)


def test_parallel_reads_every_weight_three_times() -> None:
    """Zeros, norms, and the mask that no score is stored for; applying the masks is one more."""
    model, x = residual()
    topology = lap_ext.trace(model, x)
    with Reads(model) as reads:
        result = lap_ext.prune(model, None, 0.5, apply=False, topology=topology)
    for name, operations in reads.found.items():
        assert operations == {"nonzero_mask": 1, "squared_norms": 1, "mask": 1}, name
    with Reads(model) as reads:
        result.masks.apply(model)
    assert {operation for x in reads.found.values() for operation in x} == {"where"}


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_an_order_reads_three_times_and_the_pruned_ones_again(order: str) -> None:
    """Squared norms of what was pruned are taken anew, of weights that are left; others stay."""
    model, x = residual()
    topology = lap_ext.trace(model, x)
    with Reads(model) as reads:
        lap_ext.prune(model, None, 0.5, order=order, apply=False, topology=topology)
    last = list(topology.layers)[-1 if order == "forward" else 0]
    for name, operations in reads.found.items():
        again = {} if name == last else {"mul": 1}  # read and multiplied with its mask
        assert operations == {"nonzero_mask": 1, "squared_norms": 1, "mask": 1, **again}, name


def test_a_global_ranking_reads_three_times() -> None:
    """Zeros, norms, and one ranking over the weights themselves, which no score is stored for."""
    model, x = residual()
    topology = lap_ext.trace(model, x)
    with Reads(model) as reads:
        options = {"scope": "global", "normalize": "none", "apply": False}
        lap_ext.prune(model, None, 0.5, topology=topology, **options)
    for name, operations in reads.found.items():
        assert operations == {"nonzero_mask": 1, "squared_norms": 1, "global_mask": 1}, name


class Largest(TorchDispatchMode):
    """Counts results of a float type that have so many elements, views left out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func._schema.name.rpartition("::")[2]
        for x in tree_leaves(result):
            large = isinstance(x, Tensor) and x.is_floating_point() and x.numel() >= self.size
            self.found[operation] += large and operation not in UNREAD
        return result


def test_no_copy_of_a_weight_is_made() -> None:
    """Bug 18 of the public code: norms repeated to the weight's size, sorted copies of scores."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    topology = lap_ext.trace(model, torch.randn(1, 64))
    for options in ({}, {"criterion": "magnitude"}, {"scope": "global", "normalize": "none"}):
        with Largest(64 * 64) as largest:
            lap_ext.prune(model, None, 0.9, **options, topology=topology)
        assert +largest.found == Counter({"where": 3}), options  # in place: the weights are zeroed
