# SPDX-License-Identifier: MIT
"""Small instances of every family: few channels, tiny inputs, the true structure of each.

VISION and SEQUENCE are plain torch; HF are transformers' own classes from random configs (names
hf_*, transformers is imported by make() alone). ENTRIES is all three: each goes through
torch.export.export(model, args, kwargs, strict=False). HARD, apart from ENTRIES, exports too, and
is what a tracer may refuse by name but never guess.
"""

from __future__ import annotations

from tests.zoo import chains, dense, hard, hf, mobile, modern, resnets, sequence
from tests.zoo.common import Entry, Example

VISION: list[Entry] = [
    *chains.ENTRIES,
    *resnets.ENTRIES,
    *dense.ENTRIES,
    *mobile.ENTRIES,
    *modern.ENTRIES,
]
SEQUENCE: list[Entry] = sequence.ENTRIES
HF: list[Entry] = hf.ENTRIES
ENTRIES: list[Entry] = [*VISION, *SEQUENCE, *HF]
HARD: list[Entry] = hard.ENTRIES

__all__ = ["ENTRIES", "HARD", "HF", "SEQUENCE", "VISION", "Entry", "Example"]
