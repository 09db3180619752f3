# SPDX-License-Identifier: MIT
"""Many prunings of one checkpoint directory, with one trace: most of the time of a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lap_ext.checkpoint import pruning


def one_trace(patch: pytest.MonkeyPatch) -> None:
    """Lets `checkpoint.prune` trace the model of each directory once."""
    known: dict[Path, Any] = {}
    structure_of = pruning.structure_of

    def first(files: Any, *how: Any) -> Any:
        if files.path not in known:
            known[files.path] = structure_of(files, *how)
        return known[files.path]

    patch.setattr(pruning, "structure_of", first)
