# SPDX-License-Identifier: MIT
"""A checkpoint directory to prune."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoints import network, write


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """The checkpoint directory of network()."""
    return write(tmp_path / "dense", network().state_dict())
