# SPDX-License-Identifier: MIT
"""Several threads trace and prune at once, each its own model, as one after another would."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

import lap_ext
from tests.helpers import masked_network as cases


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5)).train()


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 7), nn.Linear(6, 7), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.one(x).relu(), self.two(x)], dim=-1))


MODELS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (cases.net, torch.zeros(1, 1, 6, 6)),
    (dense, torch.zeros(2, 12)),
    (attention, torch.zeros(1, 3, 8)),
    (Branches, torch.zeros(1, 6)),
]


def test_pruning_in_four_threads() -> None:
    models = [make() for make, _ in MODELS]
    modes = [[module.training for module in model.modules()] for model in models]
    fast = torch.backends.mha.get_fastpath_enabled()
    alone = [
        lap_ext.prune(copy.deepcopy(model), inputs, 0.5)
        for model, (_, inputs) in zip(models, MODELS, strict=True)
    ]
    begin = threading.Barrier(len(MODELS))

    def work(index: int) -> lap_ext.PruneResult:
        begin.wait()
        return lap_ext.prune(copy.deepcopy(models[index]), MODELS[index][1], 0.5)

    with ThreadPoolExecutor(len(MODELS)) as pool:
        found = list(pool.map(work, range(len(MODELS))))
    for result, expected in zip(found, alone, strict=True):
        assert result.masks == expected.masks and str(result) == str(expected)
    assert [[module.training for module in model.modules()] for model in models] == modes
    assert torch.backends.mha.get_fastpath_enabled() == fast and torch.is_grad_enabled()
