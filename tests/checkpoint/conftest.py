# SPDX-License-Identifier: MIT
"""A checkpoint directory to prune; models that are traced once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lap_ext.checkpoint import structure
from lap_ext.pruning import plan
from tests.helpers.checkpoints import network, write
from tests.helpers.traced_once import bound_once, traced_once


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, and models, of one structure are traced once: what is stored differs."""
    monkeypatch.setattr(structure, "trace", traced_once)
    monkeypatch.setattr(plan, "trace", bound_once)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """The checkpoint directory of network()."""
    return write(tmp_path / "dense", network().state_dict())
