# SPDX-License-Identifier: MIT
"""What experts put out, weighed by their router, in float64, accumulated batch by batch.

    S[j] = mean over the tokens that chose expert j of |g_j| * ||f_j||     f_j: its output

The statistic belongs to the last layer of experts, whose result (after biases and norms) a router's
weight g multiplies: a packed weight [E, ...] has one number for each expert, a layer of its own has
one. Where every expert sees every token, those with a weight of 0 have not chosen it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lap_ext.criteria.statistics.experts import Chosen, chosen_by_data, tensors_of
from lap_ext.criteria.statistics.replay import Watches, replay
from lap_ext.criteria.statistics.weighing import Weighing, carried, weighing_after
from lap_ext.errors import LapValueError
from lap_ext.ops.reference.common import exact_sqrt
from lap_ext.topology import Layer, Topology
from lap_ext.topology.call import bind
from lap_ext.topology.roles import Role


def weighed_outputs(topology: Topology, data: Any) -> dict[str, Tensor]:
    """Computes S of the experts of every layer that is the last of experts.

    Args:
        topology: of the model.
        data: batches as `replay` takes them.

    Returns:
        Layer name -> float64 [experts], on the CPU; 0 for an expert that no token chose.

    Raises:
        ValueError: the model has no such layer; an output is not finite; data is empty, or takes
            another path through the model than the trace.
    """
    found: dict[str, _Sums] = {}

    def watcher(_program: ExportedProgram, nodes: list[fx.Node]) -> Watches:
        before: dict[fx.Node, list[Callable[..., None]]] = {}
        after: dict[fx.Node, list[Callable[..., None]]] = {}
        for role, node in zip(topology.roles, nodes, strict=True):
            first = _first_expert(topology.layers[role.layer], role)
            if first is None:
                continue
            channels = role.part.channels[1] // role.part.groups
            weighing = weighing_after(node, channels, set(nodes))
            if weighing is None:
                continue
            experts = expert_count(topology.layers[role.layer])
            sums = found.setdefault(role.layer, _Sums(experts))
            _Output(role, weighing, sums, first).watch(before, after)
        return Watches({x: _all(calls) for x, calls in before.items()},
                       {x: _all(calls) for x, calls in after.items()})  # fmt: skip

    replay(topology, data, watcher)
    if not found:
        raise LapValueError(
            "a model of experts (layers whose outputs are multiplied by the weights of a router "
            "that chooses among them)",
            "one without",
            "Use another criterion for it.",
        )
    return {name: sums.mean(name) for name, sums in found.items()}


class _Sums:
    """Sums over tokens, by expert."""

    def __init__(self, experts: int) -> None:
        self.total = torch.zeros(experts, dtype=torch.float64)
        self.count = torch.zeros(experts, dtype=torch.int64)

    def add(self, expert: Tensor, values: Tensor) -> None:
        """Adds a value of each token to the sum of its expert."""
        expert, values = expert.cpu(), values.cpu()
        self.total.index_add_(0, expert, values)
        self.count += torch.bincount(expert, minlength=self.count.numel())

    def mean(self, layer: str) -> Tensor:
        """Returns the means; 0 where there is no token."""
        if not bool(self.total.isfinite().all()):
            raise LapValueError(
                "finite activations",
                f"inf or NaN in the output of layer {layer!r}",
                "Look for such values in data.",
            )
        return self.total / self.count.clamp(min=1)


class _Output:
    """Follows the experts' numbers beside their outputs, to where these are weighed."""

    def __init__(self, role: Role, weighing: Weighing, sums: _Sums, first: int) -> None:
        self.role, self.weighing, self.sums, self.first = role, weighing, sums, first
        self.chosen = Chosen(weighing.path[0]) if chosen_by_data(role) else None
        self.expert: Tensor | None = None  # of each value on the path, in its shape

    def watch(self, before: dict[fx.Node, Any], after: dict[fx.Node, Any]) -> None:
        """Adds the functions that a run is to call."""
        start = self.weighing.path[0]
        if self.chosen is not None:
            for node, keep in self.chosen.watches().items():
                before.setdefault(node, []).append(keep)
            before.setdefault(start, []).append(self._rows)
        after.setdefault(start, []).append(self._start)
        for node, last in self.weighing.moves:
            before.setdefault(node, []).append(self._mover(node, last))
        before.setdefault(self.weighing.node, []).append(self._weigh)

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds the experts of the rows that the product reads."""
        call = bind(self.weighing.path[0], args, kwargs)
        rows = tensors_of(call)[self.role.x].shape[0]
        assert self.chosen is not None
        self.expert = self.chosen.of_rows(call, rows, self.role.part.groups)
        if self.expert is None:
            raise LapValueError(
                "experts chosen by an index, or rows sorted by expert",
                f"a product of layer {self.role.layer!r} that does not tell whose rows it reads",
            )

    def _start(self, result: Tensor) -> None:
        """Numbers the experts of the product's values."""
        shape = [1] * result.dim()
        if self.chosen is not None:
            assert self.expert is not None
            expert, shape[0] = self.expert, -1
        else:
            expert = torch.arange(self.first, self.first + self.role.part.groups)
            shape[self.role.out_dims[0]] = self.role.part.groups
        self.expert = expert.to(result.device).reshape(shape).expand(result.shape)

    def _mover(self, node: fx.Node, last: fx.Node) -> Callable[..., None]:
        def move(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert self.expert is not None
            self.expert = carried(node, last, args, kwargs, self.expert)

        return move

    def _weigh(self, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        """Adds the weighed norms of the outputs."""
        f, g = self.weighing.operands(args)
        dims = [dim for dim, size in enumerate(g.shape) if size == 1]
        squares, expert = f.double().square(), self.expert
        assert expert is not None
        if dims:
            squares, expert = squares.sum(dims, keepdim=True), expert.amax(dims, keepdim=True)
        own = (expert >= 0) & (expert < self.sums.count.numel())
        if not self.weighing.picked and self.chosen is None:
            own &= g != 0
        values = exact_sqrt(squares) * g.double().abs()
        self.sums.add(expert[own], values[own])


def expert_count(layer: Layer) -> int:
    """Counts the experts of a layer: those of a packed weight, or one."""
    return layer.shape[0] if len(layer.shape) == 3 else 1


def _first_expert(layer: Layer, role: Role) -> int | None:
    """Returns the number of the first of the experts that a role has; None: it has no experts."""
    if role.kind != "linear":
        return None
    part, experts = role.part, expert_count(layer)
    if part.groups == experts:
        return 0
    rows = part.rows or (0, part.shape[0])
    size = part.shape[0] // experts
    whole = part.groups == 1 and rows[1] - rows[0] == size and not rows[0] % max(size, 1)
    return rows[0] // size if whole and size else None


def _all(calls: list[Callable[..., None]]) -> Callable[..., None]:
    """Makes one function that calls several."""

    def call(*given: Any) -> None:
        for each in calls:
            each(*given)

    return call
