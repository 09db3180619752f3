# SPDX-License-Identifier: MIT
"""Selects which weights are kept, over any place: one selection of each layer, or one of all.

A selection says how the chunks of a layer are masked. Where a layer is one chunk and is used once,
scoring and masking are fused, and no score is stored; a layer that comes in many chunks has a
threshold first. A criterion with rows keeps the same number of weights in every output channel.

In one ranking over several layers, normalized scores (normalization.py) are not stored either: they
decide only how many weights each layer keeps (shares.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lap_ext import allocation
from lap_ext.criteria.context import in_chunk
from lap_ext.errors import LapValueError, in_layer
from lap_ext.ops import check, schema
from lap_ext.ops.reference.common import score_dtype
from lap_ext.places import Chunk
from lap_ext.progress import Step
from lap_ext.pruning import channels, normalization, shares, structured
from lap_ext.pruning.exact_sum import ExactSum
from lap_ext.pruning.kept_axes import KeptAxes
from lap_ext.pruning.scoring import BESIDE, How, Scoring, in_one_of, stores_scores
from lap_ext.pruning.structured import BestUnits, KeptUnits, Pattern, Structured
from lap_ext.pruning.thresholds import Threshold, bracket, key_of, threshold
from lap_ext.topology import Layer

_COPIES = 2  # keys that are held take the memory of so many, with their normalized scores
_SAMPLED = 32  # a sample has one weight of so many that are read for it


@dataclass(frozen=True)
class Stored:
    """The place holds the mask."""


@dataclass(frozen=True)
class Given:
    """The mask of a full layer, and how many weights it keeps."""

    mask: Tensor
    kept: int


@dataclass(frozen=True)
class AtOnce:
    """One operator masks the full layer: its keep best weights."""

    keep: int
    how: How


@dataclass(frozen=True)
class Cut:
    """Keys above key are kept, and the first ties[begin] of those equal to it of each slice.

    kept: how many weights of the layer are kept in all.
    """

    key: int
    ties: Mapping[int, int]
    how: How
    kept: int


@dataclass(frozen=True)
class Rows:
    """Each output channel keeps its counts[o] best weights; rows are output channels."""

    counts: Tensor


Selection: TypeAlias = Stored | Given | AtOnce | Cut | Rows | Structured | KeptAxes


def masked(
    scoring: Scoring, layer: Layer, selection: Selection, chunks: Iterable[Chunk]
) -> Iterator[tuple[Chunk, Tensor]]:
    """Masks chunks of a layer: all of it, or those of a slice from its first weight on."""
    scorer = None
    left = 0
    for chunk in chunks:
        if isinstance(selection, Stored):
            mask = scoring.place.mask(chunk)
            yield chunk, _all(chunk.weight) if mask is None else mask
            continue
        if isinstance(selection, Given):
            yield chunk, selection.mask
            continue
        if isinstance(selection, (Pattern, BestUnits, KeptUnits)):
            yield chunk, structured.mask(scoring, layer, selection, chunk)
            continue
        if isinstance(selection, KeptAxes):
            mask = selection.mask(chunk)
            live = None if selection.zeros else scoring.place.live(chunk)
            yield chunk, mask if live is None else mask & live
            continue
        how = selection.how if not isinstance(selection, Rows) else "plain"
        scorer = scorer or scoring.scorer(layer, how)
        if isinstance(selection, Cut):
            kept = []
            for piece, scores in scoring.scored_pieces(scorer, chunk):
                left = selection.ties.get(piece.first, left)
                live = scoring.place.live(piece)
                mask, taken = schema.call(schema.threshold_mask, scores, live, selection.key, left)
                left -= int(taken)
                kept.append(mask.flatten())
            mask = kept[0] if len(kept) == 1 else torch.cat(kept)
            yield chunk, mask.reshape(chunk.weight.shape)
            continue
        live, part = scoring.place.live(chunk), layer.roles[0].part
        if isinstance(selection, Rows):
            yield chunk, channels.mask_rows(scorer.of(chunk), chunk, part, selection.counts, live)
        elif scoring.by_row(layer):
            yield chunk, channels.mask(scorer.of(chunk), part, selection.keep, live)
        else:
            yield chunk, scorer.mask(chunk, selection.keep, live)


def settled(scoring: Scoring, layer: Layer, selection: Selection, step: Step) -> Selection:
    """Masks a layer now if its weights cannot be read again as they must be when they are masked.

    That is so in memory, and where a layer that is masked as a whole is stored in slices.
    """
    place = scoring.place
    again = len(place.starts(layer)) == 1 or not is_full(scoring, layer, selection)
    if again and not place.held:
        return selection
    store(scoring, layer, selection, step)
    return Stored()


def is_full(scoring: Scoring, layer: Layer, selection: Selection) -> bool:
    """Says whether a layer must be one chunk to be masked."""
    if isinstance(selection, (Stored, KeptAxes)):
        return False
    if isinstance(selection, (Pattern, BestUnits, KeptUnits)):
        return structured.is_full(scoring, layer, selection)
    return isinstance(selection, (Given, AtOnce)) or scoring.criterion(layer).needs_full


def store(scoring: Scoring, layer: Layer, selection: Selection, step: Step) -> None:
    """Gives the place the mask of a layer."""
    if isinstance(selection, Stored):
        return
    chunks = scoring.place.chunks(layer, is_full(scoring, layer, selection))
    scoring.place.set_masks(layer, masked(scoring, layer, selection, chunks))
    if not isinstance(selection, Given):
        step.read(layer.name, scoring.place.bytes(layer))


def _all(weight: Tensor) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool)


def of_layer(
    scoring: Scoring, layer: Layer, keep: int, name: str, how: How = "scaled"
) -> Selection:
    """Selects the best keep weights of a layer; the place notes what is found under a name."""
    criterion = scoring.criterion(layer)
    if scoring.by_row(layer) or stores_scores(criterion, layer):
        how = "plain"  # scores are compared as they are; each use would be scaled by itself
    if scoring.place.fits(layer, beside(scoring, layer)):
        return AtOnce(keep, how)
    if scoring.by_row(layer):
        return Rows(channels.counts(scoring, layer, keep))
    return _cuts(scoring, [layer], keep, how, name)[layer.name]


def beside(scoring: Scoring, layer: Layer) -> int:
    """Returns the bytes per weight beside a full layer that is masked at once."""
    if scoring.plan.options.structure is not None:
        return structured.beside(scoring, layer)
    criterion = scoring.criterion(layer)
    fused = not (scoring.by_row(layer) or criterion.replaces or stores_scores(criterion, layer))
    return 1 if fused else BESIDE


def of_all(
    scoring: Scoring, layers: Sequence[Layer], keep: int, floors: Mapping[str, int], name: str
) -> dict[str, Selection]:
    """Selects the best keep weights of all layers, but at least the best floors[name] of each.

    Args:
        scoring: gives the scores.
        layers: in the network's order.
        keep: how many to keep, in all layers together.
        floors: how many each layer keeps at least.
        name: under which the place notes what is found.
    """
    if scoring.plan.options.normalize != "none":
        find_sizes(scoring, layers, name)
        counts = scoring.place.noted(
            f"{name} shares", lambda: _shares(scoring, layers, keep, floors)
        )
        return {x.name: of_layer(scoring, x, counts[x.name], name, "plain") for x in layers}
    by_name = {layer.name: layer for layer in layers}
    result: dict[str, Selection] = {}

    def rank(names: Sequence[str], keep: int) -> dict[str, int]:
        some = [by_name[name] for name in names]
        found: Mapping[str, Given | Cut]
        if scoring.place.held:
            found = _masked_together(scoring, some, keep)
        else:
            found = _cuts(scoring, some, keep, "plain", name)
        result.update(found)
        return {name: x.kept for name, x in found.items()}

    allocation.rank_with_floors(list(by_name), keep, floors, rank)
    return result


def _masked_together(scoring: Scoring, layers: Sequence[Layer], keep: int) -> dict[str, Given]:
    """Masks layers that are all in memory by one operator."""
    step, items, lives, chunks = scoring.step("rank", layers), [], [], []
    for layer in layers:
        (chunk,) = scoring.chunks(layer, step)
        with in_chunk(chunk):
            items.append(scoring.scorer(layer).rankable(chunk))
        lives.append(scoring.place.live(chunk))
        chunks.append(chunk)
    every = []
    if any(live is not None for live in lives):
        every = [
            _all(item.x) if live is None else live.reshape(item.x.shape).contiguous()
            for item, live in zip(items, lives, strict=True)
        ]
    weights, groups = [item.x for item in items], [item.groups for item in items]
    rows, cols = [item.rows for item in items], [item.cols for item in items]
    names = [f"layer {layer.name!r}" for layer in layers]
    check.one_of_a_kind("device", [str(x.device) for x in weights], names)
    with in_one_of(layers):
        kept = schema.call(schema.global_mask, weights, rows, cols, groups, keep, every, True)
    masks = [mask.reshape(chunk.weight.shape) for chunk, mask in zip(chunks, kept, strict=True)]
    given = (Given(mask, int(mask.count_nonzero())) for mask in masks)
    return {layer.name: mask for layer, mask in zip(layers, given, strict=True)}


def _cuts(
    scoring: Scoring, layers: Sequence[Layer], keep: int, how: How, name: str
) -> dict[str, Cut]:
    """Finds the threshold of one ranking over layers that come in chunks."""

    def find() -> list[Any]:
        slices = [(layer, start) for layer in layers for start in scoring.place.starts(layer)]
        found, used = _threshold(scoring, layers, slices, keep, how)
        ties = zip(slices, found.ties, found.kept, strict=True)
        return [found.key, used, [[x.name, start, tie, kept] for (x, start), tie, kept in ties]]

    first = layers[0].name if len(layers) == 1 else f"of {len(layers)}"
    key, used, slices = scoring.place.noted(f"{name} threshold {first} {keep}", find)
    cuts = {layer.name: Cut(key, {}, used, 0) for layer in layers}
    for layer, start, ties, kept in slices:
        before = cuts[layer]
        cuts[layer] = Cut(key, {**before.ties, start: ties}, used, before.kept + kept)
    return cuts


def _threshold(
    scoring: Scoring,
    layers: Sequence[Layer],
    slices: Sequence[tuple[Layer, int]],
    keep: int,
    how: How,
) -> tuple[Threshold, How]:
    """Finds the threshold, and how scores are computed that it is for."""
    place = scoring.place
    count = sum(math.prod(layer.shape) for layer in layers)
    index_of = {(layer.name, start): index for index, (layer, start) in enumerate(slices)}

    def read() -> Iterator[tuple[int, Tensor, Tensor | None]]:
        step, index = scoring.step("rank", layers), 0
        for layer in layers:
            for piece, scores in scoring.scored(layer, how, step):
                index = index_of.get((layer.name, piece.first), index)
                yield index, scores, place.live(piece)

    dtype = _dtype(scoring, layers, how)
    interval = bracket(_sampled(scoring, layers, count, how, dtype), keep, count)
    capacity = place.capacity(count)
    found = threshold(read, len(slices), keep, interval, dtype, capacity, place.total)
    chosen = 0 < keep < count and sum(found.kept) == keep  # fewer: all that may be kept are
    if how == "scaled" and chosen and _underflows(found.key, dtype, layers[0]):
        return _threshold(scoring, layers, slices, keep, "wide")
    return found, how


def _sampled(
    scoring: Scoring, layers: Sequence[Layer], count: int, how: How, dtype: torch.dtype
) -> Tensor:
    """Scores a sample of layers; the fewer the weights, the larger their share of it."""
    wanted = min(scoring.place.sampled, round(count ** (2 / 3)))
    sampled = [torch.empty(0, dtype=dtype)]
    if wanted * _SAMPLED < count:
        for layer in layers:
            scorer = scoring.scorer(layer, how)
            if scorer.criterion.needs_full:
                return sampled[0]
            share = -(-math.prod(layer.shape) * wanted * _SAMPLED // count)
            for chunk in scoring.place.sample(layer, share):
                sampled.append(scorer.of(chunk).flatten()[::_SAMPLED].clone())
    return torch.cat(sampled)


def _dtype(scoring: Scoring, layers: Sequence[Layer], how: How) -> torch.dtype:
    kinds = {score_dtype(scoring.place.dtype(layer)) for layer in layers}
    return torch.float64 if how == "wide" or torch.float64 in kinds else torch.float32


def _underflows(key: int, dtype: torch.dtype, layer: Layer) -> bool:
    """Whether products of norms may have lost the order around a threshold."""
    if key > key_of(torch.finfo(dtype).tiny, dtype):
        return False
    if dtype == torch.float64 and key > 0:
        raise LapValueError(
            "products within float64's range",
            "scores around the threshold that underflow",
            "Multiply the weights of the layer by a power of two; a common factor changes no mask.",
            layer=layer.name,
        )
    return dtype != torch.float64


def _shares(
    scoring: Scoring, layers: Sequence[Layer], keep: int, floors: Mapping[str, int]
) -> dict[str, int]:
    """Finds how many weights each layer keeps in one ranking of normalized scores."""
    sources = {layer.name: _source(scoring, layer) for layer in layers}
    count = sum(source.count for source in sources.values())
    capacity = scoring.place.capacity(count) // _COPIES
    counts: dict[str, int] = {}

    def rank(names: Sequence[str], keep: int) -> dict[str, int]:
        some = [sources[name] for name in names]
        found = shares.shares(some, keep, capacity, scoring.place.total)
        new = dict(zip(names, found, strict=True))
        counts.update(new)
        return new

    allocation.rank_with_floors(list(sources), keep, floors, rank)
    return counts


def _source(scoring: Scoring, layer: Layer) -> shares.Source:
    """Describes the scores of a layer."""
    dtype, size = score_dtype(scoring.place.dtype(layer)), scoring.sizes.get(layer.name)
    read = partial(_ranked, scoring, layer)
    return shares.Source(layer.name, read, scoring.live_count(layer), dtype, size)


def _ranked(scoring: Scoring, layer: Layer) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scores a layer in chunks, and says which weights may be kept."""
    # in memory, only the ranking of the layer itself is reported
    step = None if scoring.place.held else scoring.step("rank", [layer])
    for piece, scores in scoring.scored(layer, "plain", step):
        yield scores, scoring.place.live(piece)


def find_sizes(scoring: Scoring, layers: Sequence[Layer], name: str) -> None:
    """Finds what normalize="norm" divides scores by; the place notes it under a name."""
    if scoring.plan.options.normalize == "norm":
        sizes = scoring.place.noted(f"{name} sizes", lambda: _sizes(scoring, layers))
        scoring.sizes.update(sizes)


def _sizes(scoring: Scoring, layers: Sequence[Layer]) -> dict[str, float]:
    """Computes the norm of the scores of each layer that has weights."""
    sizes = {}
    for layer in layers:
        if 0 in layer.shape:
            continue
        squares = ExactSum()
        for scores, live in _ranked(scoring, layer):
            kept = scores if live is None else scores * live
            with in_layer(layer.name):
                normalization.require_finite_scores(float(kept.max()), "norm")
            normalization.squares_of(kept.reshape(-1, layer.shape[-1]), squares)
        with in_layer(layer.name):
            sizes[layer.name] = normalization.size_of(squares)
    return sizes
