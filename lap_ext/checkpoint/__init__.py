# SPDX-License-Identifier: MIT
"""Checkpoints larger than memory: a safetensors folder in, a pruned one out."""

from lap_ext.checkpoint.pruning import prune as prune
from lap_ext.checkpoint.result import CheckpointResult as CheckpointResult
from lap_ext.checkpoint.result import StoredMasks as StoredMasks
from lap_ext.progress import Progress as Progress

__all__ = ["CheckpointResult", "Progress", "StoredMasks", "prune"]
