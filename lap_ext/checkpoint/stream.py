# SPDX-License-Identifier: MIT
"""Scores that come one layer at a time, and the file that holds all of them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import lap_ext
from lap_ext._files import replacing, safetensors_header
from lap_ext.checkpoint.figures import LayerFigures, ScoreTable, figures
from lap_ext.checkpoint.reading import bytes_of
from lap_ext.topology import Layer, Topology

_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


class ScoreStream:
    """Scores of a model's layers, each computed when it is asked for.

    Iterating gives (layer, scores), with scores of the layer's shape. Each iteration, `table` and
    `save` is one pass over the weights.

    Args:
        layers: what is scored, in the order of the network.
        dtypes: of each layer's scores, float32 or float64.
        compute: begins a pass; gives the scores of each layer.
        options: how the weights are scored, by the names of the options.
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
        """Makes one of the scores that `lap_ext.scores` gives, which are all in memory.

        Example:
            >>> import lap_ext
            >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
            >>> topology = lap_ext.trace(net, torch.ones(1, 2))
            >>> found = ScoreStream.of_model(topology, lap_ext.scores(net, topology), {})
            >>> [(layer.name, scores.shape) for layer, scores in found]
            [('0', torch.Size([1, 2]))]
        """
        layers = [topology.layers[name] for name in scores]
        dtypes = [found.dtype for found in scores.values()]
        return cls(layers, dtypes, lambda: iter(scores.values()), options)

    def __iter__(self) -> Iterator[tuple[Layer, Tensor]]:
        return zip(self.layers, self._compute(), strict=True)

    def table(self) -> ScoreTable:
        """Takes the figures of all layers."""
        return ScoreTable([figures(layer, scores) for layer, scores in self])

    def save(self, path: str | os.PathLike[str]) -> ScoreTable:
        """Writes all scores to a safetensors file, a tensor for each layer.

        The file is complete or not there. Its metadata are the options and the version of lap_ext.

        Args:
            path: a file that is not there yet, outside of the directory that is read.

        Returns:
            The figures of what was written.

        Raises:
            FileExistsError: path is there already.
            ValueError: path is in the directory that is read, the disk has no room for the file, or
                what scoring itself raises.
        """
        path = Path(path)
        check_new("ScoreStream.save: expected path", path, self.source)
        sizes = [
            math.prod(layer.shape) * dtype.itemsize
            for layer, dtype in zip(self.layers, self.dtypes, strict=True)
        ]
        tensors = [
            (layer.name, _DTYPES[dtype], layer.shape, size)
            for layer, dtype, size in zip(self.layers, self.dtypes, sizes, strict=True)
        ]
        metadata = {"lap_ext": lap_ext.__version__, **self.options}
        head = safetensors_header("ScoreStream.save", tensors, metadata)
        _check_room(path, len(head) + sum(sizes))
        rows: list[LayerFigures] = []
        with replacing(path) as file:
            file.write(head)
            for layer, scores in self:
                rows.append(figures(layer, scores))
                file.write(bytes_of(scores.cpu().contiguous()))
        return ScoreTable(rows)


def check_new(expected: str, path: Path, source: Path | None) -> None:
    """Raises unless path can become a new file, outside of a directory that is only read.

    Args:
        expected: how errors begin, up to the name of the argument.
        path: of the file.
        source: the directory, or None.
    """
    if path.exists():
        raise FileExistsError(f"{expected} to be a new file, got {str(path)!r}.")
    directory = path.resolve().parent
    if not directory.is_dir():
        raise FileNotFoundError(2, "No such folder", str(path.parent))
    if source is not None and source.resolve() in (directory, *directory.parents):
        raise ValueError(f"{expected} outside of {str(source)!r}, got {str(path)!r}.")


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.resolve().parent).free
    if free < size:
        raise ValueError(
            f"ScoreStream.save: expected {size:,} bytes on the disk of {str(path)!r}, got {free:,} "
            "that are free."
        )
