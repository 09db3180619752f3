# SPDX-License-Identifier: MIT
"""What groups are found in: the graph of a model, and the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lap_ext.topology.graph import Graph


@dataclass(frozen=True, eq=False)
class Subject:
    """A traced model.

    Attributes:
        graph: the channels and what reads them.
        layers: layer name -> (parameter, kind), in the network's order.
        shapes: name -> shape of each parameter and buffer.
        model: the model.
    """

    graph: Graph
    layers: Mapping[str, tuple[str, str]]
    shapes: Mapping[str, tuple[int, ...]]
    model: nn.Module
