# SPDX-License-Identifier: MIT
"""Models that are traced once."""

from __future__ import annotations

import pytest

from lap_ext.checkpoint import structure
from lap_ext.pruning import plan
from tests.helpers.traced_once import bound_once, traced_once


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain models of one structure are traced once: where their weights are differs."""
    monkeypatch.setattr(structure, "trace", traced_once)
    monkeypatch.setattr(plan, "trace", bound_once)
