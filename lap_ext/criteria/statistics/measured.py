# SPDX-License-Identifier: MIT
"""Holds what a criterion has measured on data, in memory or in a safetensors file.

    LAYER.WHAT      for the first use of a weight in the network, or of the weight's shape
    LAYER.WHAT.K    for its use K, from 1 on (a weight that is tied, shared or packed in parts)

LAYER is the layer's name, as in the results of `prune`; WHAT is the criterion's word for it. Where
a statistic has a value per channel, one number (of no dimension) stands for all channels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lap_ext._files import safetensors_package
from lap_ext.errors import LapFileNotFoundError, LapValueError
from lap_ext.places import Chunk
from lap_ext.topology import Topology
from lap_ext.topology.roles import Role

_CURE = "Write the file anew with lap_ext.criteria.measure, the same model and criterion."


def name_of(topology: Topology, role: Role, what: str) -> str:
    """Names the statistic of one use of a weight."""
    number = topology.layers[role.layer].roles.index(role)
    return f"{role.layer}.{what}" + (f".{number}" if number else "")


class Statistics:
    """The statistics of a model's layers, by name.

    Args:
        tensors: name -> statistic.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._tensors = dict(tensors or {})

    def of_chunk(self, chunk: Chunk, what: str) -> Tensor | None:
        """Returns what a statistic of the weight's shape holds for a chunk, or None."""
        full = self.get(f"{chunk.layer.name}.{what}")
        return None if full is None else chunk.cut_from(full).to(chunk.weight.device)

    def get(self, name: str) -> Tensor | None:
        """Returns a statistic by its name, or None."""
        return self._tensors.get(name)


class StatisticsFile(Statistics):
    """Statistics in a safetensors file, of which only the rows that are asked for are read.

    Raises:
        LapFileNotFoundError: there is no such file.
        LapValueError: the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        if not self.path.is_file():
            raise LapFileNotFoundError(
                "{argument} to be batches, or a safetensors file of statistics",
                repr(str(path)),
                "lap_ext.criteria.measure computes them.",
                argument="data",
            )
        package = safetensors_package("it reads the statistics")
        try:
            self._file: Any = package.safe_open(self.path, framework="pt")
        except (package.SafetensorError, ValueError, OSError) as error:
            raise LapValueError(
                "a complete safetensors file of statistics in {argument}",
                str(error).rstrip("."),
                _CURE,
                argument="data",
            ) from None
        self._names = set(self._file.keys())

    def get(self, name: str) -> Tensor | None:
        """Reads a statistic by its name, or returns None."""
        if name not in self._names:
            return None
        values: Tensor = self._file.get_tensor(name)
        _check_finite(name, values)
        return values

    def of_chunk(self, chunk: Chunk, what: str) -> Tensor | None:
        """Reads the rows of a statistic that a chunk needs, or returns None."""
        name, shape = f"{chunk.layer.name}.{what}", chunk.layer.shape
        if name not in self._names:
            return None
        stored = self._file.get_slice(name)
        check_shape(name, stored.get_shape(), shape)
        row = max(torch.Size(shape[1:]).numel(), 1)
        top, bottom = chunk.first // row, -(-(chunk.first + chunk.weight.numel()) // row)
        rows: Tensor = stored[top:bottom].reshape(-1)[chunk.first - top * row :]
        rows = rows[: chunk.weight.numel()]
        _check_finite(name, rows)
        return rows.reshape(chunk.weight.shape).to(chunk.weight.device)


def _check_finite(name: str, values: Tensor) -> None:
    """Raises unless a statistic has finite floating-point values."""
    if not values.is_floating_point() or not bool(values.isfinite().all()):
        got = "inf or NaN" if values.is_floating_point() else values.dtype
        raise LapValueError(
            f"finite floating-point values of {name!r} in {{argument}}",
            got,
            _CURE,
            argument="data",
        )


def check_not_negative(name: str, values: Tensor) -> None:
    """Raises if a statistic whose root is taken is negative somewhere."""
    if bool((values < 0).any()):
        least = f"{float(values.min()):g}"
        raise LapValueError(f"{name!r} >= 0 in {{argument}}", least, _CURE, argument="data")


def check_shape(name: str, shape: Any, expected: Any) -> None:
    """Raises unless a statistic has the shape that the model's layer needs."""
    if list(shape) != list(expected):
        raise LapValueError(
            f"{name!r} of shape {list(expected)} in {{argument}}",
            list(shape),
            _CURE,
            argument="data",
        )


def missing(name: str) -> LapValueError:
    """Makes the error of a file without a statistic that a criterion needs."""
    cure = f"{_CURE} A layer that is frozen then has no gradient."
    return LapValueError(f"{name!r} in {{argument}}", "a file without", cure, argument="data")
