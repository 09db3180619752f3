# SPDX-License-Identifier: MIT
"""Sees the weights of layers as matrices, and finds the layers that a structure fits."""

from __future__ import annotations

from collections.abc import Sequence

from lap_ext._text import some
from lap_ext.errors import LapValueError, warn
from lap_ext.structures import NM, Groups, Matrix, Structure
from lap_ext.topology import Layer

NO_GROUPS = "no groups given"
_LISTED = 5  # of many layers, errors and warnings list the first ones


def matrix_of(layer: Layer) -> Matrix:
    """Returns the matrix of a layer's weight, as it is used first, but not as an embedding.

    Rows are outputs and columns are inputs, or the other way round.
    """
    parts = [role.part for role in layer.roles if role.kind != "embedding"]
    parts = parts or [role.part for role in layer.roles]
    if not parts:
        return Matrix.of(layer.shape)
    return Matrix.of(parts[0].shape, parts[0].groups, parts[0].transposed)


def rows_together(layers: Sequence[Layer], structure: Structure | None) -> dict[str, int]:
    """Counts the rows of each layer that a pattern must see at once, if they are more than one."""
    if not isinstance(structure, NM):
        return {}
    return {layer.name: structure.rows_together(matrix_of(layer)) for layer in layers}


def fitting(
    layers: Sequence[Layer], structure: Structure | None, strict: bool, known: Sequence[str]
) -> tuple[list[Layer], dict[str, str]]:
    """Splits layers into those that can have a structure, and the others -> the reason.

    Warns of the others. known: the names of all layers of the model.

    Raises:
        LapValueError: there are others and strict is set, or there are only others; a dict of
            groups names a layer that there is not.
    """
    if isinstance(structure, Groups):
        structure.check_names(known)
        others = {x.name: NO_GROUPS for x in layers if structure.given(x.name, x.shape) is None}
    elif isinstance(structure, NM):
        reasons = {layer.name: structure.misfit(matrix_of(layer)) for layer in layers}
        others = {name: f"{structure}: {why}" for name, why in reasons.items() if why}
    else:
        others = {}
    fit = [layer for layer in layers if layer.name not in others]
    misfits = [f"{name!r} ({why})" for name, why in others.items() if why != NO_GROUPS]
    if layers and not fit and not misfits:
        raise LapValueError("groups for one of the layers at least", "none", argument="structure")
    if misfits and (strict or not fit):
        raise LapValueError(
            f"layers that {structure} fits",
            some(misfits, _LISTED),
            "Exclude them, or leave out {strict=True}." if fit else "Choose another structure.",
        )
    if misfits:
        warn(f"{structure} does not fit some layers, which stay dense: {some(misfits, _LISTED)}.")
    return fit, others
