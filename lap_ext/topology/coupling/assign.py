# SPDX-License-Identifier: MIT
"""Carries the groups of channels over to the rows, columns and entries that belong to them."""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.topology.coupling.axes import Axes
from lap_ext.topology.coupling.groups import Assigned, AssignedVector
from lap_ext.topology.coupling.subject import Subject
from lap_ext.topology.facts import Vector


def assigned(x: Axes, ids: Tensor) -> Assigned:
    """Finds the group of each row and column of a weight."""
    rows = _common(*x.rows, x.sizes[0], ids)
    cols = _common(*x.cols, x.sizes[1], ids).reshape(x.groups, -1)
    return Assigned(x.layer, x.parameter, x.shape, x.groups, rows, cols, x.transposed)


def _common(index: Tensor, ids: Tensor, size: int, number: Tensor) -> Tensor:
    """Returns the group that all channels of each index have; -1 where they differ or are none."""
    own = number[ids]
    low = torch.full((size,), number.numel()).scatter_reduce(0, index, own, "amin")
    high = torch.full((size,), -1).scatter_reduce(0, index, own, "amax")
    return torch.where(low == high, low, -1)


def vectors_of(subject: Subject, ids: Tensor) -> list[AssignedVector]:
    """Finds the groups of the entries of biases, norms and the like."""
    facts: dict[str, list[Vector]] = {}
    for fact in subject.graph.facts.vectors:
        facts.setdefault(fact.name, []).append(fact)
    result = []
    for name, given in facts.items():
        index, own = torch.cat([x.entries for x in given]), torch.cat([x.ids for x in given])
        shape = subject.shapes[name]
        groups = _common(index, own, torch.Size(shape).numel(), ids)
        if bool((groups >= 0).any()):
            zeroed = all(x.zeroed for x in given)
            result.append(AssignedVector(name, shape, groups, zeroed, given[0].buffer))
    return result
