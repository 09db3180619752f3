# SPDX-License-Identifier: MIT
"""scores: every weight of a checkpoint directory, a layer at a time, within a memory budget.

In memory are one layer's scores, a chunk of its weights and the norms of all channels. The scores
are those of `lap_ext.scores`, bit for bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lap_ext.checkpoint import memory as budgets
from lap_ext.checkpoint import passes
from lap_ext.checkpoint.files import naming, open_folder, wrong
from lap_ext.checkpoint.plan import Plan, check_options, plan_of
from lap_ext.checkpoint.reading import Buffer
from lap_ext.checkpoint.stream import ScoreStream
from lap_ext.checkpoint.structure import structure_of
from lap_ext.ops.reference.common import score_dtype
from lap_ext.progress import Progress
from lap_ext.pruning import selection
from lap_ext.topology import Layer

_FUNCTION = "checkpoint.scores"
# scores that are in memory for a weight: its own, and what normalizing needs
_BESIDE = {"none": 1, "norm": 5, "lamp": 16}


def scores(
    folder: str | os.PathLike[str],
    *,
    criterion: Any = "lookahead",
    normalize: str = "none",
    exclude: Sequence[str] = (),
    bn: str = "paper",
    memory: int | str = "4GB",
    example_inputs: Any = None,
    model: nn.Module | None = None,
    unknown: str = "error",
    on_progress: Callable[[Progress], Any] | None = None,
) -> ScoreStream:
    """Scores a checkpoint that may be larger than memory; the scores are those of `lap_ext.scores`.

        score = |w| * ||W_prev[i]|| * ||W_next[:, o]||      criterion="lookahead"

    The directory is only read. Everything is checked now; weights are read when the result is
    iterated.

    Args:
        folder: as in `checkpoint.prune`.
        criterion: as in `checkpoint.prune`.
        normalize: as in `lap_ext.scores`.
        exclude: as in `checkpoint.prune`.
        bn: as in `checkpoint.prune`.
        memory: as in `checkpoint.prune`; all scores of a layer must fit.
        example_inputs: as in `checkpoint.prune`.
        model: as in `checkpoint.prune`.
        unknown: as in `checkpoint.prune`.
        on_progress: as in `checkpoint.prune`.

    Returns:
        A stream of (layer, scores), float32 (float64 for float64 weights, and where they are
        normalized); its `save` writes them to a file.

    Raises:
        ValueError, TypeError, TopologyError: as `checkpoint.prune`; what is wrong with the weights
            themselves when they are read.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> for layer, value in ((net[0], 3.), (net[2], -2.)):
        ...     _ = layer.weight.data.fill_(value)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_file(net.state_dict(), Path(place) / "model.safetensors")
        ...     stream = scores(place, model=net, example_inputs=torch.ones(1, 1))
        ...     {layer.name: found for layer, found in stream}  # |3| * 1 * |-2|, |-2| * |3| * 1
        {'0': tensor([[6.]]), '2': tensor([[6.]])}
    """
    with naming(_FUNCTION):
        chosen = check_options("layer", criterion, normalize, bn)
        budget = budgets.parsed(memory)
        files = open_folder(Path(folder))
        structure = structure_of(files, model, example_inputs, unknown)
        plan = plan_of(structure, files, chosen, 0.0, "layer", "none", exclude, bn, budget)
        task = plan.task
        task.limits = _limits(task, normalize, bn, budget)
    task.on_progress = on_progress
    dtypes = [_dtype(normalize, task.dtype(layer)) for layer in task.layers]
    options = {"criterion": chosen.name, "normalize": normalize, "bn": bn}
    return ScoreStream(
        task.layers, dtypes, partial(_computed, plan, normalize), options, files.path
    )


def _computed(plan: Plan, normalize: str) -> Iterator[Tensor]:
    """The scores of each layer, in one pass over the checkpoint."""
    task = plan.task
    with naming(_FUNCTION):
        if plan.measured:
            passes.measure(task)
        buffer = Buffer()
        task.begin("score", task.layers)
        for layer in task.layers:
            scorer = passes.scorer(task, layer, "plain")
            found = torch.empty(math.prod(layer.shape), dtype=score_dtype(task.dtype(layer)))
            for first, weight in task.runs(layer, task.copies[layer.name][0], buffer):
                found[first : first + weight.numel()] = scorer(weight, first)
            yield selection.normalized(found.view(layer.shape), normalize, None)


def _dtype(normalize: str, weight: torch.dtype) -> torch.dtype:
    """The dtype of scores, as lap_ext.scores has it."""
    return score_dtype(weight) if normalize == "none" else torch.float64


def _limits(task: passes.Task, normalize: str, bn: str, budget: int) -> budgets.Limits:
    """The limits of what the budget leaves beside the scores of the largest layer."""

    def needed(layer: Layer) -> int:
        width = score_dtype(task.dtype(layer)).itemsize
        return math.prod(layer.shape) * width * _BESIDE[normalize]

    largest = max(task.layers, key=needed, default=None)
    size = 0 if largest is None else needed(largest)
    topology, criterion = task.network.topology, task.criterion
    try:
        return budgets.limits(budget - size, topology, task.copies, criterion, bn)
    except ValueError:
        name = "" if largest is None else largest.name
        raise wrong(
            f"memory of more than {size:,} bytes (all scores of layer {name!r} are in memory at a "
            "time, and a part of its weights)",
            f"{budget:,}",
        ) from None
