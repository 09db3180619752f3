# SPDX-License-Identifier: MIT
"""Computes the lookahead norms of every role of a traced model from its present weights.

    score^2 = w^2 * in_norm[i]^2 * out_norm[o]^2, summed over the roles of the weight

The operators of ops/schema.py read each weight once and give its squared row and column norms; two
passes over the channel graph (topology/propagate.py) then give all norms. A mask that is set during
sequential pruning takes effect at once: its pruned weights no longer count in the neighbor norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lap_ext.errors import LapTypeError, LapValueError, in_layer
from lap_ext.ops import schema
from lap_ext.ops.channel_sums import ChannelSums
from lap_ext.ops.check import FLOATS
from lap_ext.ops.layer import neighbor_norms
from lap_ext.ops.neighbors import Neighbor
from lap_ext.ops.reference.common import exact_sqrt, require_finite, score_dtype
from lap_ext.ops.reference.norms import SEGMENT_ROWS
from lap_ext.topology import Layer, Topology, edges
from lap_ext.topology.propagate import Propagation
from lap_ext.topology.roles import Role
from lap_ext.topology.walks import Walker

_COPIED = 1 << 20  # weights of a layer that may be masked or scaled in a copy


class Network:
    """A traced model whose weights are scored, together with the norms of its roles.

    Args:
        topology: the topology of the model.
        batch_norm: "edge" counts each batch norm on the edge on which it lies; "fold" also counts
            the batch norm that follows a consumer, in the rows of the consumer's column norms;
            "ignore" counts none.
        weights: for each layer name, a tensor that replaces the parameter (a surrogate).
        activity: for each role, the probability that each output is active, float64 [O], or None
            for a probability of 1.
        masks: for each layer name, a mask of the kept weights.
        check_finite: whether to raise an error if a weight is inf or NaN.
        chain: names of layers. Each layer then has only the neighbors just before and after it in
            this list, as in the paper's public code, regardless of residual connections. With None,
            all neighbors count.
    """

    def __init__(
        self,
        topology: Topology,
        batch_norm: str = "edge",
        weights: Mapping[str, Tensor] | None = None,
        activity: list[Tensor | None] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        check_finite: bool = True,
        chain: Sequence[str] | None = None,
    ) -> None:
        self.topology = topology
        self.batch_norm = batch_norm
        self.check_finite = check_finite
        self.chain = chain
        self.activity = activity or [None] * len(topology.roles)
        self._weights = dict(weights or {})
        self.masks = dict(masks or {})
        self._propagation = Propagation(
            topology.graph, topology.tensors(), batch_norm=batch_norm != "ignore"
        )
        self._squared_norms: list[tuple[Tensor, Tensor] | None] = [None] * len(topology.roles)
        self._norms: list[tuple[Tensor, Tensor]] | None = None

    def weight(self, layer: Layer) -> Tensor:
        """Returns the weight to score for a layer, detached: the surrogate or what is used."""
        surrogate = self._weights.get(layer.name)
        return readable(layer) if surrogate is None else surrogate.detach()

    def set_mask(self, name: str, mask: Tensor) -> None:
        """Sets a layer's mask; from now on, only the weights it keeps count in neighbor norms."""
        self.masks[name] = mask
        self._norms = None
        for index, role in enumerate(self.topology.roles):
            if role.layer == name:
                self._squared_norms[index] = None

    def norm_scale(self, role: Role) -> Tensor | None:
        """Returns the scale, float64 [O], of the batch norm that alone follows a role, or None."""
        return self._propagation.norm_scale(role)

    def norms(self, role: Role) -> tuple[Tensor, Tensor]:
        """Returns (in_norm [I], out_norm [O]) of a role in float64, on the CPU."""
        if self._norms is None:
            for _ in self.take_norms():
                pass
            squared_norms = [pair for pair in self._squared_norms if pair is not None]  # all
            if self.chain is None:
                self._norms = self._propagation.norms(*zip(*squared_norms, strict=True))
            else:
                self._norms = self._chain_norms(self.chain)
            self._apply_named_neighbors()
        return self._norms[self.topology.roles.index(role)]

    def check_scales(self) -> None:
        """Raises unless the scales between layers are finite, before weights are read."""
        if self.check_finite:
            self._propagation.check()

    def unmeasured(self) -> list[Role]:
        """Lists the roles with squared norms that `norms` needs but that are not measured yet."""
        pairs = zip(self.topology.roles, self._squared_norms, strict=True)
        return [role for role, squared_norms in pairs if squared_norms is None]

    def take_norms(self) -> Iterator[Role]:
        """Measures the squared norms that `norms` still needs and yields each role once read."""
        self.check_scales()
        for index, role in enumerate(self.topology.roles):
            if self._squared_norms[index] is None:
                with in_layer(role.layer):
                    self._squared_norms[index] = self._measure(index)
                yield role

    def _measure(self, index: int) -> tuple[Tensor, Tensor]:
        """Measures squared norms of a role's inputs [I] and outputs [O], float64, on the CPU."""
        role = self.topology.roles[index]
        weight, mask = self.weight(self.topology.layers[role.layer]), self.masks.get(role.layer)
        block, scale = role.part.of(weight), self.row_weight(index, role)
        if scale is None and mask is None:
            return self._both_squared_norms(block, role)
        if mask is not None:
            mask = role.part.of(mask)
        if block.numel() > _COPIED:
            into, out = self._squared_norms_of_rows(block, mask, scale, role)
        else:
            block = block if mask is None else block * mask
            if scale is None:
                return self._both_squared_norms(block, role)
            out = self._squared_norm(block, role, of_inputs=False)
            into = self._squared_norm(_scaled(block, scale, role), role, of_inputs=True)
        active = self.activity[index]
        return into, out if active is None else out * active

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

    def _masked(self, layer: Layer) -> Tensor:
        """Returns the layer's weight, zero where its mask has pruned it."""
        weight, mask = self.weight(layer), self.masks.get(layer.name)
        return weight if mask is None else weight * mask

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

    def row_weight(self, index: int, role: Role) -> Tensor | None:
        """Returns each output channel's scale in column norms, float64 [O], or None for ones."""
        scale = self.norm_scale(role) if self.batch_norm == "fold" else None
        active = self.activity[index]
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
                    self._as_neighbors(prev),
                    role.part.of(self.weight(layer)),
                    self._as_neighbors(following),
                    groups=role.part.groups,
                    transposed=role.part.transposed,
                    check_finite=self.check_finite,
                )
                assert self._norms is not None
                self._norms[self.topology.roles.index(role)] = (into.cpu(), out.cpu())

    def _as_neighbors(self, given: Any) -> Any:
        """Converts layer names to neighbors with the weights of those layers."""
        if isinstance(given, (list, tuple)):
            return [self._as_neighbors(item) for item in given] or None
        if not isinstance(given, str):
            return given
        layer = self.topology.layers[given]
        role = layer.roles[0]
        block, active = role.part.of(self._masked(layer)), self.activity[self._first_role(given)]
        block = block if active is None else _scaled(block, exact_sqrt(active), role)
        return Neighbor(block, role.part.groups, role.part.transposed)


