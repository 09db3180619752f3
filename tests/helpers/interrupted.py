# SPDX-License-Identifier: MIT
"""Prunings of network() that are interrupted in the middle, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lap_ext.checkpoint import Progress
from tests.helpers.checkpoints import prune

SHARDS = 3
WORK = ".out.lap_ext"  # beside out


def contents(directory: Path) -> dict[str, bytes]:
    """Reads all files below a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def stopping(step: str, count: int, error: BaseException) -> Callable[[Progress], None]:
    """Raises at the count-th report of a step."""
    left = [count]

    def report(progress: Progress) -> None:
        left[0] -= progress.step == step
        if left[0] == 0 and progress.step == step:
            raise error

    return report


def interrupt(source: Path, step: str = "write", count: int = 5, **options: Any) -> Path:
    """Stops a pruning into out, beside source; gives its working directory."""
    stop = stopping(step, count, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prune(source, source.parent / "out", on_progress=stop, **options)
    return source.parent / WORK


def facts(work: Path) -> Any:
    """Reads what an interrupted pruning has noted."""
    return json.loads((work / "state.json").read_text())["facts"]
