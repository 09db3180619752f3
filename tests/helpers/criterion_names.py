# SPDX-License-Identifier: MIT
"""The names of the criteria, by what they score."""

from __future__ import annotations

from lap_ext import criteria

UNITS = ("minitron", "reap")  # no weights: units across layers


def of_weights() -> list[str]:
    """The registered criteria that score weights."""
    return sorted(name for name in criteria.REGISTRY if name not in UNITS)
