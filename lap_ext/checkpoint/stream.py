# SPDX-License-Identifier: MIT
"""Computes scores one layer at a time and writes the file that holds all of them."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import lap_ext
from lap_ext._files import replacing, safetensors_header
from lap_ext.checkpoint.reading import bytes_of
from lap_ext.errors import LapFileExistsError, LapFileNotFoundError, LapValueError, calling
from lap_ext.pruning.figures import LayerFigures, ScoreTable, figures
from lap_ext.topology import Layer, Topology

_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


class ScoreStream:
    """Scores of a model's layers, each computed when it is requested.

    Iterating gives (layer, scores), with scores in the layer's shape. Each iteration, and each
    call of `table` or `save`, is one pass over the weights.

    Args:
        layers: the layers that are scored, in the order of the network.
        dtypes: the dtype of each layer's scores, float32 or float64.
        compute: begins a pass that gives the scores of each layer.
        options: name of a scoring option -> its value.
        source: the checkpoint directory that is read, if there is one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        dtypes: Sequence[torch.dtype],
        compute: Callable[[], Iterator[Tensor]],
        options: Mapping[str, str],
        source: Path | None = None,
    ) -> None:
        self.layers = layers
        self.dtypes = dtypes
        self.options = options
        self.source = source
        self._compute = compute

    @classmethod
    def of_model(
        cls, topology: Topology, scores: Mapping[str, Tensor], options: Mapping[str, str]
    ) -> ScoreStream:
        """Makes a stream from the scores that `lap_ext.scores` returns, which are all in memory.

        Example:
            >>> import lap_ext
            >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
            >>> topology = lap_ext.trace(net, torch.ones(1, 2))
            >>> values = lap_ext.scores(net, topology=topology)
            >>> stream = ScoreStream.of_model(topology, values, {})
            >>> [(layer.name, scores.shape) for layer, scores in stream]
            [('0', torch.Size([1, 2]))]
        """
        layers = [topology.layers[name] for name in scores]
        dtypes = [values.dtype for values in scores.values()]
        return cls(layers, dtypes, lambda: iter(scores.values()), options)

    def __iter__(self) -> Iterator[tuple[Layer, Tensor]]:
        return zip(self.layers, self._compute(), strict=True)

    @calling("ScoreStream.table")
    def table(self) -> ScoreTable:
        """Computes the figures of the scores of all layers."""
        return ScoreTable([figures(layer, scores) for layer, scores in self])

    @calling("ScoreStream.save")
    def save(self, path: str | os.PathLike[str]) -> ScoreTable:
        """Writes all scores to a safetensors file, with one tensor per layer.

        The file is either complete or absent. Its metadata hold the options and the version of
        lap_ext.

        Args:
            path: a file that does not exist yet, outside the directory that is read.

        Returns:
            The figures of the scores that were written.

        Raises:
            OSError: path already exists (errno EEXIST), or its directory does not exist (ENOENT).
            ValueError: path is in the directory that is read, the file does not fit on the disk, or
                scoring itself raises it.
        """
        path = Path(path)
        check_new(path, self.source)
        sizes = [
            math.prod(layer.shape) * dtype.itemsize
            for layer, dtype in zip(self.layers, self.dtypes, strict=True)
        ]
        tensors = [
            (layer.name, _DTYPES[dtype], layer.shape, size)
            for layer, dtype, size in zip(self.layers, self.dtypes, sizes, strict=True)
        ]
        metadata = {"lap_ext": lap_ext.__version__, **self.options}
        head = safetensors_header(tensors, metadata)
        _check_free(path, len(head) + sum(sizes))
        rows: list[LayerFigures] = []
        with replacing(path) as file:
            file.write(head)
            for layer, scores in self:
                rows.append(figures(layer, scores))
                file.write(bytes_of(scores.cpu().contiguous()))
        return ScoreTable(rows)


def check_new(path: Path, source: Path | None, argument: str = "path") -> None:
    """Raises an error unless path can become a new file outside a directory that is only read.

    Args:
        path: the path of the file.
        source: the directory, or None.
        argument: the name of the argument in which the path was given.
    """
    real = Path(os.path.realpath(path))  # links in a circle lead to a link
    if os.path.lexists(real):
        raise LapFileExistsError(
            "{argument} to be a new file",
            repr(str(path)),
            argument=argument,
            number=errno.EEXIST,
        )
    directory = real.parent
    if not directory.is_dir():
        raise LapFileNotFoundError(
            "{argument} in a directory that exists",
            repr(str(path)),
            argument=argument,
            number=errno.ENOENT,
        )
    if source is not None and source.resolve() in (directory, *directory.parents):
        raise LapValueError(
            f"{{argument}} outside of {str(source)!r}", repr(str(path)), argument=argument
        )


def _check_free(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.resolve().parent).free
    if free < size:
        raise LapValueError(
            f"{size:,} bytes on the disk of {str(path)!r}", f"{free:,} that are free"
        )
