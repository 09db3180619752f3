# SPDX-License-Identifier: MIT
"""Turns a checkpoint directory into a pruned one, within a memory budget (`prune`).

    check    checks directory, model, names, options, memory and disk before anything is written
    measure  reads each tensor once for its squared row and column norms: a few MB give all norms
    rank     passes over the scores, for rankings that do not fit into memory, and for rounds
    write    reads each tensor once more and writes it, masked, into a directory next to OUT that is
             renamed to OUT at the end

Scores and selection are those of lap_ext/pruning, over the place in weights.py; shards.py writes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import lap_ext
from lap_ext._text import layer_name
from lap_ext.allocation import Sparsity, check_given
from lap_ext.checkpoint import identity, inside
from lap_ext.checkpoint.files import MASKS, Checkpoint, open_directory
from lap_ext.checkpoint.finished import finished
from lap_ext.checkpoint.memory import parsed
from lap_ext.checkpoint.plan import check_out, plan_of
from lap_ext.checkpoint.result import CheckpointResult, result_of
from lap_ext.checkpoint.shards import Writer, check_disk
from lap_ext.checkpoint.state import Work, working
from lap_ext.checkpoint.structure import Structure, structure_of
from lap_ext.checkpoint.writing import MaskFile
from lap_ext.criteria import CriterionLike, UnitCriterion
from lap_ext.errors import LapTypeError, calling, warn
from lap_ext.options import (
    BatchNorm,
    Cost,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Order,
    Patterns,
    Scope,
)
from lap_ext.progress import Progress
from lap_ext.pruning import pipeline
from lap_ext.pruning.pipeline import Task
from lap_ext.pruning.plan import options_of
from lap_ext.pruning.result import LayerResult
from lap_ext.report import Histogram
from lap_ext.structures import Aggregate, StructureLike


@calling("checkpoint.prune")
def prune(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sparsity: Sparsity | None = None,
    *,
    structure: StructureLike | None = None,
    aggregate: Aggregate = "energy",
    multiple_of: int = 1,
    strict: bool = False,
    cost: Cost | None = None,
    uniform: bool = False,
    scope: Scope = "layer",
    criterion: CriterionLike = "lookahead",
    normalize: Normalize = "auto",
    order: Order = "parallel",
    rounds: int = 1,
    layers: Patterns | None = None,
    exclude: Patterns = (),
    min_keep: MinKeep = None,
    batch_norm: BatchNorm = "edge",
    data: str | os.PathLike[str] | None = None,
    memory: int | str = "4GB",
    example_inputs: Inputs | None = None,
    model: nn.Module | None = None,
    on_unsupported: OnUnsupported = "raise",
    save_masks: bool = True,
    count_scores: bool = False,
    resume: bool = True,
    on_progress: Callable[[Progress], Any] | None = None,
) -> CheckpointResult:
    """Prunes a checkpoint that may be larger than memory, with the result of `lap_ext.prune`.

    The directory is only read. The new directory has the same files, tensors, order, metadata and
    dtypes; tensors that are not layers, and all other files, are copied byte for byte. An
    interrupted run leaves a directory .OUT.lap_ext next to out, where OUT is the name of out; the
    same call resumes it.

    Args:
        directory: the checkpoint directory: config.json with model.safetensors, or with shards and
            model.safetensors.index.json.
        out: the directory to write; it must be empty or not exist yet.
        sparsity: as in `lap_ext.prune`.
        structure: as in `lap_ext.prune`, across layers too: then biases and norms are masked in the
            files. The worth of all units that are ranked together must fit into memory. The numbers
            of `Groups`, 8 bytes per weight of a layer, do not count in it.
        aggregate: as in `lap_ext.prune`; "exact" reads the neighbors of each layer, which must fit
            into memory with it.
        multiple_of: as in `lap_ext.prune`.
        strict: as in `lap_ext.prune`.
        cost: as in `lap_ext.prune`.
        uniform: as in `lap_ext.prune`.
        scope: as in `lap_ext.prune`. "global" reads all weights once more for each pass of its
            ranking: one or two for raw scores, two or three for normalized ones.
        criterion: as in `lap_ext.prune`, one of your own too. A function of a layer sees one full
            layer at a time, which must fit into memory; a class derived from `Criterion` sees rows.
        normalize: as in `lap_ext.prune`.
        order: as in `lap_ext.prune`. "forward" and "backward" read all weights twice more.
        rounds: as in `lap_ext.prune`. Each reads all weights two times or more.
        layers: as in `lap_ext.prune`.
        exclude: as in `lap_ext.prune`.
        min_keep: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
        data: for criteria that need activations or gradients, the path of a safetensors file of
            statistics that `lap_ext.criteria.measure` has computed. The rows of it that are read
            count as memory of the process, not in memory=.
        memory: how much memory pruning may use at a time: "4GB", "512MiB" or a number of bytes, not
            counting the interpreter, the libraries and the traced model. Layers that do not fit are
            pruned in chunks of rows, with the same result.
        example_inputs: inputs for the trace: a tensor, a tuple, or a dict of named inputs. With
            None, they are made from the config, for text, for images, and for both at once. A
            branch that they do not reach stays dense (`Topology.unreached`).
        model: the module that gives the structure; its weights are not used, so it may be on the
            meta device. With None, the transformers class that config.json names is used.
        on_unsupported: as in `lap_ext.trace`.
        save_masks: whether to write the masks, one bit per weight, to lap_ext_masks.safetensors in
            out.
        count_scores: whether to count the kept and the pruned scores of each layer in histogram
            bins, for a report. They are the scores that `lap_ext.scores` returns of the unpruned
            weights, or magnitudes where all of these are 0; normalize="norm" is applied to them,
            "lamp" is not, nor is any of them for units across layers. No file is read again for
            this in one parallel round; otherwise norms are measured, and functions of a layer
            called, once more. A criterion of units has no scores of weights: none are counted.
        resume: whether to resume an interrupted run with the same options, model and files, and to
            keep the finished part if this run is interrupted too. What an earlier run has left is
            read again and compared with checksums; what does not match is done anew, with a
            warning. False starts over, and leaves nothing behind if this run is interrupted.
        on_progress: called with a `Progress` after each tensor or chunk of rows.

    Returns:
        The counts of each layer, as `lap_ext.prune` returns them; the masks stay on disk.

    Raises:
        ValueError: a file is missing, damaged, a link that leaves the directory or does not fit the
            model, a weight is not finite, an option is not one of the above, a row does not fit
            into memory, or the files change meanwhile. No files are left behind.
        TypeError: weights are not floating-point numbers, or an argument is of the wrong type.
        TopologyError: the model cannot be traced.
        OSError: the disk is full, or another process is writing to out or has just written it.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file, save_file
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
        >>> with tempfile.TemporaryDirectory() as root:
        ...     source, out = Path(root) / "dense", Path(root) / "pruned"
        ...     source.mkdir()
        ...     save_file(net.state_dict(), source / "model.safetensors")
        ...     result = prune(source, out, 0.5, model=net, example_inputs=torch.ones(1, 8))
        ...     pruned = load_file(out / "model.safetensors")
        >>> [(row.name, row.kept, row.total) for row in result.layers]
        [('0', 36, 72), ('2', 9, 18)]
        >>> int((pruned["0.weight"] != 0).sum())
        36
    """
    options = options_of(
        criterion,
        scope=scope,
        normalize=normalize,
        order=order,
        rounds=rounds,
        layers=layers,
        exclude=exclude,
        min_keep=min_keep,
        batch_norm=batch_norm,
        structure=structure,
        aggregate=aggregate,
        multiple_of=multiple_of,
        strict=strict,
        cost=cost,
        uniform=uniform,
    )
    check_given(sparsity, options.structure)
    source, target = Path(directory), Path(out)
    check_out(source, target)
    budget = parsed(memory)
    files = open_directory(source)
    network = structure_of(files, model, example_inputs, on_unsupported)
    plan, place = plan_of(network, files, options, budget)
    statistics = _statistics(data)
    task = pipeline.begin(plan, place, sparsity, data, on_progress)
    if data is not None and statistics is None:  # a criterion of the user's own took it
        raise LapTypeError(
            "{argument} to be the path of a file", type(data).__name__, argument="data"
        )
    described = _described(task, network, files) | {
        "statistics": statistics,
        "save_masks": save_masks,
        "on_unsupported": on_unsupported,
        "count_scores": count_scores,
    }
    with working(target.resolve(), described, resume) as work:  # a link stays a link
        if work.notice:
            warn(work.notice)
        shapes = {x.name: x.shape for x in task.layers}
        every = shapes | _vectors(task)
        masks = MaskFile(work.files, every, structure=options.structure) if save_masks else None
        place.use(work, shapes)
        try:
            by_weight = not isinstance(options.criterion, UnitCriterion)
            shown = pipeline.before_rounds(task, data) if count_scores and by_weight else None
            _run(Writer(task, place, files, masks, shown), work)
        finally:
            place.close()
        scores, rows = _scores(task, work), _rows(task, work)
        identity.check_same(files, described["files"])
        if statistics != _statistics(data):
            raise inside.changed(os.fspath(data or ""))
        work.finish(target.resolve())
    _warn_of_unpruned(files)
    task.scoring.warn_of_dead()
    result = result_of(task, target, rows, save_masks, scores)
    if min_keep is None:
        result.warn_if_empty()
    return result


def _warn_of_unpruned(files: Checkpoint) -> None:
    """Warns of files that may hold the weights in another form."""
    unpruned = files.unpruned()
    if unpruned:
        warn(
            f"These files may hold the weights too and are copied unpruned: {', '.join(unpruned)}",
        )


def _statistics(data: object) -> list[Any] | None:
    """Describes the file of statistics, if there is one; its criterion says what is wrong."""
    if not isinstance(data, (str, os.PathLike)) or not Path(os.fspath(data)).is_file():
        return None
    return identity.file_of(Path(os.fspath(data)))


def _described(task: Task, network: Structure, files: Checkpoint) -> dict[str, Any]:
    """Describes what decides the result: only a run that is described alike is resumed."""
    options, budget, floors = task.scoring.plan.options, task.budget, task.budget.floors
    if options.structure is not None and task.units is None:
        floors = {layer.name: pipeline.least(task, layer) for layer in task.layers}
    units = None if task.units is None else identity.units_of(task.units, options)
    return {
        "lap_ext": lap_ext.__version__,
        "path": str(files.path.resolve()),
        "files": identity.files_of(files),
        "network": identity.network_of(network),
        "scope": options.scope,
        "normalize": options.normalize,
        "order": options.order,
        "rounds": options.rounds,
        "batch_norm": options.batch_norm,
        "keep": budget.total if options.scope == "global" else None,
        "floors": floors,
        "structure": identity.structure_of(options.structure, task.layers),
        "aggregate": options.aggregate,
        "multiple_of": options.multiple_of,
        "units across layers": units,
        "criterion": identity.criterion_of(options.criterion),
        "layers": [[x.name, x.shape, budget.keeps[x.name]] for x in task.layers],
    }


def _vectors(task: Task) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the biases, norms and the like that are masked, by layer name."""
    shapes = {} if task.units is None else task.units.groups.vector_shapes()
    return {layer_name(name): shape for name, shape in shapes.items()}


