# SPDX-License-Identifier: MIT
"""Finds the expert of each row of an input, where the data chooses the weights of a product.

x [S, 1, I] times w[e] [S, I, O]     e [S], the expert of each row, is the index that w is read with
grouped_mm(x [S, I], w, ends [E])    rows are sorted by expert; ends[e] is where those of e end
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lap_ext.topology.call import Call, bind, operation_name
from lap_ext.topology.roles import Role

_PICKS = {"index", "index_select", "embedding"}
Before = Callable[[tuple[Any, ...], dict[str, Any]], None]


def chosen_by_data(role: Role) -> bool:
    """Tells whether the data chooses which expert of a role reads which row."""
    return role.kind == "linear" and role.part.groups > 1 and len(role.in_dims) == 1


class Chosen:
    """Finds the experts of the rows that a node reads."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.index: Tensor | None = None  # of the last run
        self.picks = _picks(node)

    def watches(self) -> dict[fx.Node, Before]:
        """Returns the watch that keeps the indices by which weights are picked."""
        if self.picks is None:
            return {}
        picks = self.picks

        def keep_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [
                x for x in tensors_of(bind(picks, args, kwargs)) if not x.is_floating_point()
            ]
            self.index = tensors[0] if len(tensors) == 1 else None

        return {picks: keep_index}

    def sums(
        self, call: Call, x: Tensor, role: Role, of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns (sums of a map of x, numbers of rows) by expert and channel: float64, int64."""
        experts = role.part.groups
        (dim,) = role.in_dims
        rows = x.movedim(dim, -1).flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # [S, 1, I]
        sums = of(rows.double()).sum(1)
        count = torch.full(rows.shape[:1], rows.shape[1], device=x.device)
        expert = self.of_rows(call, rows.shape[0], experts)
        if expert is None:  # unknown: every expert counts all rows
            return sums.sum(0).repeat(experts), count.sum().expand(experts * sums.shape[1])
        own = (expert >= 0) & (expert < experts)
        expert, sums, count = expert[own], sums[own], count[own]
        totals = sums.new_zeros(experts, sums.shape[1]).index_add_(0, expert, sums)
        counts = count.new_zeros(experts).index_add_(0, expert, count)
        return totals.flatten(), counts.repeat_interleave(sums.shape[1])

    def of_rows(self, call: Call, rows: int, experts: int) -> Tensor | None:
        """Returns the expert of each row, int64 [S]; None where the call does not tell."""
        if self.index is not None:
            index = self.index.flatten().long()
            return index if index.numel() == rows else None
        ends = [x for x in tensors_of(call) if not x.is_floating_point() and x.numel() == experts]
        if len(ends) != 1:
            return None
        row = torch.arange(rows, device=ends[0].device)
        return torch.searchsorted(ends[0].long().contiguous(), row, right=True)


def _picks(node: fx.Node) -> fx.Node | None:
    """Finds the node that picks the weights of a product, looking through casts and moves."""
    for operand in node.all_input_nodes:
        current = operand
        while current.op == "call_function":
            if operation_name(current) in _PICKS and _is_weight(current.all_input_nodes[0]):
                return current
            if len(current.all_input_nodes) != 1:
                break
            current = current.all_input_nodes[0]
    return None


def _is_weight(node: fx.Node) -> bool:
    """Tells whether a node is a stack of matrices that is not computed."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    return node.op != "call_function" and isinstance(value, Tensor) and value.dim() == 3


def tensors_of(call: Call) -> list[Tensor]:
    """Lists the tensors among the arguments of a call, in order."""
    tensors: list[Tensor] = []
    for x in call.arguments.values():
        values = x if isinstance(x, (list, tuple)) else [x]
        tensors += [y for y in values if isinstance(y, Tensor)]
    return tensors
