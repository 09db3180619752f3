# SPDX-License-Identifier: MIT
# The public names of lap_ext.checkpoint, as lap_ext/__init__.pyi has those of lap_ext.

from lap_ext.checkpoint.inspecting import InspectedLayer as InspectedLayer
from lap_ext.checkpoint.inspecting import Inspection as Inspection
from lap_ext.checkpoint.inspecting import inspect as inspect
from lap_ext.checkpoint.pruning import prune as prune
from lap_ext.checkpoint.result import CheckpointResult as CheckpointResult
from lap_ext.checkpoint.result import StoredMasks as StoredMasks
from lap_ext.checkpoint.scoring import scores as scores
from lap_ext.checkpoint.stream import ScoreStream as ScoreStream
from lap_ext.checkpoint.verifying import Finding as Finding
from lap_ext.checkpoint.verifying import LayerCount as LayerCount
from lap_ext.checkpoint.verifying import Verdict as Verdict
from lap_ext.checkpoint.verifying import verify as verify
from lap_ext.progress import Progress as Progress
from lap_ext.pruning.figures import LayerFigures as LayerFigures
from lap_ext.pruning.figures import ScoreTable as ScoreTable