def _run(writer: Writer, work: Work) -> None:
    """Selects and writes, from where an earlier run has stopped."""
    done, masks = finished(writer, work), writer.masks
    work.facts["done"] = {name: x for name, x in work.facts["done"].items() if name in done}
    work.keep({*done, MASKS} if done else ())
    check_disk(writer, work)
    if masks is not None and not done:
        masks.create()
    units = writer.task.scoring.units
    units.update(work.facts.get("units", {}))  # those of layers that are written already
    work.facts["units"] = units
    selections, dead = pipeline.select(writer.task), writer.task.scoring.dead
    dead.update(work.facts.get("dead", {}))  # those of rounds that an earlier run has ended
    work.facts["dead"] = dead
    writer.run(selections, work)


def _scores(task: Task, work: Work) -> dict[str, Histogram]:
    """Adds the counts of all shards, in the order of layers."""
    result: dict[str, Histogram] = {}
    for layer in task.layers:
        for counts in work.facts.get("scores", {}).values():
            if layer.name in counts:
                result.setdefault(layer.name, Histogram()).update(
                    Histogram.of_json(counts[layer.name])
                )
    return result


def _rows(task: Task, work: Work) -> list[LayerResult]:
    """Makes the table from the counts of the masks that were written."""
    rows, units = [], work.facts.get("units", {})
    for layer in task.layers:
        kept = sum(counts.get(layer.name, 0) for counts in work.facts.get("kept", {}).values())
        # a zero weight is never kept, but where zeros are weights
        zero = task.units is not None and layer.name in task.units.zero
        counts = kept, math.prod(layer.shape), 0 if zero else kept
        own = units.get(layer.name)
        row = LayerResult(
            layer.name, layer.kind, layer.shape, *counts, units=own and (own[0], own[1])
        )
        rows.append(row)
    return rows
