# SPDX-License-Identifier: MIT
"""Models that are traced once."""

from __future__ import annotations

import pytest

from lap_ext.pruning import plan
from tests.helpers.traced_once import bound_once


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain models of one structure are traced once: how they are pruned differs."""
    monkeypatch.setattr(plan, "trace", bound_once)
