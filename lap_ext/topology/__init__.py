# SPDX-License-Identifier: MIT
"""Traces a model to its topology: which channels of which layers feed each weight."""

from lap_ext.errors import TopologyError as TopologyError
from lap_ext.topology.edges import Edge as Edge
from lap_ext.topology.topology import Layer as Layer
from lap_ext.topology.topology import PrunedBy as PrunedBy
from lap_ext.topology.topology import Topology as Topology
from lap_ext.topology.tracing import trace as trace

__all__ = ["Edge", "Layer", "PrunedBy", "Topology", "TopologyError", "trace"]
