# SPDX-License-Identifier: MIT
# The public names of lap_ext: the one table, for editors, type checkers and __init__.py, which
# loads a name from its module on first use. A line imports one name, or one module of lap_ext.

from lap_ext import adapters as adapters
from lap_ext import allocation as allocation
from lap_ext import checkpoint as checkpoint
from lap_ext import criteria as criteria
from lap_ext import errors as errors
from lap_ext import masks as masks
from lap_ext import numpy as numpy
from lap_ext import ops as ops
from lap_ext import options as options
from lap_ext import progress as progress
from lap_ext import pruning as pruning
from lap_ext import report as report
from lap_ext import schedule as schedule
from lap_ext import structures as structures
from lap_ext import topology as topology
from lap_ext.allocation import er as er
from lap_ext.allocation import erk as erk
from lap_ext.allocation import uniform as uniform
from lap_ext.allocation import uniform_plus as uniform_plus
from lap_ext.errors import LapError as LapError
from lap_ext.errors import TopologyError as TopologyError
from lap_ext.masks import Masks as Masks
from lap_ext.ops.from_norms import mask_from_norms as mask_from_norms
from lap_ext.ops.from_norms import prune_from_norms_ as prune_from_norms_
from lap_ext.ops.from_norms import score_from_norms as score_from_norms
from lap_ext.ops.layer import bn_scale as bn_scale
from lap_ext.ops.layer import mask as mask
from lap_ext.ops.layer import neighbor_norms as neighbor_norms
from lap_ext.ops.layer import prune_ as prune_
from lap_ext.ops.layer import score as score
from lap_ext.ops.neighbors import IDENTITY as IDENTITY
from lap_ext.ops.neighbors import Neighbor as Neighbor
from lap_ext.ops.ranking import kth_largest as kth_largest
from lap_ext.ops.ranking import topk_mask as topk_mask
from lap_ext.ops.schema import info as info
from lap_ext.pruning import Pruner as Pruner
from lap_ext.pruning import PruneResult as PruneResult
from lap_ext.pruning import prune as prune
from lap_ext.pruning import scores as scores
from lap_ext.pruning import sparsity as sparsity
from lap_ext.schedule import cubic as cubic
from lap_ext.schedule import exponential as exponential
from lap_ext.schedule import iterative as iterative
from lap_ext.schedule import linear as linear
from lap_ext.schedule import one_shot as one_shot
from lap_ext.topology import Topology as Topology
from lap_ext.topology import trace as trace

__version__: str
