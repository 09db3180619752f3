# SPDX-License-Identifier: MIT
"""Every operator of lap_ext in plain PyTorch: the fallback on any device, the oracle of the tests.

Written from the definition, bit for bit. Weights rank by (key of the score, larger first; lower
tensor and flat C-order index first), norms.py says in which order squares are added, score.py how a
score is rounded.
"""

from lap_ext.ops.reference.norms import col_squared_norms as col_squared_norms
from lap_ext.ops.reference.norms import norm as norm
from lap_ext.ops.reference.norms import row_squared_norms as row_squared_norms
from lap_ext.ops.reference.norms import squared_norms as squared_norms
from lap_ext.ops.reference.score import score as score
from lap_ext.ops.reference.select import kth_largest as kth_largest
from lap_ext.ops.reference.select import mask as mask
from lap_ext.ops.reference.select import prune_ as prune_
from lap_ext.ops.reference.select import topk_mask as topk_mask

__all__ = [
    "col_squared_norms",
    "kth_largest",
    "mask",
    "norm",
    "prune_",
    "row_squared_norms",
    "score",
    "squared_norms",
    "topk_mask",
]
