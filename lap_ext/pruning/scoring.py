# SPDX-License-Identifier: MIT
"""Scores of a layer's weights, a chunk of rows at a time: the same bits as of the full layer.

A score depends on its weight and on the norms of its row and column, so that chunks of rows can be
scored by themselves. If the layer has groups, a chunk is split where a group ends. A weight with
several roles (tied, shared or packed in parts) has the score sqrt(sum over roles of s^2), where s
is the score in one role. A criterion without norms is element-wise: its score is |w|, however often
the weight is used.

    plain   the scores that `lap_ext.scores` returns
    scaled  norms times powers of two, the largest in [0.5, 1): keys then sort as those of the
            fused mask do, unless products underflow
    wide    the same roundings with float64's range, for layers where that happens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lap_ext._text import some
from lap_ext.criteria import Criterion
from lap_ext.criteria.context import Network, in_chunk
from lap_ext.errors import LapError, LapValueError, callback, in_layer, warn
from lap_ext.ops import from_norms, ranking, schema, torch_args
from lap_ext.ops.partition import Scored, Units
from lap_ext.ops.reference.common import (
    exact_sqrt,
    require_finite,
    score_dtype,
)
from lap_ext.ops.reference.scale import scaled_to_one
from lap_ext.places import Chunk, Place
from lap_ext.places.place import RowRange, row_ranges, rows_of
from lap_ext.progress import Progress, Step
from lap_ext.pruning import normalization
from lap_ext.pruning.plan import Plan
from lap_ext.topology import Layer
from lap_ext.topology.roles import Part

How: TypeAlias = Literal["plain", "scaled", "wide"]

BESIDE = 36  # bytes per weight beside a full layer that is scored at once
_LISTED = 5  # of many layers, warnings list the first ones


class Scorer:
    """Computes the scores of a layer from its norms, as they are now.

    Args:
        network: gives the norms.
        criterion: the criterion.
        layer: to score.
        how: which scores.

    Attributes:
        known: layer name -> values, where a criterion that sees full layers is asked once for a
            ranking of several; None where it is asked each time.
    """

    known: dict[str, Tensor] | None = None

    def __init__(
        self, network: Network, criterion: Criterion, layer: Layer, how: How = "plain"
    ) -> None:
        self.network, self.criterion, self.layer, self.how = network, criterion, layer, how
        self._parts: list[tuple[Part, Tensor | None, Tensor | None]] = []
        if criterion.by_role:
            for role in layer.roles:
                into, out = criterion.norms(network, role)
                rows, cols = (into, out) if role.part.transposed else (out, into)
                if how != "plain":
                    rows, cols = (None if x is None else _to_one(x) for x in (rows, cols))
                self._parts.append((role.part, rows, cols))

    def values(self, chunk: Chunk) -> Tensor:
        """Returns what the criterion scores; a user's criterion may call lap_ext itself."""
        if not self.criterion.replaces:
            return chunk.weight
        known = self.known if self.criterion.needs_full else None
        if known is not None and self.layer.name in known:
            return known[self.layer.name]
        require_finite(chunk.weight, "w")  # no operator sees the weights
        with callback():
            values = self.criterion.weight(self.network, chunk)
        kind = score_dtype(self.network.place.dtype(self.layer))  # scores have it in every place
        values = values if score_dtype(values.dtype) == kind else values.to(kind)
        if self.criterion.needs_full:
            values = values.contiguous()
        if known is not None:
            known[self.layer.name] = values
        return values

    def of(self, chunk: Chunk) -> Tensor:
        """Scores a chunk, in its shape, float32 (float64 for float64 weights)."""
        with in_chunk(chunk):
            return self.of_values(chunk, self.values(chunk))

    def of_values(self, chunk: Chunk, weight: Tensor) -> Tensor:
        """Scores what stands for the weights of a chunk."""
        if not self._parts:
            # in rows: norms of ones are made for all columns
            block = weight if weight.dim() > 1 else weight.view(-1, self.layer.shape[-1])
            return self._times(block, None, None, 1).view(weight.shape)
        if stores_scores(self.criterion, self.layer):
            total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
            for part, rows, cols in self._parts:
                for x in row_ranges(part, chunk):
                    scores = self._scores_of(chunk, weight, part, rows, cols, x)
                    rows_of(chunk, total, part, x).add_(scores.double().square_())
            return exact_sqrt(total, out=total).to(score_dtype(weight.dtype))
        part, rows, cols = self._parts[0]
        ranges = row_ranges(part, chunk)
        every = [self._scores_of(chunk, weight, part, rows, cols, x).flatten() for x in ranges]
        if not every:
            every = [torch.empty(0, dtype=score_dtype(weight.dtype), device=weight.device)]
        return (every[0] if len(every) == 1 else torch.cat(every)).reshape(weight.shape)

    def rows(self, chunk: Chunk, shape: Sequence[int]) -> Iterator[Scored]:
        """Gives the rows of a chunk, each of a shape, for operators that score them themselves."""
        weight = self.values(chunk)
        first = chunk.first // max(torch.Size(shape).numel(), 1)
        if stores_scores(self.criterion, self.layer):
            scores = self.of_values(chunk, weight)
            yield Scored.of_scores(scores.reshape(-1, *shape), first)
        elif not self._parts:
            block = weight.reshape(-1, *shape)
            ones = torch.ones(max(block.shape[:2]), dtype=torch.float64, device=weight.device)
            yield Scored(block, ones[: block.shape[0]], ones[: block.shape[1]], 1, first)
        else:
            for part, rows, cols in self._parts:
                for x in row_ranges(part, chunk):
                    block = rows_of(chunk, weight, part, x)
                    norms = self._norms_of(block, part, rows, cols, x)
                    yield Scored(block, *norms, x.groups, x.top)

    def _norms_of(
        self, block: Tensor, part: Part, rows: Tensor | None, cols: Tensor | None, x: RowRange
    ) -> tuple[Tensor, Tensor]:
        """Cuts the norms of a range of rows, on the device of the block; None: ones."""
        count, width = block.shape[:2]
        ones = torch.ones(max(count, x.groups * width), dtype=torch.float64, device=block.device)
        if rows is None:
            rows = ones[:count]
        else:
            start = 0 if part.rows is None else part.rows[0]
            rows = rows[x.top - start : x.bottom - start]
        if cols is None:
            cols = ones[: x.groups * width]
        elif part.groups > 1:
            cols = cols[x.group * width : (x.group + x.groups) * width]
        return rows.to(block.device).contiguous(), cols.to(block.device).contiguous()

    def mask(self, chunk: Chunk, keep: int, live: Tensor | None) -> Tensor:
        """Selects the best keep weights of a full layer among the live ones."""
        with in_chunk(chunk):
            return self._mask(chunk, keep, live).reshape(chunk.weight.shape)

    def _mask(self, chunk: Chunk, keep: int, live: Tensor | None) -> Tensor:
        if stores_scores(self.criterion, self.layer):
            scores = self.of_values(chunk, self.values(chunk))
            return ranking.topk_mask(scores, keep=keep, mask=live)
        if self.how == "plain":
            item = self.rankable(chunk)
            masks = [] if live is None else [live.reshape(item.x.shape).contiguous()]
            lists = [item.x], [item.rows], [item.cols], [item.groups]
            with in_one_of([self.layer]):
                (kept,) = schema.call(schema.global_mask, *lists, keep, masks, True)
            return kept
        weight = self.values(chunk)
        if not self._parts:
            return from_norms.mask_from_norms(weight, None, None, keep=keep, mask=live)
        role = self.layer.roles[0]
        into, out = (_on(weight, x) for x in self.criterion.norms(self.network, role))
        part = role.part
        return from_norms.mask_from_norms(
            part.of(weight),
            into,
            out,
            keep=keep,
            mask=None if live is None else part.of(live),
            groups=part.groups,
            transposed=part.transposed,
        )

    def rankable(self, chunk: Chunk) -> Rankable:
        """Prepares a full layer for a ranking of several."""
        weight = self.values(chunk)
        if stores_scores(self.criterion, self.layer):
            scores = self.of_values(chunk, weight)
            none = scores.new_empty(0, dtype=torch.float64)
            return Rankable(scores, none, none)
        every = replace(self.layer.roles[0].part, rows=None, cols=None)  # without norms: any use
        part, rows, cols = self._parts[0] if self._parts else (every, None, None)
        x = torch_args.weight(part.of(weight), part.groups, part.transposed)
        into, out = (rows, cols) if part.transposed else (cols, rows)
        into, out = torch_args.given_norms(
            x, _on(x, into), _on(x, out), part.groups, part.transposed
        )
        rows, cols = (into, out) if part.transposed else (out, into)
        return Rankable(x, rows, cols, part.groups)

    def _scores_of(
        self,
        chunk: Chunk,
        weight: Tensor,
        part: Part,
        rows: Tensor | None,
        cols: Tensor | None,
        x: RowRange,
    ) -> Tensor:
        """Scores a range of rows, [rows, cols, *window]."""
        block = rows_of(chunk, weight, part, x)
        start = 0 if part.rows is None else part.rows[0]
        if rows is not None:
            rows = _on(weight, rows[x.top - start : x.bottom - start])
        if cols is not None and part.groups > 1:
            cols = cols[x.group * block.shape[1] : (x.group + x.groups) * block.shape[1]]
        return self._times(block, rows, _on(weight, cols), x.groups)

    def _times(
        self, block: Tensor, rows: Tensor | None, cols: Tensor | None, groups: int
    ) -> Tensor:
        """Computes |block| * (row norm * column norm)."""
        if self.how == "wide":
            return _wide(block, rows, cols, groups)
        return from_norms.score_from_norms(block, cols, rows, groups=groups)


