# SPDX-License-Identifier: MIT
"""Allocates a sparsity to layers: decides how many weights each layer keeps."""

from lap_ext.allocation.budget import Budget as Budget
from lap_ext.allocation.budget import budget as budget
from lap_ext.allocation.budget import check_floors as check_floors
from lap_ext.allocation.budget import floors as floors
from lap_ext.allocation.budget import rank_with_floors as rank_with_floors
from lap_ext.allocation.layerwise import Allocation as Allocation
from lap_ext.allocation.layerwise import Shapes as Shapes
from lap_ext.allocation.layerwise import Sparsity as Sparsity
from lap_ext.allocation.layerwise import check_given as check_given
from lap_ext.allocation.layerwise import compounded as compounded
from lap_ext.allocation.layerwise import er as er
from lap_ext.allocation.layerwise import erk as erk
from lap_ext.allocation.layerwise import of as of
from lap_ext.allocation.layerwise import per_layer as per_layer
from lap_ext.allocation.layerwise import total as total
from lap_ext.allocation.layerwise import uniform as uniform
from lap_ext.allocation.layerwise import uniform_plus as uniform_plus
from lap_ext.allocation.targets import Target as Target
from lap_ext.allocation.targets import flops as flops
from lap_ext.allocation.targets import params as params
