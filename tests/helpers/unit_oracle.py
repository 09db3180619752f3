# SPDX-License-Identifier: MIT
"""What a unit across layers is worth and costs, by sets of single weights in plain Python.

It reads `groups[i].members` and the scores of single weights, and nothing else of lap_ext.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Weight = tuple[str, int]  # parameter and flat index


def entries(member: Any, shape: Sequence[int]) -> set[int]:
    """The flat indices of a member in its parameter of a shape."""
    count = math.prod(shape)
    if len(member.shape) == 1:
        return set(range(count) if member.rows is None else member.rows.tolist())
    height, width = member.shape
    window = count // (height * width)
    rows = range(height) if member.rows is None else member.rows.tolist()
    cols = range(width) if member.cols is None else member.cols.tolist()
    return {(r * width + c) * window + k for r in rows for c in cols for k in range(window)}


def weights_of(group: Any, model: nn.Module) -> set[Weight]:
    """Everything of a group: entries of weights, biases and norms, each once."""
    parameters = dict(model.named_parameters())
    return {
        (member.parameter, index)
        for member in group.members
        for index in entries(member, parameters[member.parameter].shape)
    }


def scored(group: Any, model: nn.Module, scores: Mapping[str, Tensor]) -> list[Weight]:
    """The weights of a group that have a score; biases and norms have none."""
    return sorted(x for x in weights_of(group, model) if x[0] in scores)


def worth(
    group: Any,
    model: nn.Module,
    scores: Mapping[str, Tensor],
    aggregate: str = "energy",
    live: Mapping[str, Tensor] | None = None,
) -> float:
    """The worth of a group, by its definition.

    scores: by parameter. live: by parameter, which weights may be kept; the others have score 0.
    """
    every = scored(group, model, scores)
    values = [
        float(scores[name].flatten()[index])
        for name, index in every
        if live is None or name not in live or bool(live[name].flatten()[index])
    ]
    if aggregate == "mean":
        return math.fsum(values) / len(every)
    return math.sqrt(math.fsum(x * x for x in values))


def sides(
    members: Iterable[Any], model: nn.Module, flipped: Container[str]
) -> tuple[set[Weight], set[Weight]]:
    """What makes a unit, and what reads it; flipped: parameters [inputs, outputs]."""
    made, read = set[Weight](), set[Weight]()
    parameters = dict(model.named_parameters())
    for member in members:
        reads = len(member.shape) > 1 and (member.cols is None) == (member.parameter in flipped)
        own = entries(member, parameters[member.parameter].shape)
        (read if reads else made).update((member.parameter, i) for i in own)
    return made, read


def flipped(topology: Any) -> set[str]:
    """The parameters of layers that are [inputs, outputs]."""
    return {x.parameter for x in topology.layers.values() if x.roles[0].part.transposed}


def put_random(model: nn.Module, weights: Iterable[Weight]) -> None:
    """Gives weights any values."""
    by_name: dict[str, list[int]] = {}
    for name, index in weights:
        by_name.setdefault(name, []).append(index)
    with torch.no_grad():
        for name, index in by_name.items():
            x = model.get_parameter(name)
            x.view(-1)[index] = torch.randn(len(index), dtype=x.dtype)


def covered(masks: Mapping[str, Tensor]) -> set[Weight]:
    """The entries that masks remove, masks by parameter."""
    return {(name, index) for name, mask in masks.items() for index in _where(~mask.flatten())}


def _where(marked: Tensor) -> Iterable[int]:
    return (int(i) for i in marked.nonzero().flatten())
