# SPDX-License-Identifier: MIT
"""Computes the scores and masks of layers from a criterion.

Where a layer has one role that uses its full weight, scoring and masking are fused, and no score
is stored. A weight with several roles (tied, shared or packed in parts) has the score sqrt(sum over
roles of s^2), where s is the score in one role. A criterion without norms is element-wise: its
score is |w|, however often the weight is used. A criterion with rows keeps the same number of
weights in every output channel.

In one ranking over several layers, normalized scores (normalization.py) are not stored either: they
decide only how many weights each layer keeps (shares.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lap_ext import allocation
from lap_ext._text import some
from lap_ext.criteria import Criterion
from lap_ext.criteria.context import Network
from lap_ext.errors import LapError, callback, in_layer
from lap_ext.ops import check, from_norms, ranking, schema, torch_args
from lap_ext.ops.reference.common import exact_sqrt, require_finite, score_dtype
from lap_ext.pruning import normalization, shares
from lap_ext.pruning.exact_sum import ExactSum
from lap_ext.topology import Layer
from lap_ext.topology.roles import Part, Role

_LISTED = 5  # of many layers, warnings list the first ones
_CHUNK = 1 << 17  # scores of a layer at a time
_HELD, _LEAST_HELD = 64, 1 << 16  # one score of so many may be held, and these always


def layer_scores(network: Network, criterion: Criterion, layer: Layer) -> Tensor:
    """Scores a layer's weights in the weight's shape.

    Scores are float32, or float64 if the weights are float64.
    """
    with in_layer(layer.name):
        return _layer_scores(network, criterion, layer)


def comparable_scores(
    network: Network, criterion: Criterion, layer: Layer, normalize: str, mask: Tensor | None
) -> Tensor:
    """Scores a layer's weights and normalizes the scores over the weights that mask keeps."""
    with in_layer(layer.name):
        scores = _layer_scores(network, criterion, layer)
        return normalization.normalized(scores, normalize, mask)


def _layer_scores(network: Network, criterion: Criterion, layer: Layer) -> Tensor:
    weight = _weight(network, criterion, layer)
    roles = layer.roles
    if not criterion.by_role:
        return from_norms.score_from_norms(weight, None, None)
    if len(roles) == 1 and roles[0].part.full:
        return _role_scores(network, criterion, roles[0], weight).reshape(weight.shape)
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for role in roles:
        scores = _role_scores(network, criterion, role, weight)
        role.part.of(total).add_(scores.double().square_())
    return exact_sqrt(total, out=total).to(score_dtype(weight.dtype))


def _weight(network: Network, criterion: Criterion, layer: Layer) -> Tensor:
    """Returns what the criterion scores; a user's criterion may call lap_ext itself."""
    if criterion.replaces:  # no operator sees the weights
        require_finite(network.weight(layer), "w")
    with callback():
        return criterion.weight(network, layer)


def _role_scores(network: Network, criterion: Criterion, role: Role, weight: Tensor) -> Tensor:
    """Scores the block of the weight that a role uses, [rows, cols, *window]."""
    into, out = _on(weight, criterion.norms(network, role))
    part = role.part
    return from_norms.score_from_norms(
        part.of(weight), into, out, groups=part.groups, transposed=part.transposed
    )


def scores_nothing(network: Network, criterion: Criterion, layer: Layer) -> bool:
    """Tells whether all scores of a layer are 0: what multiplies its weights is, in every use."""
    if criterion.replaces and type(criterion).prepare is not Criterion.prepare:  # of data
        return not bool(_weight(network, criterion, layer).any())
    if not criterion.by_role:
        return False
    norms = (criterion.norms(network, role) for role in layer.roles)
    return all(any(x is not None and not bool(x.any()) for x in pair) for pair in norms)


def dead_text(names: Iterable[str], raw: bool) -> str:
    """Says which layers have scores that are all 0; raw: whether these were ranked as they are."""
    ranked = "last ({normalize='lamp'} ranks them by magnitude)" if raw else "by magnitude"
    return (
        f"All scores are 0 in {some(map(repr, names), _LISTED)}: the weights, scales, inputs or "
        f"gradients that multiply theirs are. Their weights were ranked {ranked}."
    )


def layer_mask(
    network: Network,
    criterion: Criterion,
    layer: Layer,
    keep: int,
    mask: Tensor | None,
) -> Tensor:
    """Selects the best keep weights of a layer among those that mask keeps."""
    with in_layer(layer.name):
        return _layer_mask(network, criterion, layer, keep, mask)


