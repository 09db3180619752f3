# SPDX-License-Identifier: MIT
"""Runs the subcommands: each calls the library and shows the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lap_ext
from lap_ext import checkpoint, demo, report
from lap_ext._files import new_directory
from lap_ext._text import visible
from lap_ext.allocation import Sparsity, notation
from lap_ext.checkpoint import record, stream
from lap_ext.checkpoint.files import MASKS
from lap_ext.checkpoint.inspecting import inspect_model
from lap_ext.checkpoint.reporting import checkpoint_facts, model_facts
from lap_ext.checkpoint.usage import loading
from lap_ext.cli import bench, models, outputs
from lap_ext.cli.output import Progress, result, writing
from lap_ext.errors import LapFileExistsError
from lap_ext.report import Facts, plots

_SINGLE = "model.safetensors"


def prune(options: Any) -> int:
    """Prunes a checkpoint directory, or a module, and writes it to a new directory."""
    sparsity = notation.of_texts(options.sparsity)  # mistakes cost nothing yet
    _check_new(options.out)
    outputs.check(options)
    start = time.monotonic()
    with Progress(not options.quiet) as progress:
        run = _prune_directory if models.is_directory(options) else _prune_module
        pruned, facts = run(options, sparsity, progress)
        if facts is not None:
            facts.command, facts.seconds = options.command, time.monotonic() - start
            progress.step("draw")
            _draw(options, facts)
    shown = json.loads(pruned.to_json())
    shown |= {"model": options.model, "out": str(options.out), "asked": _chosen(options)}
    shown["seconds"] = round(time.monotonic() - start, 3)
    if facts is not None:
        shown["measured"] = facts.to_dict()
    plots_written = [options.plot, outputs.second(options.plot)] if options.plot else []
    files = [path for path in (options.out, options.report, *plots_written) if path]
    result(options, shown, f"{pruned}\n{_written(files)}")
    return 0


def _written(files: Sequence[Path]) -> str:
    """Lists files for the last line of a result."""
    return f"written: {', '.join(visible(str(path)) for path in files)}"


def _draw(options: Any, facts: Facts) -> None:
    """Writes the report and the plots, where there are options for them."""
    done = f"; {str(options.out)!r} is complete"
    if options.report:
        with writing(options.report, done):
            report.write(options.report, facts)
    if options.plot:
        title = f"{facts.title}, {facts.criterion}"
        with writing(options.plot, done):
            plots.save(options.plot, plots.layers(facts.layers, title))
            plots.save(outputs.second(options.plot), plots.distributions(facts))


def _prune_directory(
    options: Any, sparsity: Sparsity, progress: Progress
) -> tuple[checkpoint.CheckpointResult, Facts | None]:
    """Streams a checkpoint directory."""
    reported = bool(options.report or options.plot)
    progress.step("prune")
    pruned = checkpoint.prune(
        options.model,
        options.out,
        sparsity,
        scope=options.scope,
        count_scores=reported,
        **_streaming_options(options, progress),
    )
    with writing(options.out):
        record.write(options.out, _chosen(options), pruned)
    if not reported:
        return pruned, None
    facts = checkpoint_facts(
        options.model,
        pruned,
        options=_chosen_texts(options),
        on_unsupported=options.on_unsupported,
        on_progress=progress.follow,
    )
    return pruned, facts


def _streaming_options(options: Any, progress: Progress) -> dict[str, Any]:
    """Gathers the options of scoring that checkpoint.prune and checkpoint.scores take."""
    given = models.scoring_options(options)
    given |= {"on_unsupported": options.on_unsupported, "on_progress": progress.follow}
    return given if options.memory is None else given | {"memory": options.memory}


def _prune_module(
    options: Any, sparsity: Sparsity, progress: Progress
) -> tuple[lap_ext.PruneResult, Facts | None]:
    """Prunes in memory and writes the model and the masks."""
    made, topology = models.traced(options, progress)
    progress.step("prune")
    given = models.scoring_options(options)
    given |= {"topology": topology, "on_progress": progress.follow}
    scope = options.scope
    pruned = lap_ext.prune(made.module, None, sparsity, scope=scope, apply=False, **given)
    facts = None
    if options.report or options.plot:
        progress.step("score")
        scores = lap_ext.scores(made.module, **given)
        facts = model_facts(
            topology,
            pruned,
            scores,
            title=options.model,
            options=_chosen_texts(options),
            on_progress=progress.follow,
        )
        facts.load = loading(options.out)
    pruned.apply(made.module)
    progress.step("write")
    _write(options, made, pruned)
    return pruned, facts


def _write(options: Any, made: models.Made, pruned: lap_ext.PruneResult) -> None:
    """Writes the pruned weights, their masks, and the options."""
    from safetensors.torch import save_model

    with writing(options.out), new_directory(options.out) as directory:
        save_model(made.module, str(directory / _SINGLE), metadata={"format": "pt"})
        pruned.masks.save(directory / MASKS)
        record.write(directory, _chosen(options), pruned)


def _check_new(out: Path) -> None:
    """Raises unless a directory is new, or empty and not the one that lap-ext runs in."""
    if out.exists() and (not out.is_dir() or any(out.iterdir()) or out.samefile(Path.cwd())):
        raise LapFileExistsError("{argument} to be a new directory", repr(str(out)), argument="out")


def _chosen(options: Any) -> dict[str, Any]:
    """Gathers the options that decide the result."""
    names = ("sparsity", "criterion", "scope", "normalize", "batch_norm", "layers", "exclude")
    return {name: getattr(options, name) for name in names}


def _chosen_texts(options: Any) -> dict[str, str]:
    """Gathers the same options as texts, for a report."""
    texts = {k: ", ".join(v) if isinstance(v, list) else v for k, v in _chosen(options).items()}
    return {name: text for name, text in texts.items() if text}


def score(options: Any) -> int:
    """Shows a table of every layer's scores, and writes all scores to a file with --out."""
    directory = Path(options.model) if models.is_directory(options) else None
    outputs.check(options)
    if options.out:
        stream.check_new(options.out, directory, "out")
    with Progress(not options.quiet) as progress:
        if directory is not None:
            progress.step("trace")
            scores = checkpoint.scores(directory, **_streaming_options(options, progress))
            progress.step("score")
        else:
            scores = _score_module(options, progress)
        if options.out:
            with writing(options.out):
                table = scores.save(options.out)
        else:
            table = scores.table()
    shown = {"model": options.model, "criterion": options.criterion}
    shown |= {"normalize": options.normalize, "batch_norm": options.batch_norm}
    shown |= {"out": options.out and str(options.out)} | table.to_dict()
    written = f"\n{_written([options.out])}" if options.out else ""
    result(options, shown, f"{table}{written}")
    return 0


