# SPDX-License-Identifier: MIT
"""Turns a checkpoint directory into a pruned one, within a memory budget (`prune`).

    check    checks directory, model, names, options, memory and disk before anything is written
    measure  reads each tensor once for its squared row and column norms: a few MB give all norms
    rank     passes over the scores, for rankings that do not fit into memory
    write    reads each tensor once more and writes it, masked, into a directory next to OUT that is
             renamed to OUT at the end

The plan is made in plan.py; the passes are in passes.py and shards.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import lap_ext
from lap_ext.allocation import Sparsity
from lap_ext.checkpoint import identity, lamp, passes
from lap_ext.checkpoint.files import MASKS, open_directory
from lap_ext.checkpoint.finished import finished
from lap_ext.checkpoint.memory import parsed
from lap_ext.checkpoint.passes import SliceThreshold
from lap_ext.checkpoint.plan import Plan, check_options, check_out, plan_of
from lap_ext.checkpoint.result import CheckpointResult, result_of
from lap_ext.checkpoint.shards import Writer, check_disk
from lap_ext.checkpoint.state import Work, working
from lap_ext.checkpoint.structure import structure_of
from lap_ext.checkpoint.writing import MaskFile
from lap_ext.criteria import CriterionLike
from lap_ext.errors import calling, warn
from lap_ext.options import (
    BatchNorm,
    Inputs,
    MinKeep,
    Normalize,
    OnUnsupported,
    Patterns,
    Scope,
    normalize_for,
)
from lap_ext.progress import Progress
from lap_ext.pruning.result import LayerResult
from lap_ext.report import Histogram


@calling("checkpoint.prune")
def prune(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sparsity: Sparsity,
    *,
    scope: Scope = "layer",
    criterion: CriterionLike = "lookahead",
    normalize: Normalize = "auto",
    layers: Patterns | None = None,
    exclude: Patterns = (),
    min_keep: MinKeep = None,
    batch_norm: BatchNorm = "edge",
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
        scope: as in `lap_ext.prune`. "global" reads all weights once more for each pass of its
            ranking: one pass for lookahead criteria, two or three for magnitudes.
        criterion: a criterion that reads only weights: "lookahead", "lookforward", "lookback",
            "magnitude", "magnitude_bn" or "random".
        normalize: as in `lap_ext.prune`. "lamp" sorts the scores that are high enough to
            survive, with only as many in memory at a time as fit.
        layers: as in `lap_ext.prune`.
        exclude: as in `lap_ext.prune`.
        min_keep: as in `lap_ext.prune`.
        batch_norm: as in `lap_ext.prune`.
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
            bins, for a report. They are the scores that `lap_ext.scores` returns, or magnitudes
            where all of these are 0; normalize="norm" is applied to them, "lamp" is not. No file is
            read again for this.
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
    checked = check_options(scope, criterion, normalize, batch_norm)
    normalize = normalize_for(normalize, scope)
    source, target = Path(directory), Path(out)
    check_out(source, target)
    budget = parsed(memory)
    files = open_directory(source)
    structure = structure_of(files, model, example_inputs, on_unsupported)
    plan = plan_of(
        structure,
        files,
        checked,
        sparsity,
        scope=scope,
        normalize=normalize,
        layers=layers,
        exclude=exclude,
        batch_norm=batch_norm,
        memory=budget,
        min_keep=min_keep,
    )
    plan.task.on_progress = on_progress
    options: dict[str, Any] = {
        "lap_ext": lap_ext.__version__,
        "path": str(files.path.resolve()),
        "files": identity.files_of(files),
        "network": identity.network_of(structure),
        "save_masks": save_masks,
        "scope": scope,
        "normalize": normalize,
        "batch_norm": batch_norm,
        "on_unsupported": on_unsupported,
        "keep": plan.keep,
        "floors": plan.floors,
        "criterion": [checked.name, getattr(checked, "seed", 0)],
        "layers": [[x.name, x.shape, plan.keeps[x.name]] for x in plan.task.layers],
        "count_scores": count_scores,
    }
    with working(target.resolve(), options, resume) as work:  # a link stays a link
        if work.notice:
            warn(work.notice)
        masks = None
        if save_masks:
            masks = MaskFile(work.files, {x.name: x.shape for x in plan.task.layers})
        _run(plan, masks, work, count_scores)
        scores, rows = _scores(plan, work), _rows(plan, work)
        identity.check_same(files, options["files"])
        work.finish(target.resolve())
    unpruned = files.unpruned()
    if unpruned:
        warn(
            f"These files may hold the weights too and are copied unpruned: {', '.join(unpruned)}",
        )
    plan.task.warn_of_dead()
    result = result_of(plan, target, rows, save_masks, scores)
    if min_keep is None:
        result.warn_if_empty()
    return result


def _run(plan: Plan, masks: MaskFile | None, work: Work, counted: bool) -> None:
    """Runs all passes, from where an earlier run has stopped."""
    task, files = plan.task, plan.files
    done = finished(task, files, work, masks)
    work.facts["done"] = {name: x for name, x in work.facts["done"].items() if name in done}
    work.keep({*done, MASKS} if done else ())
    check_disk(files, work, masks)
    if masks is not None and not done:
        masks.create()
    if plan.measured and not _measured_before(plan, work):
        task.steps = plan.steps()
        passes.measure(task)
        samples = {f"sample {name}": x for name, x in task.samples.items()}
        work.save_tensors(task.network.state() | samples)
        work.facts["steps"] = task.steps
        work.save()
    if plan.normalize != "none":
        _normalize(plan, work)
    _rank(plan, work)
    Writer(task, files, plan.keeps, plan.thresholds, masks, counted).run(work)


def _normalize(plan: Plan, work: Work) -> None:
    """Finds what makes scores of layers comparable, unless an earlier run has found it."""
    task, facts = plan.task, work.facts
    if "sizes" not in facts and "keeps" not in facts:
        if plan.normalize == "norm":
            facts["sizes"] = passes.score_sizes(task)
        else:
            assert plan.keep is not None
            facts["keeps"] = lamp.kept(task, task.layers, plan.keep, plan.floors)
        work.save()
    task.sizes = dict(facts.get("sizes", {}))
    plan.keeps |= facts.get("keeps", {})


def _measured_before(plan: Plan, work: Work) -> bool:
    """Loads the squared norms of an earlier run; False if there are none."""
    if "steps" not in work.facts:
        return False
    tensors = work.tensors()
    if tensors is None:
        warn(
            f"What an interrupted run has left in {str(work.directory)!r} is damaged in part. "
            "These are done again: the squared norms."
        )
        return False
    task = plan.task
    task.network.load_state(tensors)
    task.samples = {
        name.removeprefix("sample "): x for name, x in tensors.items() if name.startswith("sample ")
    }
    task.steps = dict(work.facts["steps"])
    return True


def _rank(plan: Plan, work: Work) -> None:
    """Finds the thresholds that an earlier run has not found."""
    facts = work.facts.setdefault("thresholds", [])
    for name, begin, *fields in facts:
        plan.thresholds[name, begin] = SliceThreshold(*fields)
    for layers, keep, how in plan.rankings():
        if (layers[0].name, 0) not in plan.thresholds:
            new = passes.floored_thresholds(plan.task, layers, keep, plan.floors, how)
            plan.thresholds.update(new)
            facts += [[*key, x.key, x.ties, x.kept, x.how] for key, x in new.items()]
            work.save()


def _scores(plan: Plan, work: Work) -> dict[str, Histogram]:
    """Adds the counts of all shards, in the order of layers."""
    result: dict[str, Histogram] = {}
    for layer in plan.task.layers:
        for counts in work.facts.get("scores", {}).values():
            if layer.name in counts:
                result.setdefault(layer.name, Histogram()).update(
                    Histogram.of_json(counts[layer.name])
                )
    return result


def _rows(plan: Plan, work: Work) -> list[LayerResult]:
    """Makes the table from the counts of the masks that were written."""
    rows = []
    for layer in plan.task.layers:
        kept = sum(counts.get(layer.name, 0) for counts in work.facts.get("kept", {}).values())
        # a zero weight is never kept
        row = LayerResult(layer.name, layer.kind, layer.shape, kept, math.prod(layer.shape), kept)
        rows.append(row)
    return rows