def _layer_mask(
    network: Network, criterion: Criterion, layer: Layer, keep: int, mask: Tensor | None
) -> Tensor:
    if criterion.rows:
        return row_mask(layer_scores(network, criterion, layer), layer.roles[0].part, keep, mask)
    if not criterion.by_role:
        weight = _weight(network, criterion, layer)
        return from_norms.mask_from_norms(weight, None, None, keep=keep, mask=mask)
    if stores_scores(criterion, layer):
        return ranking.topk_mask(layer_scores(network, criterion, layer), keep=keep, mask=mask)
    role = layer.roles[0]
    weight = _weight(network, criterion, layer)
    into, out = _on(weight, criterion.norms(network, role))
    part = role.part
    kept = from_norms.mask_from_norms(
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
    """Selects the best weights of every output channel, keep weights in total.

    Only weights that mask keeps may be selected. Every channel keeps the same number, or all that
    it has if it has fewer. If weights remain to be kept, the first channels that have more keep one
    more each. Of equal scores in a channel, the one with the lower flat index is kept.
    """
    rows = _rows(scores, part)  # [O, weights per channel]
    eligible = None if mask is None else _rows(mask, part)
    n = rows.shape[1]
    capacity = torch.full(rows.shape[:1], n) if eligible is None else eligible.sum(1).cpu()
    counts = even_counts(capacity, keep)
    if eligible is not None:
        rows = rows.masked_fill(~eligible, -1.0)
    order = rows.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(n, device=rows.device) < counts.to(rows.device)[:, None]
    kept = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device).scatter_(1, order, first)
    return _from_rows(kept, part).reshape(scores.shape)


def even_counts(capacity: Tensor, keep: int) -> Tensor:
    """Splits keep evenly over rows, up to the capacity of each; returns counts, int64 [rows].

    The first rows with capacity left get one more each from the remainder.

    Example:
        >>> even_counts(torch.tensor([5, 1, 5]), 8)     # 3, 1, 3 and one left over
        tensor([4, 1, 3])
    """
    low, high = 0, int(capacity.max()) if capacity.numel() else 0
    while low < high:  # the largest count per row that fits
        level = (low + high + 1) // 2
        if int(capacity.clamp(max=level).sum()) <= keep:
            low = level
        else:
            high = level - 1
    counts = capacity.clamp(max=low)
    remainder = max(keep - int(counts.sum()), 0)
    more = (capacity > low).nonzero().flatten()[:remainder]
    counts[more] += 1
    return counts


