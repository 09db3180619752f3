# SPDX-License-Identifier: MIT
"""Pruning of models in memory: prune, scores, and a Pruner that prunes during training."""

from lap_ext.pruning.model import prune as prune
from lap_ext.pruning.model import scores as scores
from lap_ext.pruning.model import sparsity as sparsity
from lap_ext.pruning.pruner import Pruner as Pruner
from lap_ext.pruning.result import LayerResult as LayerResult
from lap_ext.pruning.result import PruneResult as PruneResult

__all__ = ["LayerResult", "PruneResult", "Pruner", "prune", "scores", "sparsity"]
