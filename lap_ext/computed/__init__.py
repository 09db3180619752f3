# SPDX-License-Identifier: MIT
"""Weights that a module computes itself before each forward pass, and the masks on them."""

from lap_ext.computed.attributes import (
    Reference,
    as_parameters,
    evaluating,
    is_computed,
    references,
    reserve_masks,
    sources,
    value,
    value_of,
)
from lap_ext.computed.masking import keep_only, mask_of

__all__ = [
    "Reference",
    "as_parameters",
    "evaluating",
    "is_computed",
    "keep_only",
    "mask_of",
    "references",
    "reserve_masks",
    "sources",
    "value",
    "value_of",
]
