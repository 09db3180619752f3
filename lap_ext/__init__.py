# SPDX-License-Identifier: MIT
"""Lookahead pruning: exact scores and masks for the weights of a neural network.

    score[o, i, ...] = |w[o, i, ...]| * ||w_prev[i]||_F * ||w_next[:, o]||_F

Source: Park et al., "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020.
Names are imported when first used, so that lap_ext.numpy works without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lap_ext.allocation import er as er
    from lap_ext.allocation import erk as erk
    from lap_ext.allocation import paper as paper
    from lap_ext.allocation import uniform as uniform
    from lap_ext.allocation import uniform_plus as uniform_plus
    from lap_ext.api import bn_scale as bn_scale
    from lap_ext.api import factors as factors
    from lap_ext.api import mask as mask
    from lap_ext.api import prune_ as prune_
    from lap_ext.api import score as score
    from lap_ext.from_factors import mask_from_factors as mask_from_factors
    from lap_ext.from_factors import prune_from_factors_ as prune_from_factors_
    from lap_ext.from_factors import score_from_factors as score_from_factors
    from lap_ext.masks import Masks as Masks
    from lap_ext.neighbors import IDENTITY as IDENTITY
    from lap_ext.neighbors import Neighbor as Neighbor
    from lap_ext.ops import info as info
    from lap_ext.pruner import Pruner as Pruner
    from lap_ext.pruning import prune as prune
    from lap_ext.pruning import scores as scores
    from lap_ext.ranking import kth_largest as kth_largest
    from lap_ext.ranking import topk_mask as topk_mask
    from lap_ext.result import PruneResult as PruneResult
    from lap_ext.schedule import cubic as cubic
    from lap_ext.schedule import exponential as exponential
    from lap_ext.schedule import iterative as iterative
    from lap_ext.schedule import linear as linear
    from lap_ext.schedule import one_shot as one_shot
    from lap_ext.topology import Topology as Topology
    from lap_ext.topology import TopologyError as TopologyError
    from lap_ext.topology import trace as trace

__version__ = "0.1.0"

__all__ = [
    "IDENTITY",
    "Masks",
    "Neighbor",
    "PruneResult",
    "Pruner",
    "Topology",
    "TopologyError",
    "__version__",
    "bn_scale",
    "cubic",
    "er",
    "erk",
    "exponential",
    "factors",
    "info",
    "iterative",
    "kth_largest",
    "linear",
    "mask",
    "mask_from_factors",
    "one_shot",
    "paper",
    "prune",
    "prune_",
    "prune_from_factors_",
    "score",
    "score_from_factors",
    "scores",
    "topk_mask",
    "trace",
    "uniform",
    "uniform_plus",
]

_HOME = {  # the others live in api.py
    "IDENTITY": "neighbors",
    "Masks": "masks",
    "Neighbor": "neighbors",
    "PruneResult": "result",
    "Pruner": "pruner",
    "Topology": "topology",
    "TopologyError": "topology",
    "cubic": "schedule",
    "er": "allocation",
    "erk": "allocation",
    "exponential": "schedule",
    "info": "ops",
    "iterative": "schedule",
    "kth_largest": "ranking",
    "linear": "schedule",
    "mask_from_factors": "from_factors",
    "one_shot": "schedule",
    "paper": "allocation",
    "prune": "pruning",
    "prune_from_factors_": "from_factors",
    "score_from_factors": "from_factors",
    "scores": "pruning",
    "topk_mask": "ranking",
    "trace": "topology",
    "uniform": "allocation",
    "uniform_plus": "allocation",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lap_ext' has no attribute {name!r}")
    value = getattr(import_module(f"lap_ext.{_HOME.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
