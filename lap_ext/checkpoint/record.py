# SPDX-License-Identifier: MIT
"""lap_ext.json next to pruned weights: the options of a pruning, and what each layer has kept.

The command line writes it, with the options as typed; `verify` reads it.

    {"lap_ext": version, "model": the original, as typed,
     "asked": {"sparsity": [texts], "scope": "layer", ...},
     "layers": [{"name": ..., "kept": ..., "total": ..., "units": [kept, total] or null, ...},
                ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lap_ext
from lap_ext import allocation, structures
from lap_ext._files import parsed_json, replacing, small_file
from lap_ext.allocation import Sparsity, notation
from lap_ext.errors import LapError, LapValueError
from lap_ext.options import SCOPES, MinKeep, Scope
from lap_ext.structures import NM

if TYPE_CHECKING:
    from lap_ext.pruning.result import PruneResult

RECORD = "lap_ext.json"
_LONGEST = 30_000_000  # bytes; that of 100,000 layers has 20 million


@dataclass(frozen=True)
class Record:
    """The record of a pruning.

    Attributes:
        counts: layer name -> (weights kept, all weights).
        options: option -> value, as written.
        model: the original, as it was given to the command line; None if that is not known.
        units: layer name -> (units kept, all units), where a structure has units.
    """

    counts: Mapping[str, tuple[int, int]]
    options: Any
    model: str | None = None
    units: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def wanted(self) -> tuple[Sparsity, Scope, MinKeep]:
        """Reads the sparsity, its scope and the floors.

        Raises:
            LapValueError: they are damaged.
        """
        with _damage():
            texts, scope = self.options["sparsity"], self.options["scope"]
            if scope not in SCOPES:
                raise ValueError("no such scope")
            structure = self.options.get("structure")
            pattern = None if structure is None else structures.of(structure)
            if isinstance(pattern, NM) and texts is None:
                return pattern.sparsity, scope, None
            if not isinstance(texts, list) or not texts:
                raise ValueError("no sparsity")
            sparsity = notation.of_texts(texts)
            allocation.of(sparsity)  # raises where it is no fraction
            return sparsity, scope, self.min_keep()

    def min_keep(self) -> MinKeep:
        """Reads the floors.

        Raises:
            LapValueError: they are damaged.
        """
        with _damage():
            min_keep: MinKeep = self.options.get("min_keep") if self.options else None
            allocation.floors(min_keep, {})  # raises where it is none
            return min_keep


def write(
    directory: Path, options: Mapping[str, Any], result: PruneResult, model: str | None = None
) -> None:
    """Writes the record of a pruning.

    Args:
        directory: of the pruned weights.
        options: option -> value; "sparsity" is a list of texts (see allocation/notation.py), or
            None with a structure that has its own.
        result: of the pruning.
        model: the original.
    """
    layers = json.loads(result.to_json())["layers"]
    facts = {"lap_ext": lap_ext.__version__, "model": model, "asked": dict(options)}
    facts["layers"] = layers
    with replacing(directory / RECORD) as file:
        file.write(f"{json.dumps(facts, indent=2)}\n".encode())


def read(directory: Path) -> Record | None:
    """Reads the record of a pruning; None where there is none.

    Raises:
        LapValueError: it is damaged.
    """
    try:
        with _damage():
            facts = parsed_json(small_file(directory / RECORD, _LONGEST), _LONGEST)
            if not isinstance(facts["layers"], list):
                raise ValueError("no list of layers")
            counts: dict[str, tuple[int, int]] = {}
            units: dict[str, tuple[int, int]] = {}
            for row in facts["layers"]:
                name = row["name"]
                if type(name) is not str or name in counts:
                    raise ValueError("no counts of layers")
                counts[name] = _pair(row["kept"], row["total"])
                if row.get("units") is not None:
                    units[name] = _pair(*row["units"])
            model = facts.get("model")
            model = model if isinstance(model, str) else None
            return Record(counts, facts.get("asked"), model, units)
    except FileNotFoundError:
        return None


def _pair(kept: object, total: object) -> tuple[int, int]:
    """Checks two counts."""
    if type(kept) is int and type(total) is int and 0 <= kept <= total:
        return kept, total
    raise ValueError("no counts of layers")


@contextmanager
def _damage() -> Iterator[None]:
    """Turns the errors of a damaged record into one LapValueError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        got = error.got if isinstance(error, LapError) else error
        raise LapValueError(f"an undamaged {RECORD}", got) from None
