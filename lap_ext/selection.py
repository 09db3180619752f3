# SPDX-License-Identifier: MIT
"""From a criterion to scores and masks of layers.

Where a layer has one role that uses all of its weight, its mask is fused: no score is stored. A
weight with several roles (tied, shared, packed in parts) has score sqrt(sum over roles of s^2). A
criterion without factors is element-wise: |w|, however often the weight is used.
A criterion with rows keeps as many weights of every output channel.
Normalizations of scores for one ranking over layers:

    norm    s / ||s||_2 of the layer
    lamp    s_j^2 / sum of s_m^2 over the weights of the layer ranked at or above j
            (Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lap_ext import check, from_factors, ops, ranking
from lap_ext.criteria import Criterion
from lap_ext.network import Network
from lap_ext.topology import Layer
from lap_ext.topology.roles import Part, Role

NORMALIZATIONS = ("none", "norm", "lamp")


def layer_scores(network: Network, criterion: Criterion, layer: Layer) -> Tensor:
    """Scores of a layer's weights, the weight's shape, float32 (float64 for float64 weights)."""
    with _of(layer, network):
        return _layer_scores(network, criterion, layer)


def _layer_scores(network: Network, criterion: Criterion, layer: Layer) -> Tensor:
    weight = criterion.weight(network, layer)
    roles = layer.roles
    if not criterion.by_role:
        return from_factors.score_from_factors(weight, None, None)
    if len(roles) == 1 and roles[0].part.whole:
        return _role_scores(network, criterion, roles[0], weight).reshape(weight.shape)
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for role in roles:
        scores = _role_scores(network, criterion, role, weight)
        role.part.of(total).add_(scores.double().square_())
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return total.sqrt_().to(kind)


@contextmanager
def _of(layer: Layer, network: Network) -> Iterator[None]:
    """Errors about w name the layer."""
    try:
        yield
    except (ValueError, TypeError) as error:
        clean = check.in_layer(network.function, layer.name, error)
        if clean is None:
            raise
        raise clean from None


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
    with _of(layer, network):
        return _layer_mask(network, criterion, layer, keep, mask)


def _layer_mask(
    network: Network, criterion: Criterion, layer: Layer, keep: int, mask: Tensor | None
) -> Tensor:
    if criterion.rows:
        return row_mask(layer_scores(network, criterion, layer), layer.roles[0].part, keep, mask)
    if not criterion.by_role:
        weight = criterion.weight(network, layer)
        return from_factors.mask_from_factors(weight, None, None, keep=keep, mask=mask)
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


def row_mask(scores: Tensor, part: Part, keep: int, mask: Tensor | None) -> Tensor:
    """Mask of the best weights of every output channel, keep in all.

    Every channel keeps as many, as far as it has them (mask names the ones that may be kept); of
    those left over, the first channels that have more keep one more. Of equal scores of a channel
    the lower flat index is kept.
    """
    rows = _rows(scores, part)  # [O, weights of one]
    eligible = None if mask is None else _rows(mask, part)
    n = rows.shape[1]
    room = torch.full(rows.shape[:1], n) if eligible is None else eligible.sum(1).cpu()
    counts = even_counts(room, keep)
    if eligible is not None:
        rows = rows.masked_fill(~eligible, -1.0)
    order = rows.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(n, device=rows.device) < counts.to(rows.device)[:, None]
    kept = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device).scatter_(1, order, first)
    return _from_rows(kept, part).reshape(scores.shape)


def even_counts(room: Tensor, keep: int) -> Tensor:
    """How many of each row to keep, int64 [rows]: the same number, at most its room; keep in all.

    Of what is left over, the first rows with more room take one each.

    Example:
        >>> even_counts(torch.tensor([5, 1, 5]), 8)     # 3, 1, 3 and one left over
        tensor([4, 1, 3])
    """
    low, high = 0, int(room.max()) if room.numel() else 0
    while low < high:  # the largest level whose counts fit
        level = (low + high + 1) // 2
        if int(room.clamp(max=level).sum()) <= keep:
            low = level
        else:
            high = level - 1
    counts = room.clamp(max=low)
    left = max(keep - int(counts.sum()), 0)
    more = (room > low).nonzero().flatten()[:left]
    counts[more] += 1
    return counts


def _rows(x: Tensor, part: Part) -> Tensor:
    """A tensor of a weight's shape with one row an output channel, its weights in flat order."""
    matrix = x.reshape(part.shape)
    if not part.transposed:
        return matrix.flatten(1)
    groups, (into, out) = part.groups, part.shape[:2]
    split = matrix.reshape(groups, into // groups, out, -1)  # group, input, output, window
    return split.transpose(1, 2).reshape(groups * out, -1)


def _from_rows(rows: Tensor, part: Part) -> Tensor:
    """The way back from _rows; flat order as in the weight."""
    if not part.transposed:
        return rows
    groups, (into, out) = part.groups, part.shape[:2]
    return rows.reshape(groups, out, into // groups, -1).transpose(1, 2)


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
        width = left.shape[-1] if left.dim() else 1
        return over(left, math.sqrt(math.fsum(row_energies(left, width))))
    return lamp(left)


def row_energies(scores: Tensor, width: int) -> list[float]:
    """Sum of squares of every width scores in C order: the same bits for any run of whole rows."""
    if scores.numel() == 0:
        return []
    return ops.row_energy(scores.reshape(-1, width), False, "scores").tolist()


def over(scores: Tensor, size: float) -> Tensor:
    """The scores over the norm of all of their layer's, float64."""
    left = scores.double()
    return left / size if size > 0 else left


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