def random_scores(weight: Tensor, start: int, first: int, step: int) -> Tensor:
    """Computes the random scores of weights at flat indices first, first + step, ... of a layer."""
    scores = torch.empty(weight.shape, dtype=score_dtype(weight.dtype), device=weight.device)
    schema.random_scores_(scores, start, first, step)
    return scores


def readable(layer: Layer) -> Tensor:
    """Returns the weight that a layer uses, detached; raises unless its values can be read."""
    weight = layer.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        alone = f"{{exclude={layer.name!r}}} with {{criterion='magnitude'}}"
        cure = f"Leave it out: {alone}, which reads no neighbors."
        if not weight.is_complex():
            cure = "Convert the model first, as with model.to(torch.bfloat16), or dequantize it."
        raise LapTypeError(f"weights of {', '.join(FLOATS)}", dtype, cure, layer=layer.name)
    if weight.layout != torch.strided:
        cure = "Convert it with to_dense()."
        raise LapTypeError("dense weights", f"layout {weight.layout}", cure, layer=layer.name)
    if weight.is_meta:
        raise LapValueError(
            "weights with values",
            "one on the meta device",
            "Load them first: model.to_empty(device='cpu'), then model.load_state_dict(...).",
            layer=layer.name,
        )
    return layer.effective


def _scaled(block: Tensor, scale: Tensor, role: Role) -> Tensor:
    """Multiplies every output channel of a block by its scale, in float64."""
    scale = scale.to(block.device)
    part = role.part
    tail = [1] * (block.dim() - 2)
    if not part.transposed:
        return block.double() * scale.reshape(-1, 1, *tail)
    groups, cols = part.groups, block.shape[1]
    spread = scale.reshape(groups, 1, cols).expand(groups, block.shape[0] // groups, cols)
    return block.double() * spread.reshape(block.shape[0], cols, *tail)
