# SPDX-License-Identifier: MIT
"""prune: a checkpoint folder to a pruned one, within a memory budget.

    check    folder, model, names, options, memory, disk: nothing has been written so far
    measure  each tensor once: row and column energies, a few MB; then all factors are known
    rank     where a ranking is over more than is in memory, passes over its scores
    write    each tensor once more, through its mask, into a folder beside OUT that takes OUT's name
             when everything is there

What is planned is in plan.py, the passes are in passes.py and shards.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import lap_ext
from lap_ext.allocation import Sparsity
from lap_ext.checkpoint import lamp, passes
from lap_ext.checkpoint.files import FUNCTION, MASKS, open_folder, wrong
from lap_ext.checkpoint.memory import parsed
from lap_ext.checkpoint.passes import PieceCut
from lap_ext.checkpoint.plan import Plan, check_options, check_out, plan_of
from lap_ext.checkpoint.result import CheckpointResult, result_of
from lap_ext.checkpoint.shards import Writer, check_disk
from lap_ext.checkpoint.state import Work, working
from lap_ext.checkpoint.structure import structure_of
from lap_ext.checkpoint.writing import MaskFile
from lap_ext.progress import Progress
from lap_ext.pruning.result import LayerResult
from lap_ext.report import Histogram


def prune(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sparsity: Sparsity,
    *,
    scope: str = "layer",
    criterion: Any = "lookahead",
    normalize: str = "none",
    exclude: Sequence[str] = (),
    bn: str = "paper",
    memory: int | str = "4GB",
    example_inputs: Any = None,
    model: nn.Module | None = None,
    unknown: str = "error",
    save_masks: bool = True,
    count_scores: bool = False,
    resume: bool = True,
    on_progress: Callable[[Progress], Any] | None = None,
) -> CheckpointResult:
    """Prunes a checkpoint that may be larger than memory; the result is that of `lap_ext.prune`.

    The folder is only read. What is written has the same files, tensors, order, metadata and dtypes;
    tensors that are no layer, and all other files, are copied byte for byte. An interrupted run
    leaves a folder .OUT.lap_ext beside out, and goes on there when it is called again.

    Args:
        folder: config.json with model.safetensors, or shards and model.safetensors.index.json.
        out: the folder to make; it must not exist, or be empty.
        sparsity: as in `lap_ext.prune`.
        scope: as in `lap_ext.prune`. "global" reads everything once more for each pass of its
            ranking: one for lookahead criteria, two or three for magnitudes.
        criterion: one that reads weights only: "lookahead", "lookforward", "lookback", "magnitude",
            "magnitude_bn" or "random".
        normalize: as in `lap_ext.prune`. "lamp" sorts all scores that may be kept, as many at a time
            as there is room for.
        exclude: as in `lap_ext.prune`.
        bn: as in `lap_ext.prune`.
        memory: what pruning may hold at a time, such as "4GB", "512MiB" or a number of bytes, beside
            the interpreter, the libraries and the traced model. What does not fit goes by in runs
            of rows, with the same result.
        example_inputs: for the trace: a tensor, a tuple or a dict of named ones. None: made from
            the config, for models of text and of images of one size.
        model: whose structure counts, not its weights: on the meta device or any other. None: the
            class of transformers that config.json names.
        unknown: as in `lap_ext.trace`.
        save_masks: write the masks, one bit a weight, to lap_ext_masks.safetensors in out.
        count_scores: count each layer's scores in bins on the way, kept and pruned ones, for a report:
            a histogram of the scores that `lap_ext.scores` gives, normalized by "norm", and not by
            "lamp". No file is read again for it.
        resume: go on where an interrupted run of the same task has stopped, and leave what is done
            if this one is interrupted. False: start anew, and leave nothing.
        on_progress: called with a `Progress` after each tensor or run of rows.

    Returns:
        The table of `lap_ext.prune`; its masks stay on disk.

    Raises:
        ValueError: a file is missing, damaged or does not fit the model, a weight is not finite, an
            option is not one of the above, or a row does not fit into memory. Nothing is left.
        TypeError: weights that are no floating-point numbers, an argument of the wrong type.
        TopologyError: the model cannot be traced.
        OSError: the disk is full, or another run writes out.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file, save_file
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     source, out = Path(place) / "dense", Path(place) / "pruned"
        ...     source.mkdir()
        ...     save_file(net.state_dict(), source / "model.safetensors")
        ...     result = prune(source, out, 0.5, model=net, example_inputs=torch.ones(1, 8))
        ...     pruned = load_file(out / "model.safetensors")
        >>> [(row.name, row.kept, row.total) for row in result.layers]
        [('0', 36, 72), ('2', 9, 18)]
        >>> int((pruned["0.weight"] != 0).sum())
        36
    """
    chosen = check_options(scope, criterion, normalize, bn)
    source, target = Path(folder), Path(out)
    check_out(source, target)
    budget = parsed(memory)
    files = open_folder(source)
    structure = structure_of(files, model, example_inputs, unknown)
    plan = plan_of(structure, files, chosen, sparsity, scope, normalize, exclude, bn, budget)
    plan.task.on_progress = on_progress
    asked = {
        "lap_ext": lap_ext.__version__, "files": files.stamps(), "save_masks": save_masks,
        "scope": scope, "normalize": normalize, "bn": bn, "unknown": unknown, "keep": plan.keep,
        "criterion": [chosen.name, getattr(chosen, "seed", 0)],
        "layers": [[x.name, x.shape, plan.keeps[x.name]] for x in plan.task.layers],
        "count_scores": count_scores,
        "roles": [[x.layer, x.part.shape] for x in structure.topology.roles],
    }  # fmt: skip
    with working(target.resolve(), asked, resume) as work:  # a link stays a link
        masks = None
        if save_masks:
            masks = MaskFile(work.files, {x.name: x.shape for x in plan.task.layers})
        _run(plan, masks, work, count_scores)
        scores = _scores(plan, work)
        if files.stamps() != asked["files"]:
            raise wrong("files that stay as they are while they are read", "changed ones")
        work.finish(target.resolve())
    unpruned = files.unpruned()
    if unpruned:
        warnings.warn(
            f"{FUNCTION}: {', '.join(unpruned)} may hold the weights too, and came along unpruned.",
            stacklevel=2,
        )
    return result_of(
        target, _rows(plan), chosen.name, target / MASKS if save_masks else None, scores
    )


def _run(plan: Plan, masks: MaskFile | None, work: Work, counted: bool) -> None:
    """All passes, from where an earlier run has stopped."""
    task, files = plan.task, plan.files
    kept = {shard.name for shard in files.shards if work.has(shard.name, shard.size)}
    if masks is not None and not masks.complete:
        kept = set()
    work.facts["done"] = sorted(kept)
    check_disk(files, work, masks)
    if masks is not None and not masks.complete:
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
    Writer(task, files, plan.keeps, plan.cuts, masks, counted).run(work)


def _normalize(plan: Plan, work: Work) -> None:
    """What makes scores of layers comparable, unless an earlier run has found it."""
    task, facts = plan.task, work.facts
    if "sizes" not in facts:
        if plan.normalize == "norm":
            facts["sizes"] = passes.score_sizes(task)
        else:
            assert plan.keep is not None
            shares = lamp.kept(task, task.layers, plan.keep)
            facts["keeps"] = {name: keep for name, (keep, _) in shares.items()}
            facts["sizes"] = {name: size for name, (_, size) in shares.items()}
        work.save()
    task.sizes = dict(facts["sizes"])
    plan.keeps |= facts.get("keeps", {})


def _measured_before(plan: Plan, work: Work) -> bool:
    """Whether an earlier run has taken all energies; then they are set."""
    found = work.tensors() if "steps" in work.facts else None
    if found is None:
        return False
    task = plan.task
    task.network.load_state(found)
    task.samples = {
        name.removeprefix("sample "): x for name, x in found.items() if name.startswith("sample ")
    }
    task.steps = dict(work.facts["steps"])
    return True


def _rank(plan: Plan, work: Work) -> None:
    """Finds the cuts that an earlier run has not found."""
    facts = work.facts.setdefault("cuts", [])
    for name, begin, *found in facts:
        plan.cuts[name, begin] = PieceCut(*found)
    for layers, keep, how in plan.rankings():
        if (layers[0].name, 0) not in plan.cuts:
            new = passes.cut_of(plan.task, layers, keep, how)
            plan.cuts.update(new)
            facts += [[*key, x.key, x.ties, x.kept, x.how] for key, x in new.items()]
            work.save()


def _scores(plan: Plan, work: Work) -> dict[str, Histogram]:
    """The counts of all shards, in the order of layers."""
    found: dict[str, Histogram] = {}
    for layer in plan.task.layers:
        for counts in work.facts.get("scores", {}).values():
            if layer.name in counts:
                found.setdefault(layer.name, Histogram()).update(
                    Histogram.of_json(counts[layer.name])
                )
    return found


def _rows(plan: Plan) -> list[LayerResult]:
    """The table: counts follow from the cuts, no mask is read."""
    rows = []
    for layer in plan.task.layers:
        pieces = plan.task.copies[layer.name][0]
        total = sum(piece.entry.numel for piece in pieces)
        found = [plan.cuts.get((layer.name, piece.begin)) for piece in pieces]
        kept = sum(x.kept for x in found if x is not None)
        if None in found:
            kept = min(plan.keeps[layer.name], total)
        rows.append(LayerResult(layer.name, layer.kind, layer.shape, kept, total))
    return rows
