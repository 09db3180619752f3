# SPDX-License-Identifier: MIT
"""Every operator of lap_ext in plain PyTorch: the fallback on any device, the oracle of the tests.

Written from the definition, bit for bit. Weights rank by (key of the score, larger first; lower
tensor and flat C-order index first), norms.py says in which order squares are added, score.py how a
score is rounded, chunks.py what is asked of scores that are never all in memory.
"""

from lap_ext.ops.reference.chunks import count_keys as count_keys
from lap_ext.ops.reference.chunks import key_histogram as key_histogram
from lap_ext.ops.reference.chunks import masked_zero_ as masked_zero_
from lap_ext.ops.reference.chunks import nonzero_mask as nonzero_mask
from lap_ext.ops.reference.chunks import random_scores_ as random_scores_
from lap_ext.ops.reference.chunks import squares_above as squares_above
from lap_ext.ops.reference.chunks import threshold_mask as threshold_mask
from lap_ext.ops.reference.norms import col_squared_norms as col_squared_norms
from lap_ext.ops.reference.norms import norm as norm
from lap_ext.ops.reference.norms import row_squared_norms as row_squared_norms
from lap_ext.ops.reference.norms import squared_norms as squared_norms
from lap_ext.ops.reference.scale import scaled as scaled
from lap_ext.ops.reference.score import score as score
from lap_ext.ops.reference.score import wide_score as wide_score
from lap_ext.ops.reference.select import kth_largest as kth_largest
from lap_ext.ops.reference.select import mask as mask
from lap_ext.ops.reference.select import prune_ as prune_
from lap_ext.ops.reference.select import topk_mask as topk_mask
from lap_ext.ops.reference.structured import block_mask as block_mask
from lap_ext.ops.reference.structured import block_sums_ as block_sums_
from lap_ext.ops.reference.structured import nm_mask as nm_mask
from lap_ext.ops.reference.structured import transposable_mask as transposable_mask

__all__ = [
    "block_mask",
    "block_sums_",
    "col_squared_norms",
    "count_keys",
    "key_histogram",
    "kth_largest",
    "mask",
    "masked_zero_",
    "nm_mask",
    "nonzero_mask",
    "norm",
    "prune_",
    "random_scores_",
    "row_squared_norms",
    "score",
    "squared_norms",
    "squares_above",
    "threshold_mask",
    "topk_mask",
    "transposable_mask",
    "wide_score",
]
