# SPDX-License-Identifier: MIT
"""What lap_ext is measured against, written as its users would write it.

    score = |w| * ||w_prev[i]|| * ||w_next[:, o]||       in eager PyTorch, float32 norms
    mask  = the keep largest of them, by topk | kthvalue | sort | quantile | numpy.partition | ...

A selection takes scores (any shape) and keep, and returns a mask of their shape. Those that find a
threshold and compare keep more than keep under ties: that is how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

Select = Callable[[Tensor, int], Tensor]
QUANTILE_MAX = 1 << 24  # torch.quantile refuses more (until torch 2.14)


# --- scores -------------------------------------------------------------------------------------


def _per_channel(w: Tensor, in_norm: Tensor, out_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes in_norm [I] and out_norm [O] so that they multiply w [O, I, *K]."""
    ones = [1] * (w.dim() - 2)
    return in_norm.view(1, -1, *ones), out_norm.view(-1, 1, *ones)


def eager_norms(w_prev: Tensor, w_next: Tensor) -> tuple[Tensor, Tensor]:
    """Computes norms of the producer's rows [I] and of the consumer's columns [O]."""
    in_norm = torch.linalg.vector_norm(w_prev, dim=tuple(range(1, w_prev.dim())))
    out_norm = torch.linalg.vector_norm(w_next, dim=(0, *range(2, w_next.dim())))
    return in_norm, out_norm


def eager_squared_norms(w: Tensor) -> tuple[Tensor, Tensor]:
    """Sums squares of w's rows and columns in float64: as exact as ours."""
    squares = w.double().square()
    rest = tuple(range(2, w.dim()))
    return squares.sum((1, *rest)), squares.sum((0, *rest))


def vector_norms(w: Tensor) -> tuple[Tensor, Tensor]:
    """Computes norms of w's rows and columns in float32, each by one call."""
    rest = tuple(range(2, w.dim()))
    norm = partial(torch.linalg.vector_norm, w, dtype=torch.float32)
    return norm(dim=(1, *rest)), norm(dim=(0, *rest))


def eager_score_from_norms(w: Tensor, in_norm: Tensor, out_norm: Tensor) -> Tensor:
    into, out = _per_channel(w, in_norm, out_norm)
    return w.abs() * into * out


def eager_score(w_prev: Tensor, w: Tensor, w_next: Tensor) -> Tensor:
    """Scores by the formula as one writes it."""
    return eager_score_from_norms(w, *eager_norms(w_prev, w_next))


def eager_score_in_place(w_prev: Tensor, w: Tensor, w_next: Tensor) -> Tensor:
    """Scores by the formula with one temporary, as a careful user writes it."""
    into, out = _per_channel(w, *eager_norms(w_prev, w_next))
    return w.abs().mul_(into).mul_(out)


def compiled_score() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiles eager_score by torch.compile; needs a C++ compiler at its first call."""
    return torch.compile(eager_score, dynamic=False)


# --- selections ---------------------------------------------------------------------------------


def _from_index(scores: Tensor, index: Tensor) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[index] = True
    return mask.view(scores.shape)


def topk(scores: Tensor, keep: int) -> Tensor:
    return _from_index(scores, scores.flatten().topk(keep, sorted=False).indices)


def kthvalue(scores: Tensor, keep: int) -> Tensor:
    flat = scores.flatten()
    return scores >= flat.kthvalue(flat.numel() - keep + 1).values


def sort(scores: Tensor, keep: int) -> Tensor:
    """Sorts stably, so that ties go to the lower index as in lap_ext."""
    order = scores.flatten().sort(descending=True, stable=True).indices
    return _from_index(scores, order[:keep])


def quantile(scores: Tensor, keep: int) -> Tensor:
    """Interpolates between two scores; at most QUANTILE_MAX elements."""
    return scores > torch.quantile(scores.flatten(), 1 - keep / scores.numel())


def numpy_partition(scores: Tensor, keep: int) -> Tensor:
    flat = scores.flatten().numpy()
    at = flat.size - keep
    return scores >= float(np.partition(flat, at)[at])


SELECTIONS: dict[str, Select] = {
    "topk": topk,
    "kthvalue": kthvalue,
    "sort": sort,
    "quantile": quantile,
    "numpy.partition": numpy_partition,
}


# --- torch.nn.utils.prune -----------------------------------------------------------------------


def _module(w: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(w, requires_grad=False))
    return module


def l1_unstructured(w: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Makes the mask in w's dtype, as prune does (it also multiplies w by it)."""
    module = _module(w)
    prune.l1_unstructured(module, "weight", scores.numel() - keep, importance_scores=scores)
    return module.get_buffer("weight_mask")


def global_unstructured(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Makes masks in the weights' dtype; the scores stand for the weights, too."""
    named = [(_module(score), "weight") for score in scores]
    prune.global_unstructured(
        named,
        pruning_method=prune.L1Unstructured,
        importance_scores=dict(zip(named, scores, strict=True)),
        amount=sum(score.numel() for score in scores) - keep,
    )
    return [module.get_buffer("weight_mask") for module, _ in named]


# --- lists of scores ----------------------------------------------------------------------------


def cat_kthvalue(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    flat = torch.cat([score.flatten() for score in scores])
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    return [score >= threshold for score in scores]


def cat_topk(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    mask = topk(torch.cat([score.flatten() for score in scores]), keep)
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


# --- the paper's public code, from its description ----------------------------------------------


def public_code(w_prev: Tensor, w: Tensor, w_next: Tensor, keep: int) -> Tensor:
    """Repeats norms to w's size, multiplies squares, sorts all scores to find one threshold.

    The public code runs this on the CPU. Its masks are float. Written from its description, not
    from its text; it has no license.
    """
    window = list(w.shape[2:])
    ones = [1] * len(window)
    into = w_prev.square().flatten(1).sum(1).view(1, -1, *ones)
    out = w_next.square().transpose(0, 1).flatten(1).sum(1).view(-1, 1, *ones)
    full_into = into.repeat(w.shape[0], 1, *window)
    full_out = out.repeat(1, w.shape[1], *window)
    score = w.square() * full_into * full_out
    ordered, _ = torch.sort(score.flatten(), descending=True)
    return (score >= ordered[keep - 1]).to(w.dtype)


def as_masks(result: Any) -> list[Tensor]:
    """Turns a baseline's mask, or masks, into bool tensors."""
    masks = [result] if isinstance(result, Tensor) else list(result)
    return [mask if mask.dtype == torch.bool else mask != 0 for mask in masks]