def _rows(x: Tensor, part: Part) -> Tensor:
    """Reshapes a tensor like a weight to one row per output channel, in flat order in each."""
    matrix = x.reshape(part.shape)
    if not part.transposed:
        return matrix.flatten(1)
    groups, (into, out) = part.groups, part.shape[:2]
    split = matrix.reshape(groups, into // groups, out, -1)  # group, input, output, window
    return split.transpose(1, 2).reshape(groups * out, -1)


def _from_rows(rows: Tensor, part: Part) -> Tensor:
    """Inverts `_rows`: back to the flat order of the weight."""
    if not part.transposed:
        return rows
    groups, (into, out) = part.groups, part.shape[:2]
    return rows.reshape(groups, out, into // groups, -1).transpose(1, 2)


@dataclass(frozen=True)
class Rankable:
    """A layer in a ranking of several: its weight with row and column norms, or its scores."""

    x: Tensor
    rows: Tensor  # float64 [R]; empty: x holds scores
    cols: Tensor  # float64 [groups * C]
    groups: int = 1
    normalize: str = "none"


def stores_scores(criterion: Criterion, layer: Layer) -> bool:
    """Tells whether a score is more than |w| times two norms, so that no operator fuses it."""
    return criterion.by_role and not (len(layer.roles) == 1 and layer.roles[0].part.full)


def rankable(network: Network, criterion: Criterion, layer: Layer, normalize: str) -> Rankable:
    """Prepares a layer for a ranking of several."""
    if stores_scores(criterion, layer):
        scores = layer_scores(network, criterion, layer)
        none = scores.new_empty(0, dtype=torch.float64)
        return Rankable(scores, none, none, normalize=normalize)
    part = layer.roles[0].part
    with in_layer(layer.name):
        weight = _weight(network, criterion, layer)
        norms = criterion.norms(network, layer.roles[0]) if criterion.by_role else (None, None)
        x = torch_args.weight(part.of(weight), part.groups, part.transposed)
        into, out = _on(weight, norms)
        into, out = torch_args.given_norms(x, into, out, part.groups, part.transposed)
    rows, cols = (into, out) if part.transposed else (out, into)
    return Rankable(x, rows, cols, part.groups, normalize)


def global_masks(
    layers: Sequence[Layer],
    rankables: Sequence[Rankable],
    keep: int,
    masks: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Selects the best keep weights of all layers in one ranking; layers are in network order."""
    eligible = {
        layer.name: masks[layer.name].reshape(item.x.shape).contiguous()
        for layer, item in zip(layers, rankables, strict=True)
        if layer.name in masks
    }
    if any(item.normalize != "none" for item in rankables):
        return _normalized_masks(layers, rankables, keep, eligible)
    dtypes = [str(score_dtype(item.x.dtype)) for item in rankables]
    names = [f"layer {layer.name!r}" for layer in layers]
    check.one_of_a_kind("dtype", dtypes, names)
    check.one_of_a_kind("device", [str(item.x.device) for item in rankables], names)
    return _ranked_together(layers, rankables, keep, eligible)


def _ranked_together(
    layers: Sequence[Layer],
    rankables: Sequence[Rankable],
    keep: int,
    eligible: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    every = []
    if eligible:
        every = [
            eligible[layer.name]
            if layer.name in eligible
            else torch.ones(item.x.shape, dtype=torch.bool, device=item.x.device)
            for layer, item in zip(layers, rankables, strict=True)
        ]
    weights = [item.x for item in rankables]
    rows, cols = [item.rows for item in rankables], [item.cols for item in rankables]
    groups = [item.groups for item in rankables]
    with _in_one_of(layers):
        kept = schema.call(schema.global_mask, weights, rows, cols, groups, keep, every, True)
    return {layer.name: mask.reshape(layer.shape) for layer, mask in zip(layers, kept, strict=True)}


def _normalized_masks(
    layers: Sequence[Layer],
    rankables: Sequence[Rankable],
    keep: int,
    eligible: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Selects in each layer as many weights as are its share of the ranking."""
    sources = []
    for layer, item in zip(layers, rankables, strict=True):
        mask = eligible.get(layer.name)
        with in_layer(layer.name):
            sources.append(_source(layer, item, mask))
    total = sum(source.count for source in sources)
    capacity = max(total // _HELD, _LEAST_HELD)
    masks: dict[str, Tensor] = {}
    for layer, item, share in zip(
        layers, rankables, shares.shares(sources, keep, capacity), strict=True
    ):
        masks |= _ranked_together([layer], [item], share, eligible)
    return masks


def _source(layer: Layer, item: Rankable, mask: Tensor | None) -> shares.Source:
    """Describes the scores of a layer; those that mask prunes may not be kept."""

    def read() -> Iterator[Tensor]:
        for rows in _row_chunks(item):
            with in_layer(layer.name):
                scores = _scores_of_rows(item, rows)
            yield scores if mask is None else torch.where(mask[rows], scores, -1.0)

    size = None
    if item.x.numel() == 0:
        return shares.Source(layer.name, read, 0, score_dtype(item.x.dtype), size)
    if item.normalize == "norm":
        squares = ExactSum()
        for rows in _row_chunks(item, layer.shape[-1]):
            scores = _scores_of_rows(item, rows)
            scores = scores if mask is None else scores * mask[rows]
            normalization.require_finite_scores(float(scores.max()), item.normalize)
            normalization.squares_of(scores.reshape(-1, layer.shape[-1]), squares)
        size = normalization.size_of(squares)
    count = item.x.numel() if mask is None else int(mask.count_nonzero())
    return shares.Source(layer.name, read, count, score_dtype(item.x.dtype), size)


def _row_chunks(item: Rankable, width: int = 1) -> Iterator[slice]:
    """Splits the rows into chunks of whole groups, or inside one; of multiples of width scores."""
    height, length = item.x.shape[0], max(item.x[:1].numel(), 1)
    group = max(height // item.groups, 1)
    rows = height if length % width else max(_CHUNK // length, 1)
    if rows >= group:
        rows -= rows % group
        group = height
    for top in range(0, height, max(group, 1)):
        for begin in range(top, top + group, rows):
            yield slice(begin, min(begin + rows, top + group))


def _scores_of_rows(item: Rankable, rows: slice) -> Tensor:
    """Scores rows [begin, end) of a layer."""
    x = item.x[rows]
    if item.rows.numel() == 0:
        return x
    group, columns = item.x.shape[0] // item.groups, item.x.shape[1]
    first, groups = rows.start // group, max(x.shape[0] // group, 1)
    cols = item.cols[first * columns : (first + groups) * columns]
    try:
        return schema.call(schema.score, x, cols, item.rows[rows], groups, False, True)
    except LapError:
        require_finite(item.x, "w")  # names the index in the layer
        raise


def floored_masks(
    layers: Sequence[Layer],
    rankables: Sequence[Rankable],
    keep: int,
    masks: Mapping[str, Tensor],
    floors: Mapping[str, int],
) -> dict[str, Tensor]:
    """Selects the best keep weights of all layers, but at least the best floors[name] of each."""
    items = {layer.name: (layer, x) for layer, x in zip(layers, rankables, strict=True)}
    kept: dict[str, Tensor] = {}

    def rank(names: Sequence[str], keep: int) -> dict[str, int]:
        some, ranked = zip(*(items[name] for name in names), strict=True)
        new = global_masks(some, ranked, keep, masks)
        kept.update(new)
        return {name: int(mask.count_nonzero()) for name, mask in new.items()}

    allocation.rank_with_floors(list(items), keep, floors, rank)
    return {name: kept[name] for name in items}


@contextmanager
def _in_one_of(layers: Sequence[Layer]) -> Iterator[None]:
    """Replaces w[i] in errors with the name of layer i."""
    try:
        yield
    except LapError as error:
        names = {f"w[{index}]": layer.name for index, layer in enumerate(layers)}
        if error.argument in names:
            error.layer, error.argument = names[error.argument], "w"
        raise


def _on(weight: Tensor, norms: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.to(weight.device) for x in norms)
