# SPDX-License-Identifier: MIT
"""Scores a checkpoint directory one layer at a time, within a memory budget (`scores`).

Memory holds one layer's scores, a chunk of its weights and the norms of all channels. The scores
are those of `lap_ext.scores`, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lap_ext.checkpoint.files import open_directory
from lap_ext.checkpoint.memory import parsed
from lap_ext.checkpoint.plan import plan_of
from lap_ext.checkpoint.stream import ScoreStream
from lap_ext.checkpoint.structure import structure_of
from lap_ext.criteria import CriterionLike
from lap_ext.errors import calling
from lap_ext.ops.reference.common import score_dtype
from lap_ext.options import (
    BatchNorm,
    Inputs,
    Normalize,
    OnUnsupported,
    Patterns,
)
from lap_ext.progress import Progress
from lap_ext.pruning import pipeline
from lap_ext.pruning.plan import options_of
from lap_ext.pruning.scoring import Scoring


@calling("checkpoint.scores")
def scores(
    directory: str | os.PathLike[str],
    *,
    criterion: CriterionLike = "lookahead",
    normalize: Normalize = "auto",
    layers: Patterns | None = None,
    exclude: Patterns = (),
    batch_norm: BatchNorm = "edge",
    data: str | os.PathLike[str] | None = None,
    memory: int | str = "4GB",
    example_inputs: Inputs | None = None,
    model: nn.Module | None = None,
    on_unsupported: OnUnsupported = "raise",
    on_progress: Callable[[Progress], Any] | None = None,
) -> ScoreStream:
    """Scores a checkpoint that may be larger than memory, with the result of `lap_ext.scores`.

        score = |w| * ||W_prev[i]|| * ||W_next[:, o]||      criterion="lookahead"

    The directory is only read. This call checks everything except the values of weights; weights
    are read only while the result is iterated over.

    Args:
        directory: as in `checkpoint.prune`.
        criterion: as in `checkpoint.prune`.
        normalize: as in `lap_ext.scores`.
        layers: as in `checkpoint.prune`.
        exclude: as in `checkpoint.prune`.
        batch_norm: as in `checkpoint.prune`.
        data: as in `checkpoint.prune`.
        memory: as in `checkpoint.prune`; the scores of two layers must fit into it: those that the
            caller still holds, and the next ones.
        example_inputs: as in `checkpoint.prune`.
        model: as in `checkpoint.prune`.
        on_unsupported: as in `checkpoint.prune`.
        on_progress: as in `checkpoint.prune`.

    Returns:
        A stream of (layer, scores). Scores are float32, or float64 if the weights are float64 or
        the scores are normalized; the stream's `save` writes them to a file.

    Raises:
        ValueError, TypeError, TopologyError: as in `checkpoint.prune`; errors about the values of
            weights are raised when the weights are read.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> for layer, value in ((net[0], 3.), (net[2], -2.)):
        ...     _ = layer.weight.data.fill_(value)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_file(net.state_dict(), Path(directory) / "model.safetensors")
        ...     stream = scores(directory, model=net, example_inputs=torch.ones(1, 1))
        ...     {layer.name: values for layer, values in stream}  # |3| * 1 * |-2|, |-2| * |3| * 1
        {'0': tensor([[6.]]), '2': tensor([[6.]])}
    """
    options = options_of(
        criterion,
        normalize=normalize,
        batch_norm=batch_norm,
        layers=layers,
        exclude=exclude,
    )
    budget = parsed(memory)
    files = open_directory(Path(directory))
    structure = structure_of(files, model, example_inputs, on_unsupported)
    plan, place = plan_of(structure, files, options, budget, options.normalize)
    scoring = pipeline.scoring_of(plan, place, data, on_progress, raw=True)
    dtypes = [_dtype(options.normalize, place.dtype(layer)) for layer in plan.layers]
    described = {
        "criterion": options.criterion.name,
        "normalize": options.normalize,
        "batch_norm": batch_norm,
    }
    return ScoreStream(plan.layers, dtypes, partial(_computed, scoring), described, files.path)


def _computed(scoring: Scoring) -> Iterator[Tensor]:
    """Computes the scores of each layer, in one pass over the checkpoint."""
    layers = scoring.plan.layers
    with calling("checkpoint.scores"):
        scoring.forget(scoring.plan.topology.layers.values())
        scoring.measure("scores")
        step = scoring.step("score", layers)
        for layer in layers:
            yield scoring.full(layer, step)


def _dtype(normalize: Normalize, weight: torch.dtype) -> torch.dtype:
    """Returns the dtype of scores, as that of lap_ext.scores."""
    return score_dtype(weight) if normalize == "none" else torch.float64
