# SPDX-License-Identifier: MIT
"""Checkpoints larger than memory: a safetensors folder in, a pruned one out."""

from lap_ext.checkpoint.pruned import CheckpointResult as CheckpointResult
from lap_ext.checkpoint.pruned import StoredMasks as StoredMasks
from lap_ext.checkpoint.run import prune as prune
from lap_ext.progress import Progress as Progress

__all__ = ["CheckpointResult", "Progress", "StoredMasks", "prune"]
