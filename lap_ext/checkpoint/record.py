# SPDX-License-Identifier: MIT
"""lap_ext.json next to pruned weights: the options of a pruning, and what each layer has kept.

The command line writes it, with the options as typed; `verify` reads it.

    {"lap_ext": version, "model": the original, as typed,
     "asked": {"sparsity": [texts], "scope": "layer", ...},
     "layers": [{"name": ..., "kept": ..., "total": ..., "units": [kept, total] or null, ...},
                ...]}

With units across layers, it has "families" and "fixed" as in the JSON of a result, and "vectors":
{name of a mask of a bias, a norm or the like: [kept, total]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
from lap_ext.structures import NM, Coupled

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
        vectors: name -> (entries kept, all entries) of masks of biases, norms and the like.
        families: (name, layers, units kept, all units) of each family of units across layers.
        fixed: (layer, channels, reason) of channels that cannot be removed.
    """

    counts: Mapping[str, tuple[int, int]]
    options: Any
    model: str | None = None
    units: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    vectors: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    families: Sequence[tuple[str, tuple[str, ...], int, int]] = ()
    fixed: Sequence[tuple[str, int, str]] = ()

    def wanted(self) -> tuple[Sparsity, Scope, MinKeep] | None:
        """Reads the sparsity of weights, its scope and the floors; None where units are counted.

        Raises:
            LapValueError: they are damaged.
        """
        with _damage():
            texts, scope = self.options["sparsity"], self.options["scope"]
            if scope not in SCOPES:
                raise ValueError("no such scope")
            structure = self.options.get("structure")
            pattern = None if structure is None else structures.of(structure)
            if isinstance(pattern, Coupled):
                return None
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
    shown = json.loads(result.to_json())
    facts = {"lap_ext": lap_ext.__version__, "model": model, "asked": dict(options)}
    facts["layers"] = shown["layers"]
    if result.families:
        layers = {row.name for row in result.layers}
        masks = ((name, result.masks[name]) for name in result.masks if name not in layers)
        facts["vectors"] = {name: [int(x.count_nonzero()), x.numel()] for name, x in masks}
        facts |= {name: shown[name] for name in ("families", "fixed")}
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
            vectors = {name: _pair(*pair) for name, pair in facts.get("vectors", {}).items()}
            families = [_family(x) for x in facts.get("families", [])]
            fixed = [_fixed(x) for x in facts.get("fixed", [])]
            return Record(counts, facts.get("asked"), model, units, vectors, families, fixed)
    except FileNotFoundError:
        return None


def _pair(kept: object, total: object) -> tuple[int, int]:
    """Checks two counts."""
    if type(kept) is int and type(total) is int and 0 <= kept <= total:
        return kept, total
    raise ValueError("no counts of layers")


def _family(x: Mapping[str, object]) -> tuple[str, tuple[str, ...], int, int]:
    """Checks what is recorded of a family of units."""
    name, layers = x["name"], x["layers"]
    if type(name) is str and isinstance(layers, list) and all(type(y) is str for y in layers):
        return name, tuple(layers), *_pair(x["kept"], x["total"])
    raise ValueError("no family of units")


def _fixed(x: Mapping[str, object]) -> tuple[str, int, str]:
    """Checks what is recorded of channels that cannot be removed."""
    layer, channels, reason = x["layer"], x["channels"], x["reason"]
    if type(layer) is str and type(channels) is int and type(reason) is str:
        return layer, channels, reason
    raise ValueError("no channels")


@contextmanager
def _damage() -> Iterator[None]:
    """Turns the errors of a damaged record into one LapValueError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        got = error.got if isinstance(error, LapError) else error
        raise LapValueError(f"an undamaged {RECORD}", got) from None
