# SPDX-License-Identifier: MIT
"""Computes the lookahead norms of every role of a traced model from its present weights.

    score^2 = w^2 * in_norm[i]^2 * out_norm[o]^2, summed over the roles of the weight

The operators of ops/schema.py read each weight once and give its squared row and column norms; two
passes over the channel graph (topology/propagate.py) then give all norms. Weights come from a place
in chunks of rows: a layer that is one chunk is measured at once, others are added up (ops/
channel_sums.py) to the same bits. Masks that the place is given during sequential pruning take
effect at once: the weights that they prune no longer count in the neighbor norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lap_ext.criteria.statistics.measured import Statistics
from lap_ext.errors import LapError, LapValueError, in_layer
from lap_ext.ops import schema
from lap_ext.ops.channel_sums import ChannelSums
from lap_ext.ops.layer import neighbor_norms
from lap_ext.ops.neighbors import Neighbor
from lap_ext.ops.reference.common import exact_sqrt, require_finite, score_dtype
from lap_ext.ops.reference.norms import SEGMENT_ROWS
from lap_ext.places import Chunk, Place, readable
from lap_ext.places.place import row_ranges, rows_of
from lap_ext.progress import Step
from lap_ext.topology import Layer, edges
from lap_ext.topology.propagate import Propagation
from lap_ext.topology.roles import Role
from lap_ext.topology.walks import Walker

_COPIED = 1 << 20  # weights of a layer that may be masked or scaled in a copy
_FOLDED = 16  # bytes per weight that norms of scaled weights need beside them, in float64


class Network:
    """The layers of a place whose weights are scored, together with the norms of their roles.

    Args:
        place: where the weights live.
        batch_norm: "edge" counts each batch norm on the edge on which it lies; "fold" also counts
            the batch norm that follows a consumer, in the rows of the consumer's column norms;
            "ignore" counts none.
        check_finite: whether to raise an error if a weight is inf or NaN.
        chain: names of layers. Each layer then has only the neighbors just before and after it in
            this list, as in the paper's public code, regardless of residual connections. With None,
            all neighbors count.

    Attributes:
        statistics: what a criterion of data has measured; empty for others.
        activity: for each role, the probability that each output is active, float64 [O], or None
            for a probability of 1.
        surrogate: gives what stands for the weights of a chunk in the norms, or None.
    """

    def __init__(
        self,
        place: Place,
        batch_norm: str = "edge",
        check_finite: bool = True,
        chain: Sequence[str] | None = None,
    ) -> None:
        self.place, self.topology = place, place.topology
        self.batch_norm = batch_norm
        self.check_finite = check_finite
        self.chain = chain
        self.statistics = Statistics()
        self.activity: list[Tensor | None] = [None] * len(self.topology.roles)
        self.surrogate: Callable[[Chunk], Tensor] | None = None
        self._propagation = Propagation(
            self.topology.graph, self.topology.tensors(), batch_norm=batch_norm != "ignore"
        )
        self._squared_norms: list[tuple[Tensor, Tensor] | None] = [None] * len(self.topology.roles)
        self._norms: list[tuple[Tensor, Tensor]] | None = None

    def index(self, role: Role) -> int:
        """Returns the number of a role."""
        return self.topology.roles.index(role)

    def forget(self, layers: Iterable[Layer]) -> None:
        """Forgets the norms that weights of layers count in: their masks have changed."""
        names = {layer.name for layer in layers}
        self._norms = None
        for index, role in enumerate(self.topology.roles):
            if role.layer in names:
                self._squared_norms[index] = None

    def norm_scale(self, role: Role) -> Tensor | None:
        """Returns the scale, float64 [O], of the batch norm that alone follows a role, or None."""
        return self._propagation.norm_scale(role)

    def norms(self, role: Role) -> tuple[Tensor, Tensor]:
        """Returns (in_norm [I], out_norm [O]) of a role in float64, on the CPU."""
        if self._norms is None:
            self.measure(Step(None, "measure", 0))
            squared_norms = [pair for pair in self._squared_norms if pair is not None]  # all
            if self.chain is None:
                self._norms = self._propagation.norms(*zip(*squared_norms, strict=True))
            else:
                self._norms = self._chain_norms(self.chain)
            self._apply_named_neighbors()
        return self._norms[self.index(role)]

    def unmeasured(self) -> list[Layer]:
        """Lists the layers with squared norms that `norms` needs but that are not measured yet."""
        pairs = zip(self.topology.roles, self._squared_norms, strict=True)
        names = dict.fromkeys(role.layer for role, pair in pairs if pair is None)
        return [self.topology.layers[name] for name in names]

    def measure(self, step: Step) -> None:
        """Measures the squared norms that `norms` still needs; counts what is read in a step."""
        if self.check_finite:
            self._propagation.check()
        layers = self.place.ordered(self.unmeasured())
        beside = _FOLDED if self.batch_norm == "fold" or self.surrogate else 0
        for layer, chunks in self.place.each(layers, beside):
            with in_layer(layer.name):
                self._measure_layer(layer, chunks, step)

    def squared_norms(self) -> dict[str, Tensor]:
        """Returns the squared norms by name, as `set_squared_norms` takes them."""
        return {
            f"{index}.{side}": squared_norm
            for index, pair in enumerate(self._squared_norms)
            if pair is not None
            for side, squared_norm in zip(("in", "out"), pair, strict=True)
        }

    def set_squared_norms(self, state: Mapping[str, Tensor]) -> None:
        """Sets the squared norms of all roles."""
        self._norms = None
        for index in range(len(self._squared_norms)):
            self._squared_norms[index] = (state[f"{index}.in"], state[f"{index}.out"])

    def _measure_layer(self, layer: Layer, chunks: Iterator[Chunk], step: Step) -> None:
        """Measures squared norms of a layer's roles, float64, on the CPU."""
        sums: list[ChannelSums] | None = None
        for chunk in chunks:
            with in_chunk(chunk):
                if chunk.whole:
                    weight, mask = self._value(chunk), self.place.mask(chunk)
                    for role in layer.roles:
                        index = self.index(role)
                        self._squared_norms[index] = self._measure(index, weight, mask)
                else:
                    sums = sums or [self._sums(role) for role in layer.roles]
                    self._add(sums, chunk)
            step.read(layer.name, chunk.weight.nbytes)
        if 0 in layer.shape and sums is None:  # it may have no chunk
            sums = [self._sums(role) for role in layer.roles]
        for role, role_sums in zip(layer.roles, sums or (), strict=False):
            self._squared_norms[self.index(role)] = self._active(role, role_sums.squared_norms())

    def _value(self, chunk: Chunk) -> Tensor:
        """Returns what stands for the weights of a chunk."""
        return chunk.weight if self.surrogate is None else self.surrogate(chunk)

    def _sums(self, role: Role) -> ChannelSums:
        part, scale = role.part, self.row_weight(role)
        options = part.groups, part.transposed, scale, self.check_finite
        return ChannelSums(part.block, *options, "cpu")

    def _add(self, sums: Sequence[ChannelSums], chunk: Chunk) -> None:
        """Adds a chunk to the sums of the roles of its layer."""
        weight, mask = self._value(chunk), self.place.mask(chunk)
        if mask is not None:
            if self.check_finite:
                require_finite(weight, "w")
            weight = weight * mask
        for role, role_sums in zip(chunk.layer.roles, sums, strict=True):
            for x in row_ranges(role.part, chunk):
                role_sums.add(rows_of(chunk, weight, role.part, x))

    def _active(self, role: Role, norms: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Counts outputs of a role as often as they are active."""
        active = self.activity[self.index(role)]
        into, out = norms
        return (into, out) if active is None else (into, out * active)

    def _measure(self, index: int, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Measures squared norms of a role's inputs [I] and outputs [O], float64, on the CPU."""
        role = self.topology.roles[index]
        block, scale = role.part.of(weight), self.row_weight(role)
        if scale is None and mask is None:
            return self._both_squared_norms(block, role)
        if mask is not None:
            mask = role.part.of(mask)
        if block.numel() > _COPIED:
            return self._active(role, self._squared_norms_of_rows(block, mask, scale, role))
        block = block if mask is None else block * mask
        if scale is None:
            return self._both_squared_norms(block, role)
        out = self._squared_norm(block, role, of_inputs=False)
        into = self._squared_norm(scaled(block, scale, role), role, of_inputs=True)
        return self._active(role, (into, out))

    def _squared_norms_of_rows(
        self, block: Tensor, mask: Tensor | None, scale: Tensor | None, role: Role
    ) -> tuple[Tensor, Tensor]:
        """Measures some rows of a block at a time: no copy of it is made."""
        if self.check_finite:
            require_finite(block, "w")  # names the index in the block
        groups, transposed = role.part.groups, role.part.transposed
        finite, device = self.check_finite, block.device
        sums = ChannelSums(block.shape, groups, transposed, scale, finite, device)
        for top in range(0, block.shape[0], SEGMENT_ROWS):
            rows = block[top : top + SEGMENT_ROWS]
            sums.add(rows if mask is None else rows * mask[top : top + SEGMENT_ROWS])
        into, out = sums.squared_norms()
        return into.cpu(), out.cpu()

    def _both_squared_norms(self, block: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        """Computes the squared norms of a block's input and output channels, reading it once."""
        options = (role.part.groups, self.check_finite, "w")
        row, col = schema.call(schema.squared_norms, block, *options)
        into, out = (row, col) if role.part.transposed else (col, row)
        return into.cpu(), out.cpu()

    def _squared_norm(self, block: Tensor, role: Role, of_inputs: bool) -> Tensor:
        """Computes the squared norms of a block's input or output channels, float64, on the CPU."""
        options = (self.check_finite, "w")
        if of_inputs == role.part.transposed:
            result = schema.call(schema.row_squared_norms, block, *options)
        else:
            groups = role.part.groups
            result = schema.call(schema.col_squared_norms, block, groups, *options)
        return result.cpu()

    def row_weight(self, role: Role) -> Tensor | None:
        """Returns each output channel's scale in column norms, float64 [O], or None for ones."""
        scale = self.norm_scale(role) if self.batch_norm == "fold" else None
        active = self.activity[self.index(role)]
        if active is not None:
            root = exact_sqrt(active)
            scale = root if scale is None else scale * root
        return scale

    def _chain_norms(self, chain: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Computes each role's norms from its neighbors in a chain; ones where there is no edge."""
        before = {b: a for a, b in pairwise(chain)}
        after = dict(pairwise(chain))
        roles, batch_norm = self.topology.roles, self.batch_norm != "ignore"
        walker = Walker(self.topology.graph, self.topology.tensors(), batch_norm)
        result = []
        for role in roles:
            sides = (
                (edges.producers, before, role.part.channels[0], 1),
                (edges.consumers, after, role.part.channels[1], 0),
            )
            norms = []
            for find, neighbor, n, side in sides:
                squared_norm = torch.zeros(n, dtype=torch.float64)
                name = neighbor.get(role.layer)
                every = [] if name is None else find(walker, [role])
                to_neighbor = [edge for edge in every if edge.kind == "layer" and edge.name == name]
                for edge in to_neighbor:
                    given = self._squared_norms[self._first_role(edge.name)]
                    assert given is not None
                    scale = 1.0 if edge.scale is None else edge.scale.square()
                    squared_norm.index_add_(0, edge.here, given[side][edge.there] * scale)
                root = exact_sqrt(squared_norm)
                norms.append(root if to_neighbor else torch.ones_like(root))
            result.append((norms[0], norms[1]))
        return result

    def _first_role(self, name: str) -> int:
        return next(r for r, role in enumerate(self.topology.roles) if role.layer == name)

    def _apply_named_neighbors(self) -> None:
        """Replaces the norms of layers whose neighbors the user has named."""
        for name, (prev, following) in self.topology.neighbors.items():
            layer = self.topology.layers[name]
            for role in layer.roles:
                into, out = neighbor_norms(
                    self.as_neighbors(prev),
                    role.part.of(self.full(layer)),
                    self.as_neighbors(following),
                    groups=role.part.groups,
                    transposed=role.part.transposed,
                    check_finite=self.check_finite,
                )
                assert self._norms is not None
                self._norms[self.index(role)] = (into.cpu(), out.cpu())

    def full(self, layer: Layer, *, masked: bool = False) -> Tensor:
        """Reads what stands for a full layer, zero where its mask has pruned it."""
        (chunk,) = self.place.chunks(layer, whole=True)
        weight, mask = self._value(chunk), self.place.mask(chunk)
        if mask is not None and masked:
            return weight * mask
        return weight if self.place.held else weight.clone()  # others are read beside it

    def as_neighbors(self, given: Any) -> Any:
        """Converts layer names to neighbors with the weights of those layers."""
        if isinstance(given, (list, tuple)):
            return [self.as_neighbors(item) for item in given] or None
        if not isinstance(given, str):
            return given
        layer = self.topology.layers[given]
        role = layer.roles[0]
        block, active = (
            role.part.of(self.full(layer, masked=True)),
            self.activity[self.index(role)],
        )
        block = block if active is None else scaled(block, exact_sqrt(active), role)
        return Neighbor(block, role.part.groups, role.part.transposed)


@contextmanager
def in_chunk(chunk: Chunk) -> Iterator[None]:
    """Names the layer in errors, and the index in the layer of a weight that is not finite."""
    with in_layer(chunk.layer.name):
        try:
            yield
        except LapError:
            bad = ~chunk.weight.isfinite()
            if chunk.whole or not bad.any():
                raise
            index = chunk.first + int(bad.flatten().to(torch.uint8).argmax())
            raise LapValueError(
                "finite weights in {argument}",
                f"{int(bad.count_nonzero())} non-finite values, the first at flat index {index}",
                "Repair them.",
                argument="w",
            ) from None


def check_finite(layer: Layer) -> None:
    """Raises unless the weights of a layer in memory are finite."""
    with in_layer(layer.name):
        require_finite(readable(layer), "w")


def random_scores(weight: Tensor, start: int, first: int) -> Tensor:
    """Computes the random scores of weights at flat indices first, first + 1, ... of a layer."""
    scores = torch.empty(weight.shape, dtype=score_dtype(weight.dtype), device=weight.device)
    schema.call(schema.random_scores_, scores, start, first, 1)
    return scores


def scaled(block: Tensor, scale: Tensor, role: Role) -> Tensor:
    """Multiplies every output channel of a block by its scale, in float64."""
    scale = scale.to(block.device)
    part = role.part
    tail = [1] * (block.dim() - 2)
    if not part.transposed:
        return block.double() * scale.reshape(-1, 1, *tail)
    groups, cols = part.groups, block.shape[1]
    spread = scale.reshape(groups, 1, cols).expand(groups, block.shape[0] // groups, cols)
    return block.double() * spread.reshape(block.shape[0], cols, *tail)
