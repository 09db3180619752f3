# SPDX-License-Identifier: MIT
"""The effect of ATen operations on channels: one file per kind of operation.

Importing the package registers the rules with the tracer. fixed.py, mixing.py, routing.py
and states.py are helpers and register no rules.
"""

from lap_ext.topology.rules import attention as attention
from lap_ext.topology.rules import contraction as contraction
from lap_ext.topology.rules import joins as joins
from lap_ext.topology.rules import mixes as mixes
from lap_ext.topology.rules import moves as moves
from lap_ext.topology.rules import norms as norms
from lap_ext.topology.rules import pairs as pairs
from lap_ext.topology.rules import recurrent as recurrent
from lap_ext.topology.rules import weights as weights
from lap_ext.topology.rules import writes as writes
