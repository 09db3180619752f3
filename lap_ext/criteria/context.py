# SPDX-License-Identifier: MIT
"""The lookahead factors of every role of a traced model, from its weights as they are now.

    score^2 = w^2 * in_norm[i]^2 * out_norm[o]^2, summed over the roles of the weight

Each weight is read once for its squared row and column norms (the operators of ops/schema.py); two
sweeps over the channel graph (topology/propagate.py) give all factors. Masks set on the way
(sequential pruning) count at once: a pruned neighbor is a smaller neighbor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lap_ext.ops import schema
from lap_ext.ops.layer import factors
from lap_ext.ops.neighbors import Neighbor
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology import Layer, Topology, edges
from lap_ext.topology.propagate import Sweeps
from lap_ext.topology.roles import Role

BN = ("paper", "fold", "off")


class Network:
    """A topology whose weights are scored.

    Args:
        topology: of the model.
        bn: "paper" counts a batch norm on the edge it lies on, "fold" also the one that follows a
            consumer (in its row of the column norm), "off" none.
        weights: layer name -> a weight to count in place of the parameter (a surrogate).
        activity: per role, the probability that an output is active, float64 [O], or None: 1.
        masks: layer name -> the weights that are left.
        check_finite: raise on a weight that is inf or NaN.
        chain: names of layers, to count as the public code does: of a layer's neighbors only the
            one before and the one after it in this list, whatever skips there are. None: all.
        function: whose name errors carry.
    """

    def __init__(
        self,
        topology: Topology,
        bn: str = "paper",
        weights: Mapping[str, Tensor] | None = None,
        activity: list[Tensor | None] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        check_finite: bool = True,
        chain: Sequence[str] | None = None,
        function: str = "prune",
    ) -> None:
        self.topology = topology
        self.bn = bn
        self.function = function
        self.check_finite = check_finite
        self.chain = chain
        self.activity = activity or [None] * len(topology.roles)
        self._weights = dict(weights or {})
        self.masks = dict(masks or {})
        self._sweeps = Sweeps(topology.graph, topology.tensors(), batch_norm=bn != "off")
        self._energies: list[tuple[Tensor, Tensor] | None] = [None] * len(topology.roles)
        self._factors: list[tuple[Tensor, Tensor]] | None = None

    def weight(self, layer: Layer) -> Tensor:
        """What counts as the layer's weight: the surrogate or the parameter, detached."""
        return self._weights.get(layer.name, layer.weight).detach()

    def set_mask(self, name: str, mask: Tensor) -> None:
        """From now on, only these weights of a layer count as its neighbors'."""
        self.masks[name] = mask
        self._factors = None
        for place, role in enumerate(self.topology.roles):
            if role.layer == name:
                self._energies[place] = None

    def norm_scale(self, role: Role) -> Tensor | None:
        """Factor of the batch norm that alone follows a role, float64 [O]; None without one."""
        return self._sweeps.norm_scale(role)

    def factors(self, role: Role) -> tuple[Tensor, Tensor]:
        """(in_norm [I], out_norm [O]) of a role, float64, on the CPU."""
        if self._factors is None:
            for _ in self.take_norms():
                pass
            energies = [found for found in self._energies if found is not None]  # which is all
            if self.chain is None:
                self._factors = self._sweeps.factors(*zip(*energies, strict=True))
            else:
                self._factors = self._along(self.chain)
            self._override()
        return self._factors[self.topology.roles.index(role)]

    def unmeasured(self) -> list[Role]:
        """The roles whose norms `factors` needs and has not yet."""
        pairs = zip(self.topology.roles, self._energies, strict=True)
        return [role for role, energies in pairs if energies is None]

    def take_norms(self) -> Iterator[Role]:
        """Takes the norms that `factors` needs and has not yet; yields each role that was read."""
        for place, role in enumerate(self.topology.roles):
            if self._energies[place] is None:
                self._energies[place] = self._measure(place)
                yield role

    def _measure(self, place: int) -> tuple[Tensor, Tensor]:
        """Squared norms of a role's inputs [I] and outputs [O], float64, on the CPU."""
        role = self.topology.roles[place]
        layer = self.topology.layers[role.layer]
        block = role.part.of(self._left(layer))
        across = self.row_weight(place, role)
        if across is None:
            return self._both_energies(block, role)
        out = self._energy(block, role, of_inputs=False)
        into = self._energy(_weighted(block, across, role), role, of_inputs=True)
        active = self.activity[place]
        return into, out if active is None else out * active

    def _left(self, layer: Layer) -> Tensor:
        """The layer's weight without what a mask has pruned."""
        weight, mask = self.weight(layer), self.masks.get(layer.name)
        return weight if mask is None else weight * mask

    def _both_energies(self, block: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        """Squared norms of the input and output channels of a block, read once."""
        options = (role.part.groups, self.check_finite, f"layer {role.layer!r}")
        row, col = schema.call(self.function, schema.energies, block, *options)
        into, out = (row, col) if role.part.transposed else (col, row)
        return into.cpu(), out.cpu()

    def _energy(self, block: Tensor, role: Role, of_inputs: bool) -> Tensor:
        """Squared norms of the input or output channels of a block, float64, on the CPU."""
        options = (self.check_finite, f"layer {role.layer!r}")
        if of_inputs == role.part.transposed:
            found = schema.call(self.function, schema.row_energy, block, *options)
        else:
            groups = role.part.groups
            found = schema.call(self.function, schema.col_energy, block, groups, *options)
        return found.cpu()

    def row_weight(self, place: int, role: Role) -> Tensor | None:
        """What multiplies each output in a consumer's column norm, float64 [O]; None: 1."""
        factor = self.norm_scale(role) if self.bn == "fold" else None
        active = self.activity[place]
        if active is not None:
            root = exact_sqrt(active)
            factor = root if factor is None else factor * root
        return factor

    def _along(self, chain: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """The factors of roles by their neighbors in a chain alone; ones where there is no edge."""
        before = {b: a for a, b in pairwise(chain)}
        after = dict(pairwise(chain))
        roles, batch_norm = self.topology.roles, self.bn != "off"
        graph, tensors = self.topology.graph, self.topology.tensors()
        result = []
        for role in roles:
            sides = (
                (edges.producers, before, role.part.channels[0], 1),
                (edges.consumers, after, role.part.channels[1], 0),
            )
            norms = []
            for find, neighbor, n, side in sides:
                energy = torch.zeros(n, dtype=torch.float64)
                name = neighbor.get(role.layer)
                found = [] if name is None else find(graph, role, tensors, batch_norm)
                met = [edge for edge in found if edge.kind == "layer" and edge.name == name]
                for edge in met:
                    given = self._energies[self._first_role(edge.name)]
                    assert given is not None
                    scale = 1.0 if edge.scale is None else edge.scale.square()
                    energy.index_add_(0, edge.here, given[side][edge.there] * scale)
                norms.append(exact_sqrt(energy) if met else torch.ones_like(energy))
            result.append((norms[0], norms[1]))
        return result

    def _first_role(self, name: str) -> int:
        return next(r for r, role in enumerate(self.topology.roles) if role.layer == name)

    def _override(self) -> None:
        """The factors of layers whose neighbors the user has named."""
        for name, (prev, following) in self.topology.neighbors.items():
            layer = self.topology.layers[name]
            for role in layer.roles:
                found = factors(
                    self._as_neighbors(prev),
                    role.part.of(self.weight(layer)),
                    self._as_neighbors(following),
                    groups=role.part.groups,
                    transposed=role.part.transposed,
                    check_finite=self.check_finite,
                )
                assert self._factors is not None
                self._factors[self.topology.roles.index(role)] = (found[0].cpu(), found[1].cpu())

    def _as_neighbors(self, given: Any) -> Any:
        """Layer names as neighbors with the weights of those layers."""
        if isinstance(given, (list, tuple)):
            return [self._as_neighbors(item) for item in given] or None
        if not isinstance(given, str):
            return given
        layer = self.topology.layers[given]
        role = layer.roles[0]
        block, active = role.part.of(self._left(layer)), self.activity[self._first_role(given)]
        block = block if active is None else _weighted(block, exact_sqrt(active), role)
        return Neighbor(block, role.part.groups, role.part.transposed)


def _weighted(block: Tensor, factor: Tensor, role: Role) -> Tensor:
    """A block with every output channel multiplied by its factor, float64."""
    factor = factor.to(block.device)
    part = role.part
    tail = [1] * (block.dim() - 2)
    if not part.transposed:
        return block.double() * factor.reshape(-1, 1, *tail)
    groups, cols = part.groups, block.shape[1]
    spread = factor.reshape(groups, 1, cols).expand(groups, block.shape[0] // groups, cols)
    return block.double() * spread.reshape(block.shape[0], cols, *tail)
