# SPDX-License-Identifier: MIT
"""lap_ext.json beside pruned weights: what was asked of a pruning, and what each layer has left.

The command line writes it, with options as they were typed; `verify` reads it.

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
from lap_ext.pruning.plan import SCOPES
from lap_ext.pruning.result import PruneResult

RECORD = "lap_ext.json"


@dataclass(frozen=True)
class Record:
    """What a pruning has left behind for `verify`.

    Attributes:
        counts: layer name -> (weights kept, all weights).
        asked: option -> value, as it is written.
    """

    counts: Mapping[str, tuple[int, int]]
    asked: Any

    def wanted(self) -> tuple[Sparsity, str]:
        """Reads the sparsity that was asked for, and its scope; ValueError if they are damaged."""
        with _damage():
            if self.asked["scope"] not in SCOPES:
                raise ValueError("no such scope")
            return notation.of_texts(self.asked["sparsity"]), self.asked["scope"]


def write(folder: Path, asked: Mapping[str, Any], result: PruneResult) -> None:
    """Writes the record of a pruning.

    Args:
        folder: of the pruned weights.
        asked: option -> value; "sparsity" is a list of texts (see allocation/notation.py).
        result: what the pruning gave.
    """
    layers = json.loads(result.to_json())["layers"]
    facts = {"lap_ext": lap_ext.__version__, "asked": dict(asked), "layers": layers}
    with replacing(folder / RECORD) as file:
        file.write(f"{json.dumps(facts, indent=2)}\n".encode())


def read(folder: Path) -> Record | None:
    """Reads the record of a pruning; None where there is none, ValueError if it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    with _damage():
        facts = json.loads(path.read_bytes())
        counts = {row["name"]: (int(row["kept"]), int(row["total"])) for row in facts["layers"]}
        return Record(counts, facts.get("asked"))


@contextmanager
def _damage() -> Iterator[None]:
    """Turns what is wrong with a record into one ValueError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{RECORD} is damaged: {error}") from None