def _score_module(options: Any, progress: Progress) -> checkpoint.ScoreStream:
    """Scores a module; all scores are in memory, as the module is."""
    made, topology = models.traced(options, progress)
    progress.step("score")
    given = models.scoring_options(options)
    scores = lap_ext.scores(made.module, topology=topology, on_progress=progress.follow, **given)
    described = {name: given[name] for name in ("criterion", "normalize", "batch_norm")}
    return checkpoint.ScoreStream.of_model(topology, scores, described)


def inspect(options: Any) -> int:
    """Shows layers, their neighbors, sizes and zeros."""
    with Progress(not options.quiet) as progress:
        if models.is_directory(options):
            progress.step("trace")
            inspection = checkpoint.inspect(
                options.model, on_unsupported=options.on_unsupported, on_progress=progress.follow
            )
        else:
            _, topology = models.traced(options, progress)
            inspection = inspect_model(topology, progress.follow)
    if options.dot:
        dot = inspection.topology.to_dot()
        result(options, {"dot": dot}, dot)
    else:
        result(options, {"model": options.model} | inspection.to_dict(), str(inspection))
    return 0


def verify(options: Any) -> int:
    """Compares a pruned checkpoint with its original; returns 1 if it has findings."""
    with Progress(not options.quiet) as progress:
        progress.step("verify")
        verdict = checkpoint.verify(
            options.pruned,
            options.original,
            sparsity=notation.of_texts(options.sparsity) if options.sparsity else None,
            scope=options.scope,
            on_progress=progress.follow,
        )
    result(options, verdict.to_dict(), str(verdict))
    return 0 if verdict.ok else 1


def info(options: Any) -> int:
    """Shows versions and which kernels are loaded."""
    build = lap_ext.info()
    result(options, asdict(build), str(build))
    return 0


def demo_(options: Any) -> int:
    """Runs the demo; with --json prints its figures and draws no plot."""
    if not options.json:
        given = ["--seeds", str(options.seeds), "--steps", str(options.steps)]
        return 2 if (status := demo.main([*given, "--out", str(options.out)])) == 1 else status
    with Progress(not options.quiet) as progress:
        progress.step("demo", demo.total_steps(options.seeds, options.steps))
        results = demo.run(
            demo.load_digits(), options.seeds, options.steps, lambda text: progress.advance()
        )
    result(options, asdict(results), "")
    return 0


COMMANDS: Mapping[str, Callable[[Any], int]] = {
    "prune": prune,
    "score": score,
    "inspect": inspect,
    "verify": verify,
    "bench": bench.bench,
    "demo": demo_,
    "info": info,
}
