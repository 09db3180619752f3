# SPDX-License-Identifier: MIT
"""All that lap_ext computes for one layer, and a hash of its bits."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

import lap_ext
from tests.helpers import layer_cases as cases


def digest(tensors: list[Tensor]) -> str:
    """A hash of all bits, in C-order of the indices."""
    h = hashlib.sha256()
    for x in tensors:
        h.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def everything(w_prev: Tensor, w: Tensor, w_next: Tensor) -> list[Tensor]:
    """All results of a layer, with the weights after pruning."""
    in_norm, out_norm = lap_ext.neighbor_norms(w_prev, w, w_next)
    scores = lap_ext.score(w_prev, w, w_next)
    masks = [lap_ext.mask(w_prev, w, w_next, sparsity=s) for s in (0.5, 0.9, 0.99)]
    lists = lap_ext.topk_mask([w_prev, scores, w_next], sparsity=0.8)
    pruned = w.clone()
    kept = lap_ext.prune_(w_prev, pruned, w_next, sparsity=0.7)
    return [in_norm, out_norm, scores, *masks, *lists, kept, pruned, lap_ext.kth_largest(w, 99)]


def layer(kind: str, outs: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution weights, large enough for the sampled plan and for several threads."""
    w = cases.hostile(kind, outs * 300 * 9, torch.float32).view(outs, 300, 3, 3)
    return torch.randn(300, 70, 3, 3), w, torch.randn(130, outs, 3, 3)
