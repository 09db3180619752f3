# SPDX-License-Identifier: MIT
"""Reads what the command line has written of an earlier pruning, to report about it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lap_ext._files import parsed_json, small_file
from lap_ext.checkpoint import record
from lap_ext.checkpoint.files import MASKS
from lap_ext.errors import LapFileNotFoundError, LapValueError
from lap_ext.masks import Masks
from lap_ext.pruning.families import FamilyResult
from lap_ext.report import Histogram
from lap_ext.topology.coupling import Fixed

_LONGEST = 100_000_000  # bytes of a result as JSON


@dataclass(frozen=True)
class StoredPruning:
    """A pruning of which the directory is left.

    Attributes:
        directory: the pruned weights.
        masks_file: their masks.
        options: option -> value, as typed; empty if they were not recorded.
        model: the original, as typed, or None if it was not recorded.
        units: layer name -> (units kept, all units), as far as recorded.
        families: of units across layers, as far as recorded.
        fixed: channels that cannot be removed, as far as recorded.
        scores: no scores are stored.
    """

    directory: Path
    masks_file: Path
    options: Mapping[str, Any]
    model: str | None
    units: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scores: Mapping[str, Histogram] = field(default_factory=dict)
    families: Sequence[FamilyResult] = ()
    fixed: Sequence[Fixed] = ()

    @property
    def criterion(self) -> str:
        """The name of the criterion."""
        return str(self.options.get("criterion", "not recorded"))

    @property
    def masks(self) -> Masks:
        """The masks, read into memory."""
        return Masks.load(self.masks_file)


def stored_pruning(result: Path) -> StoredPruning:
    """Finds an earlier pruning.

    Args:
        result: the directory of the pruned weights, or a file with what `lap-ext prune --json`
            printed.

    Raises:
        LapValueError: it is neither, or damaged.
        LapFileNotFoundError: it does not exist, or has no masks.
    """
    directory, model = result, None
    if result.is_file():
        directory, model = _of_json(result)
    if not directory.is_dir():
        raise LapFileNotFoundError(
            "{argument} to be a directory that prune has written, or a file with its --json",
            repr(str(directory)),
            argument="result",
        )
    recorded = record.read(directory)
    options: Any = {} if recorded is None or recorded.options is None else recorded.options
    if not isinstance(options, Mapping):
        raise LapValueError(f"an undamaged {record.RECORD}", "no table of options")
    if model is None and recorded is not None:
        model = recorded.model
    masks = directory / MASKS
    if not masks.is_file():
        expected, got = f"{{argument}} with its masks, {MASKS}", f"{str(directory)!r} without"
        raise LapFileNotFoundError(expected, got, argument="result")
    if recorded is None:
        return StoredPruning(directory, masks, options, model)
    families = [FamilyResult(*x) for x in recorded.families]
    fixed = [Fixed(*x) for x in recorded.fixed]
    return StoredPruning(directory, masks, options, model, recorded.units, {}, families, fixed)


def _of_json(result: Path) -> tuple[Path, str]:
    """Reads where a printed result lies, and its original."""
    try:
        facts = parsed_json(small_file(result, _LONGEST), _LONGEST)
        out, model = facts["out"], facts["model"]
        if isinstance(out, str) and isinstance(model, str):
            return Path(out), model
    except (ValueError, KeyError, TypeError):
        pass
    raise LapValueError(
        "{argument} to be a file with what prune has printed with --json",
        repr(str(result)),
        argument="result",
    )
