# SPDX-License-Identifier: MIT
"""From a criterion to scores and masks of layers.

Where a layer has one role that uses all of its weight, its mask is fused: no score is stored. A
weight with several roles (tied, shared, packed in parts) has score sqrt(sum over roles of s^2).
Normalizations of scores for one ranking over layers:

    norm    s / ||s||_2 of the layer
    lamp    s_j^2 / sum of s_m^2 over the weights of the layer ranked at or above j
            (Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lap_ext import from_factors, ranking
from lap_ext.criteria import Criterion
from lap_ext.network import Network
from lap_ext.topology import Layer
from lap_ext.topology.roles import Role

NORMALIZATIONS = ("none", "norm", "lamp")


def layer_scores(network: Network, criterion: Criterion, layer: Layer) -> Tensor:
    """Scores of a layer's weights, the weight's shape, float32 (float64 for float64 weights)."""
    weight = criterion.weight(network, layer)
    roles = layer.roles
    if len(roles) == 1 and roles[0].part.whole:
        return _role_scores(network, criterion, roles[0], weight).reshape(weight.shape)
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for role in roles:
        scores = _role_scores(network, criterion, role, weight)
        role.part.of(total).add_(scores.double().square_())
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return total.sqrt_().to(kind)


def _role_scores(network: Network, criterion: Criterion, role: Role, weight: Tensor) -> Tensor:
    """Scores of the block that a role uses, [rows, cols, *window]."""
    into, out = _on(weight, criterion.factors(network, role))
    part = role.part
    return from_factors.score_from_factors(
        part.of(weight), into, out, groups=part.groups, transposed=part.transposed
    )


def layer_mask(
    network: Network,
    criterion: Criterion,
    layer: Layer,
    keep: int,
    mask: Tensor | None,
) -> Tensor:
    """Mask of the keep best weights of a layer among those that mask names."""
    if len(layer.roles) > 1 or not layer.roles[0].part.whole:
        return ranking.topk_mask(layer_scores(network, criterion, layer), keep, mask=mask)
    role = layer.roles[0]
    weight = criterion.weight(network, layer)
    into, out = _on(weight, criterion.factors(network, role))
    part = role.part
    kept = from_factors.mask_from_factors(
        part.of(weight),
        into,
        out,
        keep=keep,
        mask=None if mask is None else part.of(mask),
        groups=part.groups,
        transposed=part.transposed,
    )
    return kept.reshape(weight.shape)


def global_masks(
    scores: Mapping[str, Tensor], keep: int, masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Masks of the keep best of all scores as one ranking, layers in order."""
    eligible = None
    if masks:
        eligible = [
            masks[name] if name in masks else torch.ones_like(score, dtype=torch.bool)
            for name, score in scores.items()
        ]
    kept = ranking.topk_mask(list(scores.values()), keep, mask=eligible)
    return dict(zip(scores, kept, strict=True))


def normalized(scores: Tensor, how: str, mask: Tensor | None) -> Tensor:
    """Scores of one layer made comparable with other layers'; mask: the ones that count."""
    if how == "none":
        return scores
    left = scores.double()
    if mask is not None:
        left = left * mask
    if how == "norm":
        size = left.norm()
        return left / size if bool(size > 0) else left
    return lamp(left)


def lamp(scores: Tensor) -> Tensor:
    """Layer-adaptive magnitudes, float64: each square over the sum of all that are not smaller.

        lamp[j] = s[j]^2 / sum of s[m]^2 over m ranked at or above j

    Ranked by (score, lower index first), so that of equal scores the lower index is the larger.
    The largest is 1: no layer is emptied before the others.
    """
    flat = scores.double().flatten()
    size = flat.max() if flat.numel() else flat.new_zeros(())
    squares = (flat / size).square() if bool(size > 0) else flat
    ordered, order = torch.sort(squares, descending=True, stable=True)
    above = ordered.cumsum(0)
    result = torch.empty_like(flat)
    result[order] = torch.where(ordered > 0, ordered / above, 0.0)
    return result.reshape(scores.shape)


def _on(weight: Tensor, factors: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.to(weight.device) for x in factors)
