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
    from lap_ext.errors import TopologyError as TopologyError
    from lap_ext.masks import Masks as Masks
    from lap_ext.ops.from_norms import mask_from_factors as mask_from_factors
    from lap_ext.ops.from_norms import prune_from_factors_ as prune_from_factors_
    from lap_ext.ops.from_norms import score_from_factors as score_from_factors
    from lap_ext.ops.layer import bn_scale as bn_scale
    from lap_ext.ops.layer import factors as factors
    from lap_ext.ops.layer import mask as mask
    from lap_ext.ops.layer import prune_ as prune_
    from lap_ext.ops.layer import score as score
    from lap_ext.ops.neighbors import IDENTITY as IDENTITY
    from lap_ext.ops.neighbors import Neighbor as Neighbor
    from lap_ext.ops.ranking import kth_largest as kth_largest
    from lap_ext.ops.ranking import topk_mask as topk_mask
    from lap_ext.ops.schema import info as info
    from lap_ext.pruning.model import prune as prune
    from lap_ext.pruning.model import scores as scores
    from lap_ext.pruning.pruner import Pruner as Pruner
    from lap_ext.pruning.result import PruneResult as PruneResult
    from lap_ext.schedule import cubic as cubic
    from lap_ext.schedule import exponential as exponential
    from lap_ext.schedule import iterative as iterative
    from lap_ext.schedule import linear as linear
    from lap_ext.schedule import one_shot as one_shot
    from lap_ext.topology import Topology as Topology
    from lap_ext.topology import trace as trace

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "IDENTITY": "ops.neighbors",
    "Masks": "masks",
    "Neighbor": "ops.neighbors",
    "PruneResult": "pruning.result",
    "Pruner": "pruning.pruner",
    "Topology": "topology",
    "TopologyError": "errors",
    "bn_scale": "ops.layer",
    "cubic": "schedule",
    "er": "allocation",
    "erk": "allocation",
    "exponential": "schedule",
    "factors": "ops.layer",
    "info": "ops.schema",
    "iterative": "schedule",
    "kth_largest": "ops.ranking",
    "linear": "schedule",
    "mask": "ops.layer",
    "mask_from_factors": "ops.from_norms",
    "one_shot": "schedule",
    "paper": "allocation",
    "prune": "pruning.model",
    "prune_": "ops.layer",
    "prune_from_factors_": "ops.from_norms",
    "score": "ops.layer",
    "score_from_factors": "ops.from_norms",
    "scores": "pruning.model",
    "topk_mask": "ops.ranking",
    "trace": "topology",
    "uniform": "allocation",
    "uniform_plus": "allocation",
}


__all__ = ["__version__", *_HOME]  # noqa: PLE0604 (the keys are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lap_ext' has no attribute {name!r}")
    value = getattr(import_module(f"lap_ext.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
