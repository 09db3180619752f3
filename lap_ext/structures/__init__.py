# SPDX-License-Identifier: MIT
"""Structures: what is removed together.

    "2:4"       NM(2, 4): 2 of every 4 consecutive inputs are kept; any N:M
                "2:4/out", "2:4/flat", "2:4/transposable": NM's axis and transposable
    "16x16"     Block(16, 16): blocks of 16 outputs by 16 inputs
    "row"       Row(): output channels
    "column"    Column(): input channels
                Groups(assignment): any partition that you give
    "channel"   Coupled("channel"): channels through all layers that share them; also "head",
                "expert" and "unit" (see `groups`)

The worth of a unit (a block, row, column or group) is that of its weights' scores s:

    aggregate="energy"    sqrt(sum of s^2)
    aggregate="mean"      (sum of s) / (number of its weights)
    aggregate="exact"     ||W_next (W * unit) W_prev||_F: how much the linear neighborhood changes
                          when the unit goes

`keep` and `sparsity` count weights, and a unit counts with all of its own, zero or not. The units
with the highest worth are kept as long as their weights fit: the first that does not fit ends the
ranking, also where smaller ones of less worth would fit. Of equal worth, the one with the lower
number is kept. A unit without a weight that may be kept has no rank.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias, cast

from lap_ext.errors import LapTypeError, LapValueError
from lap_ext.structures.base import NM as NM
from lap_ext.structures.base import Aggregate as Aggregate
from lap_ext.structures.base import Axis
from lap_ext.structures.base import Block as Block
from lap_ext.structures.base import Column as Column
from lap_ext.structures.base import Partition as Partition
from lap_ext.structures.base import Row as Row
from lap_ext.structures.base import Structure as Structure
from lap_ext.structures.base import check_aggregate as check_aggregate
from lap_ext.structures.coupled import KINDS as KINDS
from lap_ext.structures.coupled import Coupled as Coupled
from lap_ext.structures.coupled import Kind as Kind
from lap_ext.structures.coupled import groups as groups
from lap_ext.structures.matrix import Grid as Grid
from lap_ext.structures.matrix import Matrix as Matrix

if TYPE_CHECKING:
    from lap_ext.structures.given import Groups as Groups

StructureLike: TypeAlias = "Structure | str"

__all__ = ["NM", "Block", "Column", "Coupled", "Groups", "Row", "Structure", "groups", "of"]

LONGEST = 100  # letters of a text: more than any structure has


def __getattr__(name: str) -> object:
    """Loads the groups, which need torch, when they are asked for."""
    if name == "Groups":
        return vars(import_module("lap_ext.structures.given"))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_PATTERN = re.compile(r"(\d{1,9}):(\d{1,9})(?:/(\w+))?")
_AXES: dict[str, Axis] = {"in": "in", "out": "out", "flat": "flat"}
_BLOCK = re.compile(r"(\d{1,9})x(\d{1,9})")


def of(structure: StructureLike) -> Structure:
    """Returns a structure, or makes the one that a text stands for.

    Raises:
        TypeError: structure is neither.
        ValueError: the text stands for none.

    Example:
        >>> of("2:4"), of("2:4/out"), of("16x16"), of("row")
        (NM(keep=2, of=4, axis='in', transposable=False), \
NM(keep=2, of=4, axis='out', transposable=False), Block(rows=16, cols=16), Row())
    """
    if isinstance(structure, Structure) and type(structure).__module__.startswith(__name__):
        return structure
    if not isinstance(structure, str):
        raise LapTypeError(
            "{argument} to be a text such as '2:4', or an object of lap_ext.structures",
            type(structure).__name__,
            "Give units of your own to Groups." if isinstance(structure, Structure) else "",
            argument="structure",
        )
    if structure in ("row", "column"):
        return Row() if structure == "row" else Column()
    if structure in KINDS:
        return Coupled(cast("Kind", structure))
    if match := _BLOCK.fullmatch(structure):
        return Block(int(match[1]), int(match[2]))
    if match := _PATTERN.fullmatch(structure):
        keep, group, how = int(match[1]), int(match[2]), match[3]
        if how == "transposable":
            return NM(keep, group, transposable=True)
        if how is None or how in _AXES:
            return NM(keep, group, _AXES[how or "in"])
    raise LapValueError(
        "{argument} to be 'N:M' (such as '2:4', '2:4/out', '2:4/flat' or '2:4/transposable'), "
        "'ROWSxCOLUMNS' (such as '16x16'), 'row', 'column', 'channel', 'head', 'expert' or 'unit'",
        repr(structure),
        argument="structure",
    )


def spelled(structure: StructureLike) -> str:
    """Returns the text that files of masks hold for a structure.

    Args:
        structure: one, or such a text.

    Raises:
        TypeError, ValueError: as in `of`.

    Example:
        >>> from lap_ext.structures import Groups
        >>> spelled(NM(2, 4)), spelled("16x16"), spelled(Groups([[0, 2], [1]]))
        ('2:4', '16x16', 'groups')
    """
    text = structure.spelled if isinstance(structure, Structure) else structure
    return text if text == "groups" else of(text).spelled  # the partition itself is not in it
