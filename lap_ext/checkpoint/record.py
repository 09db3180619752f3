# SPDX-License-Identifier: MIT
"""lap_ext.json next to pruned weights: the options of a pruning, and what each layer has kept.

The command line writes it, with the options as typed; `verify` reads it.

    {"lap_ext": version, "asked": {"sparsity": [texts], "scope": "layer", ...},
     "layers": [{"name": ..., "kept": ..., "total": ..., ...}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lap_ext
from lap_ext._files import replacing
from lap_ext.allocation import Sparsity, notation
from lap_ext.errors import LapValueError
from lap_ext.options import SCOPES, Scope
from lap_ext.pruning.result import PruneResult

RECORD = "lap_ext.json"


@dataclass(frozen=True)
class Record:
    """The record of a pruning.

    Attributes:
        counts: layer name -> (weights kept, all weights).
        options: option -> value, as written.
    """

    counts: Mapping[str, tuple[int, int]]
    options: Any

    def wanted(self) -> tuple[Sparsity, Scope]:
        """Reads the sparsity and its scope.

        Raises:
            LapValueError: they are damaged.
        """
        with _damage():
            if self.options["scope"] not in SCOPES:
                raise ValueError("no such scope")
            return notation.of_texts(self.options["sparsity"]), self.options["scope"]


def write(directory: Path, options: Mapping[str, Any], result: PruneResult) -> None:
    """Writes the record of a pruning.

    Args:
        directory: of the pruned weights.
        options: option -> value; "sparsity" is a list of texts (see allocation/notation.py).
        result: of the pruning.
    """
    layers = json.loads(result.to_json())["layers"]
    facts = {"lap_ext": lap_ext.__version__, "asked": dict(options), "layers": layers}
    with replacing(directory / RECORD) as file:
        file.write(f"{json.dumps(facts, indent=2)}\n".encode())


def read(directory: Path) -> Record | None:
    """Reads the record of a pruning; None where there is none.

    Raises:
        LapValueError: it is damaged.
    """
    path = directory / RECORD
    if not path.is_file():
        return None
    with _damage():
        facts = json.loads(path.read_bytes())
        counts = {row["name"]: (int(row["kept"]), int(row["total"])) for row in facts["layers"]}
        return Record(counts, facts.get("asked"))


@contextmanager
def _damage() -> Iterator[None]:
    """Turns the errors of a damaged record into one LapValueError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LapValueError(f"an undamaged {RECORD}", error) from None
