# SPDX-License-Identifier: MIT
"""Pruning by lookahead from its definition, in all scopes, orders and rounds; never lap_ext.

Scores are distortions by brute force (network_oracle.py) of a copy of the model in float64, in
which what has been pruned is zero. All weights of a ranking are sorted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.layer_oracle import keep_count
from tests.helpers.network_oracle import distortions

GAP = 1e-9  # relative, between the last weight that is kept and the first that is not


def masks(
    model: nn.Module,
    inputs: Tensor,
    sparsity: float,
    *,
    scope: str,
    normalize: str,
    order: str,
    rounds: int,
    how: dict[str, Any],
) -> dict[str, Tensor]:
    """Layer name -> mask; no two scores around a threshold may be close."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)

    def scored() -> dict[str, Tensor]:
        found = distortions(model, inputs.double(), **how)
        return {name: _normalized(x, normalize) for name, x in found.items()}

    names = list(scored())
    groups = [names] if scope == "global" else [[name] for name in names]
    live = {name: int(_weight(model, name).count_nonzero()) for name in names}
    for number in range(1, rounds + 1):
        before = scored() if order == "parallel" else {}
        for group in groups[::-1] if order == "backward" else groups:
            begin = sum(live[name] for name in group)
            end = keep_count(sparsity, sum(_weight(model, name).numel() for name in group))
            keep = begin - max(begin - end, 0) * number // rounds
            _zero(model, group, before or scored(), keep)
    return {name: _weight(model, name) != 0 for name in names}


def _weight(model: nn.Module, name: str) -> Tensor:
    parameters = dict(model.named_parameters())
    return parameters[name if name in parameters else f"{name}.weight"]


def _normalized(scores: Tensor, how: str) -> Tensor:
    if how == "norm":
        return scores / scores.square().sum().sqrt()
    if how == "lamp":
        squares, order = scores.flatten().square().sort(descending=True, stable=True)
        result = torch.empty_like(squares)
        result[order] = squares / squares.cumsum(0)
        return result.reshape(scores.shape)
    return scores


def _zero(model: nn.Module, group: Sequence[str], scores: dict[str, Tensor], keep: int) -> None:
    """Zeroes all but the best keep weights of some layers, ranked together."""
    weights = [_weight(model, name) for name in group]
    flat = torch.cat([scores[name].flatten() for name in group])
    flat = flat.masked_fill(torch.cat([x.flatten() for x in weights]) == 0, -1)
    ordered, order = flat.sort(descending=True, stable=True)
    if 0 < keep < flat.numel():
        assert ordered[keep - 1] - ordered[keep].clamp(min=0) > GAP * ordered[keep - 1], "a tie"
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order[:keep]] = True
    for x, mask in zip(weights, kept.split([x.numel() for x in weights]), strict=True):
        x.mul_(mask.reshape(x.shape))
