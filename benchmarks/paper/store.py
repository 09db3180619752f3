# SPDX-License-Identifier: MIT
"""The finished cells in one JSON file, a line each; after every cell it is written anew.

It is written beside its place and renamed: a run that is stopped at any moment leaves whole files,
and the next one skips what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import replace


@dataclass(frozen=True)
class Key:
    """What a cell is of. The steps are part of it: other steps are another experiment."""

    net: str
    dataset: str
    seed: int
    method: str
    level: int  # 0: the dense net
    schedule: str
    train_steps: int
    tune_steps: int
    batches: int  # that the method looks at, at most


@dataclass(frozen=True)
class Cell:
    """What was measured, in per cent and seconds."""

    key: Key
    kept: float  # per cent of the weights
    pruned: float  # test accuracy right after pruning
    tuned: float  # and after fine-tuning
    prune_s: float
    tune_s: float


class StoreError(Exception):
    """The file is not one of ours."""


class Store:
    """All cells of a file."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.cells: dict[Key, Cell] = {}
        if path.exists() and not fresh:
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            self.facts = content["facts"]
            for row in content["cells"]:
                key = Key(**{name: row.pop(name) for name in Key.__dataclass_fields__})
                self.cells[key] = Cell(key, **row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{self.path}: expected the results of an earlier run ({error!r}). "
                "Move it away, or start anew with --fresh."
            ) from error

    def __contains__(self, key: Key) -> bool:
        return key in self.cells

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Returns those that are not finished."""
        return [key for key in keys if key not in self.cells]

    def add(self, *cells: Cell) -> None:
        """Keeps these, in memory and in the file."""
        self.cells.update({cell.key: cell for cell in cells})
        self.write()

    def write(self) -> None:
        """Writes everything; the order does not depend on the order of the runs."""
        rows = []
        for key in sorted(self.cells, key=lambda key: tuple(asdict(key).values())):
            row = asdict(self.cells[key])
            rows.append("  " + json.dumps(row.pop("key") | row))
        facts = json.dumps(self.facts)
        text = '{\n "facts": ' + facts + ',\n "cells": [\n' + ",\n".join(rows) + "\n ]\n}\n"
        replace(self.path, lambda file: file.write(text.encode()))