@dataclass(frozen=True)
class Rankable:
    """A layer in a ranking of several: its weight with row and column norms, or its scores."""

    x: Tensor
    rows: Tensor  # float64 [R]; empty: x holds scores
    cols: Tensor  # float64 [groups * C]
    groups: int = 1


def stores_scores(criterion: Criterion, layer: Layer) -> bool:
    """Tells whether a score is more than |w| times two norms, so that no operator fuses it."""
    return criterion.by_role and not (len(layer.roles) == 1 and layer.roles[0].part.full)


@dataclass(frozen=True)
class Scoring:
    """A plan, the network that computes its scores, and the progress listener.

    Attributes:
        raw: whether layers whose scores are all 0 are ranked by them, and not by magnitude.
        dead: names of layers whose scores are all 0.
        sizes: the norms of scores that they are divided by (normalize="norm"), once known.
        units: layer name -> how many of its units are kept, and how many there are, once known.
        parts: (layer name, device) -> the units of the last layer that was cut.
    """

    plan: Plan
    network: Network
    on_progress: Callable[[Progress], Any] | None
    raw: bool
    dead: dict[str, None] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    parts: dict[tuple[str, str], Units] = field(default_factory=dict)
    _criteria: dict[str, Criterion] = field(default_factory=dict)
    _values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """Where the weights live."""
        return self.network.place

    def measure(self, name: str) -> None:
        """Measures the norms of all layers, unless the criterion reads none."""
        self._criteria.clear()
        self._values.clear()
        if not self.plan.layers or not self.plan.criterion.reads_norms:
            return
        self.network.set_squared_norms(self.place.noted_tensors(name, self._squared_norms))

    def _squared_norms(self) -> dict[str, Tensor]:
        self.network.measure(self.step("measure", self.network.unmeasured()))
        return self.network.squared_norms()

    def forget(self, layers: Iterable[Layer]) -> None:
        """Forgets what depends on masks of layers that have changed."""
        self._criteria.clear()
        self._values.clear()
        self.network.forget(layers)

    def step(self, name: str, layers: Sequence[Layer]) -> Step:
        """Begins a progress step that reads the weights of layers once."""
        return Step(self.on_progress, name, sum(map(self.place.bytes, layers)))

    def criterion(self, layer: Layer) -> Criterion:
        """Returns the criterion to rank a layer by: magnitude where all scores are 0."""
        known = self._criteria.get(layer.name)
        if known is None:
            known = self._criteria[layer.name] = self._chosen(layer)
        return known

    def by_row(self, layer: Layer) -> bool:
        """Whether weights are ranked within each output channel; not in one ranking of layers."""
        return self.plan.options.scope == "layer" and self.criterion(layer).rows

    def _chosen(self, layer: Layer) -> Criterion:
        criterion = self.plan.criterion
        if not self._scores_nothing(layer) or self.is_zero(layer):  # nothing is left to rank
            return criterion
        self.dead[layer.name] = None
        return criterion if self.raw else Criterion()

    def _scores_nothing(self, layer: Layer) -> bool:
        """Tells whether all scores of a layer are 0: what multiplies its weights is, in every use.

        That of a user's function is not looked at.
        """
        criterion = self.plan.criterion
        if criterion.replaces and criterion.reads_data:
            scorer = Scorer(self.network, criterion, layer)
            for chunk in self.place.chunks(layer, criterion.needs_full):
                with in_chunk(chunk):
                    if bool(scorer.values(chunk).any()):
                        break
            else:
                return True
        if not criterion.by_role:
            return False
        norms = (criterion.norms(self.network, role) for role in layer.roles)
        return all(any(x is not None and not bool(x.any()) for x in pair) for pair in norms)

    def is_zero(self, layer: Layer) -> bool:
        """Tells whether all weights of a layer that may be kept are zero; stops at another one."""
        for chunk in self.place.chunks(layer):
            mask, weight = self.place.mask(chunk), chunk.parameter
            if bool(weight.any() if mask is None else weight[mask].any()):
                return False
        return True

    def live_count(self, layer: Layer) -> int:
        """Counts the weights of a layer that may be kept; where that takes reading, all of them."""
        if not self.place.held:
            return math.prod(layer.shape)
        (chunk,) = self.place.chunks(layer)
        live = self.place.live(chunk)
        return chunk.weight.numel() if live is None else int(live.count_nonzero())

    def warn_of_dead(self) -> None:
        """Warns of the layers whose scores are all 0."""
        if not self.dead:
            return
        ranked = "last ({normalize='lamp'} ranks them by magnitude)" if self.raw else "by magnitude"
        warn(
            f"All scores are 0 in {some(map(repr, self.dead), _LISTED)}: the weights, scales, "
            f"inputs or gradients that multiply theirs are. Their weights were ranked {ranked}."
        )

    def scorer(self, layer: Layer, how: How = "plain") -> Scorer:
        """Prepares to score a layer as it is ranked."""
        scorer = Scorer(self.network, self.criterion(layer), layer, how)
        if self.place.held and self.plan.options.scope == "global":
            scorer.known = self._values
        return scorer

    def full(self, layer: Layer, step: Step) -> Tensor:
        """Scores all weights of a layer, normalized over those that its mask keeps."""
        scorer, full, mask = self.scorer(layer), None, None
        for chunk in self.chunks(layer, step):
            scores, kept = scorer.of(chunk), self.place.mask(chunk)
            if chunk.whole:
                full, mask = scores, kept
                continue
            if full is None:
                full = scores.new_empty(math.prod(layer.shape))
            if kept is not None and mask is None:
                mask = torch.ones(layer.shape, dtype=torch.bool)
            chunk.cut_from(full)[:] = scores
            if kept is not None and mask is not None:
                chunk.cut_from(mask)[:] = kept
        if full is None:
            full = torch.empty(0, dtype=score_dtype(self.place.dtype(layer)))
        with in_layer(layer.name):
            normalize = self.plan.options.normalize
            return normalization.normalized(full.view(layer.shape), normalize, mask)

    def chunks(self, layer: Layer, step: Step | None = None) -> Iterator[Chunk]:
        """Reads a layer in the chunks that the criterion needs."""
        full = self.criterion(layer).needs_full
        if full and not self.place.fits(layer, BESIDE):
            raise LapValueError(
                f"room for a full layer, which criterion {self.plan.criterion.name!r} needs, in "
                "{argument}",
                f"a layer of {self.place.bytes(layer):,} bytes beside its scores",
                "Raise it, or derive a class from Criterion whose weight() takes some rows.",
                layer=layer.name,
                argument="memory",
            )
        for chunk in self.place.chunks(layer, full):
            yield chunk
            if step is not None:
                step.read(layer.name, chunk.weight.nbytes)

    def scored(
        self, layer: Layer, how: How, step: Step | None = None
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """Scores a layer, as many weights at a time as fit into the cache."""
        scorer = self.scorer(layer, how)
        for chunk in self.chunks(layer, step):
            yield from self.scored_pieces(scorer, chunk)

    def scored_pieces(self, scorer: Scorer, chunk: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """Scores a chunk, in chunks that fit into the cache."""
        if not scorer.criterion.needs_full:
            yield from ((piece, scorer.of(piece)) for piece in chunk.split(self.place.pieces))
            return
        with in_chunk(chunk):
            values = scorer.values(chunk)
        for piece in chunk.split(self.place.pieces, self.place.starts(chunk.layer)):
            with in_chunk(piece):
                yield piece, scorer.of_values(piece, piece.cut_from(values))


@contextmanager
def in_one_of(layers: Sequence[Layer]) -> Iterator[None]:
    """Replaces w[i] in errors with the name of layer i."""
    try:
        yield
    except LapError as error:
        names = {f"w[{index}]": layer.name for index, layer in enumerate(layers)}
        if error.argument in names:
            error.layer, error.argument = names[error.argument], "w"
        raise


def _to_one(norm: Tensor) -> Tensor:
    return scaled_to_one(norm)[0]


def _on(weight: Tensor, norm: Tensor | None) -> Tensor | None:
    return None if norm is None else norm.to(weight.device)


def _wide(block: Tensor, rows: Tensor | None, cols: Tensor | None, groups: int) -> Tensor:
    """Computes scores in float64, rounded to 24 bits wherever the formula rounds."""
    ones = torch.ones(1, dtype=torch.float64, device=block.device)
    rows = ones.expand(block.shape[0]) if rows is None else rows
    cols = ones.expand(groups * block.shape[1]) if cols is None else cols
    norms = rows.contiguous(), cols.contiguous()
    return schema.call(schema.wide_score, block, *norms, groups, False)
