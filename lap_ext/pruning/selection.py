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
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext.criteria import Criterion
from lap_ext.criteria.context import Network
from lap_ext.ops import check, from_norms, ranking, schema, torch_args
from lap_ext.ops.reference.common import exact_sqrt, score_dtype
from lap_ext.topology import Layer
from lap_ext.topology.roles import Part, Role

NORMALIZATIONS = ("none", "norm", "lamp")


def layer_scores(network: Network, criterion: Criterion, layer: Layer) -> Tensor:
    """Scores of a layer's weights, the weight's shape, float32 (float64 for float64 weights)."""
    with _of(layer, network):
        return _layer_scores(network, criterion, layer)


def comparable_scores(
    network: Network, criterion: Criterion, layer: Layer, normalize: str, mask: Tensor | None
) -> Tensor:
    """Scores of a layer's weights, normalized; mask: the weights that count."""
    with _of(layer, network):
        return normalized(_layer_scores(network, criterion, layer), normalize, mask)


def _layer_scores(network: Network, criterion: Criterion, layer: Layer) -> Tensor:
    weight = criterion.weight(network, layer)
    roles = layer.roles
    if not criterion.by_role:
        return from_norms.score_from_factors(weight, None, None)
    if len(roles) == 1 and roles[0].part.whole:
        return _role_scores(network, criterion, roles[0], weight).reshape(weight.shape)
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for role in roles:
        scores = _role_scores(network, criterion, role, weight)
        role.part.of(total).add_(scores.double().square_())
    return exact_sqrt(total, out=total).to(score_dtype(weight.dtype))


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
    return from_norms.score_from_factors(
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
        return from_norms.mask_from_factors(weight, None, None, keep=keep, mask=mask)
    if len(layer.roles) > 1 or not layer.roles[0].part.whole:
        return ranking.topk_mask(layer_scores(network, criterion, layer), keep, mask=mask)
    role = layer.roles[0]
    weight = criterion.weight(network, layer)
    into, out = _on(weight, criterion.factors(network, role))
    part = role.part
    kept = from_norms.mask_from_factors(
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


@dataclass(frozen=True)
class Ranked:
    """A layer in a ranking of several: a weight with norms of its rows and columns, or its scores."""

    x: Tensor
    rows: Tensor  # float64 [R]; empty: x is scores
    cols: Tensor  # float64 [groups * C]
    groups: int = 1


def stores_scores(criterion: Criterion, layer: Layer, normalize: str) -> bool:
    """Whether a ranking of several layers needs this one's scores in memory."""
    fused = not criterion.by_role or (len(layer.roles) == 1 and layer.roles[0].part.whole)
    return normalize != "none" or not fused


def ranked(
    network: Network, criterion: Criterion, layer: Layer, normalize: str, mask: Tensor | None
) -> Ranked:
    """What a ranking of several layers reads of one; mask: the weights that count."""
    if stores_scores(criterion, layer, normalize):
        scores = comparable_scores(network, criterion, layer, normalize, mask)
        none = scores.new_empty(0, dtype=torch.float64)
        return Ranked(scores, none, none)
    part = layer.roles[0].part
    with _of(layer, network):
        weight = criterion.weight(network, layer)
        found = criterion.factors(network, layer.roles[0]) if criterion.by_role else (None, None)
        x = torch_args.weight(network.function, part.of(weight), part.groups, part.transposed)
        into, out = _on(weight, found)
        into, out = torch_args.given_norms(
            network.function, x, into, out, part.groups, part.transposed
        )
    rows, cols = (into, out) if part.transposed else (out, into)
    return Ranked(x, rows, cols, part.groups)


def global_masks(
    network: Network,
    layers: Sequence[Layer],
    found: Sequence[Ranked],
    keep: int,
    masks: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Masks of the keep best weights of all layers as one ranking, layers in order."""
    function = network.function
    kinds = [str(score_dtype(x.x.dtype)) for x in found]
    check.one_of_a_kind(function, "dtype", kinds)
    check.one_of_a_kind(function, "device", [str(x.x.device) for x in found])
    eligible = []
    if masks:
        given = [masks.get(layer.name) for layer in layers]
        eligible = [
            torch.ones(x.x.shape, dtype=torch.bool, device=x.x.device)
            if mask is None
            else mask.reshape(x.x.shape).contiguous()
            for x, mask in zip(found, given, strict=True)
        ]
    lists = ([x.x for x in found], [x.rows for x in found], [x.cols for x in found])
    groups = [x.groups for x in found]
    with _of_one(layers, network):
        kept = schema.call(function, schema.global_mask, *lists, groups, keep, eligible, True)
    return {layer.name: mask.reshape(layer.shape) for layer, mask in zip(layers, kept, strict=True)}


@contextmanager
def _of_one(layers: Sequence[Layer], network: Network) -> Iterator[None]:
    """Errors about w[3] name the fourth layer."""
    try:
        yield
    except ValueError as error:
        place = re.search(r" in w\[(\d+)\],", str(error))
        if place is None:
            raise
        with _of(layers[int(place[1])], network):
            raise ValueError(str(error).replace(place[0], " in w,")) from None


def normalized(scores: Tensor, how: str, mask: Tensor | None) -> Tensor:
    """Scores of one layer made comparable with other layers'; mask: the ones that count."""
    if how == "none":
        return scores
    left = scores.double()
    if mask is not None:
        left = left * mask
    if left.numel() and math.isinf(left.max()):
        raise ValueError(
            f"normalize: expected finite scores for normalize={how!r}, got infinite ones: products "
            "of a weight and norms beyond the range of their dtype. Convert the model to float64, or "
            "scale its weights down."
        )
    if how == "norm":
        width = left.shape[-1] if left.dim() else 1
        return over(left, math.sqrt(math.fsum(row_energies(left, width))))
    return lamp(left)


def row_energies(scores: Tensor, width: int) -> list[float]:
    """Sum of squares of every width scores in C order: the same bits for any run of whole rows."""
    if scores.numel() == 0:
        return []
    return schema.row_energy(scores.reshape(-1, width), False, "scores").tolist()


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
