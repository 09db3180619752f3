# SPDX-License-Identifier: MIT
"""Ordered integer keys of scores in plain PyTorch: they sort as the scores do (csrc/math/key.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from lap_ext.ops.reference.common import score_dtype


def key_dtype(scores: torch.dtype) -> torch.dtype:
    """Returns the dtype of the keys of float64 or float32 scores: integers of the same size."""
    return torch.int64 if scores == torch.float64 else torch.int32


def never(integer: torch.dtype) -> int:
    """Returns the key, below every other, of a weight that must not be kept."""
    return torch.iinfo(integer).min


def ordered_keys(scores: Tensor, without_nan: bool) -> Tensor:
    """Makes contiguous int32 (int64 for float64) keys that sort as the scores do; -0.0 equals +0.0.

    A NaN has the largest key; without_nan says that there is none.
    """
    wide = scores.to(score_dtype(scores.dtype)) + 0.0
    keys = flip(wide.contiguous().view(key_dtype(wide.dtype)))
    return keys if without_nan else keys.masked_fill_(wide.isnan(), torch.iinfo(keys.dtype).max)


def flip(bits: Tensor) -> Tensor:
    """Turns float bits into ordered keys, and back."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def score_keys(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Makes keys of scores, whose sign is dropped; overwrites scores."""
    integer = key_dtype(scores.dtype)
    keys = scores.view(integer)
    keys &= torch.iinfo(integer).max
    if mask is not None:
        keys.masked_fill_(~mask, never(integer))
    return keys
