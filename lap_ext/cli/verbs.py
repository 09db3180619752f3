# SPDX-License-Identifier: MIT
"""What each verb does: it asks the library, and shows the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lap_ext
from lap_ext import checkpoint, demo, report
from lap_ext._files import new_directory
from lap_ext.allocation import notation
from lap_ext.checkpoint import record, stream
from lap_ext.checkpoint.files import MASKS
from lap_ext.checkpoint.inspecting import inspect_model
from lap_ext.checkpoint.reporting import checkpoint_facts, model_facts
from lap_ext.cli import bench, models
from lap_ext.cli.output import Progress, result, writing
from lap_ext.report import Facts, plots

_SINGLE, _PROGRAM = "model.safetensors", "model.pt2"


def prune(options: Any) -> int:
    """Prunes a folder or a factory's module into a new folder."""
    removed = _sparsity(options)  # a mistake here costs nothing yet
    _can_write(options)
    start = time.monotonic()
    with Progress(not options.quiet) as progress:
        run = _prune_folder if models.is_folder(options) else _prune_module
        found, facts = run(options, removed, progress)
        if facts is not None:
            progress.step("draw")
            _draw(options, facts)
    told = json.loads(found.to_json())
    told |= {"model": options.model, "out": str(options.out), "asked": _asked(options)}
    told["seconds"] = round(time.monotonic() - start, 3)
    if facts is not None:
        told["measured"] = facts.to_dict()
    pictures = [options.plot, _second(options.plot)] if options.plot else []
    files = [str(path) for path in (options.out, options.report, *pictures) if path]
    result(options, told, f"{found}\nwritten: {', '.join(files)}")
    return 0


def _draw(options: Any, facts: Facts) -> None:
    """The page and the pictures that are asked for."""
    done = f"; {str(options.out)!r} is complete"
    if options.report:
        with writing(options.report, done):
            report.write(options.report, facts)
    if options.plot:
        title = f"{facts.title}, {facts.criterion}"
        with writing(options.plot, done):
            plots.save(options.plot, plots.layers(facts.layers, title))
            plots.save(_second(options.plot), plots.distributions(facts))


def _second(plot: Path) -> Path:
    """The picture of the distributions, beside that of the layers."""
    return plot.with_stem(f"{plot.stem}-distributions")


def _prune_folder(
    options: Any, removed: Any, progress: Progress
) -> tuple[checkpoint.CheckpointResult, Facts | None]:
    """Streams a checkpoint."""
    shown = bool(options.report or options.plot)
    progress.step("prune")
    found = checkpoint.prune(
        options.model,
        options.out,
        removed,
        scope=options.scope,
        count_scores=shown,
        **_streaming(options, progress),
    )
    with writing(options.out):
        record.write(options.out, _asked(options), found)
    if not shown:
        return found, None
    facts = checkpoint_facts(
        options.model,
        found,
        asked=_shown(options),
        unknown=options.unknown,
        on_progress=progress.follow,
    )
    return found, facts


def _streaming(options: Any, progress: Progress) -> dict[str, Any]:
    """The options of scoring a folder, as checkpoint.prune and checkpoint.scores take them."""
    given = models.ways(options) | {"unknown": options.unknown, "on_progress": progress.follow}
    return given if options.memory is None else given | {"memory": options.memory}


def _prune_module(
    options: Any, removed: Any, progress: Progress
) -> tuple[lap_ext.PruneResult, Facts | None]:
    """Prunes in memory and writes the model and the masks."""
    made, topology = models.traced(options, progress)
    progress.step("prune")
    ways: dict[str, Any] = models.ways(options) | {"on_progress": progress.follow}
    found = lap_ext.prune(made.module, topology, removed, scope=options.scope, apply=False, **ways)
    facts = None
    if options.report or options.plot:
        progress.step("score")
        scores = lap_ext.scores(made.module, topology, **ways)
        told = {"title": options.model, "asked": _shown(options), "on_progress": progress.follow}
        facts = model_facts(topology, found, scores, **told)
    found.masks.apply(made.module)
    progress.step("write")
    _write(options, made, found)
    return found, facts


def _write(options: Any, made: models.Made, found: lap_ext.PruneResult) -> None:
    """The pruned model, of its own kind, the masks, and what was asked."""
    from safetensors.torch import save_model

    with writing(options.out), new_directory(options.out) as part:
        if made.program is None:
            save_model(made.module, str(part / _SINGLE), metadata={"format": "pt"})
        else:  # its weights are those of the module
            torch.export.save(made.program, part / _PROGRAM)
        found.masks.save(part / MASKS)
        record.write(part, _asked(options), found)


def _can_write(options: Any) -> None:
    """What can be known before the work: places, and packages that draw."""
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"expected --out to be a new folder, got {str(out)!r}.")
    for path in (options.report, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise FileNotFoundError(2, "No such folder", str(path.parent))
        if path is not None and path.is_dir():
            raise IsADirectoryError(21, "Is a folder", str(path))
    if options.plot:
        plots.check(options.plot)


def _asked(options: Any) -> dict[str, Any]:
    """The options that decide the result."""
    names = ("sparsity", "criterion", "scope", "normalize", "bn", "exclude")
    return {name: getattr(options, name) for name in names}


def _shown(options: Any) -> dict[str, str]:
    """The same as texts, for a report."""
    texts = {k: ", ".join(v) if isinstance(v, list) else v for k, v in _asked(options).items()}
    return {name: text for name, text in texts.items() if text}


def _sparsity(options: Any) -> Any:
    """What --sparsity stands for, as the library takes it."""
    return notation.of_texts(options.sparsity, "--sparsity")


def score(options: Any) -> int:
    """Shows a table of every layer's scores, and writes a file of all of them."""
    folder = Path(options.model) if models.is_folder(options) else None
    if options.out:
        stream.check_new("expected --out", options.out, folder)
    with Progress(not options.quiet) as progress:
        if folder is not None:
            progress.step("trace")
            found = checkpoint.scores(folder, **_streaming(options, progress))
            progress.step("score")
        else:
            found = _score_module(options, progress)
        if options.out:
            with writing(options.out):
                table = found.save(options.out)
        else:
            table = found.table()
    told = {"model": options.model, "criterion": options.criterion, "normalize": options.normalize}
    told |= {"bn": options.bn, "out": options.out and str(options.out)} | table.to_dict()
    written = f"\nwritten: {options.out}" if options.out else ""
    result(options, told, f"{table}{written}")
    return 0


def _score_module(options: Any, progress: Progress) -> checkpoint.ScoreStream:
    """Scores of a module, all in memory as the module is."""
    made, topology = models.traced(options, progress)
    progress.step("score")
    ways = models.ways(options)
    found = lap_ext.scores(made.module, topology, on_progress=progress.follow, **ways)
    named = {name: ways[name] for name in ("criterion", "normalize", "bn")}
    return checkpoint.ScoreStream.of_model(topology, found, named)


def inspect(options: Any) -> int:
    """Shows layers, who feeds whom, sizes and zeros."""
    with Progress(not options.quiet) as progress:
        if models.is_folder(options):
            progress.step("trace")
            found = checkpoint.inspect(
                options.model, unknown=options.unknown, on_progress=progress.follow
            )
        else:
            _, topology = models.traced(options, progress)
            found = inspect_model(topology, progress.follow)
    if options.dot:
        dot = found.topology.to_dot()
        result(options, {"dot": dot}, dot)
    else:
        result(options, {"model": options.model} | found.to_dict(), str(found))
    return 0


def verify(options: Any) -> int:
    """Compares a pruned checkpoint with its original; 1 if anything is not as it should be."""
    with Progress(not options.quiet) as progress:
        progress.step("verify")
        verdict = checkpoint.verify(
            options.pruned,
            options.original,
            sparsity=_sparsity(options) if options.sparsity else None,
            scope=options.scope,
            on_progress=progress.follow,
        )
    result(options, verdict.to_dict(), str(verdict))
    return 0 if verdict.ok else 1


def info(options: Any) -> int:
    """Shows versions and what is loaded."""
    found = lap_ext.info()
    result(options, asdict(found), str(found))
    return 0


def demo_(options: Any) -> int:
    """Runs the demo; with --json its figures, without a plot."""
    if not options.json:
        given = ["--seeds", str(options.seeds), "--steps", str(options.steps)]
        return 2 if (status := demo.main([*given, "--out", str(options.out)])) == 1 else status
    with Progress(not options.quiet) as progress:
        progress.step("demo", demo.total_steps(options.seeds, options.steps))
        found = demo.run(
            demo.load_digits(), options.seeds, options.steps, lambda text: progress.advance()
        )
    result(options, asdict(found), "")
    return 0


VERBS: Mapping[str, Callable[[Any], int]] = {
    "prune": prune,
    "score": score,
    "inspect": inspect,
    "verify": verify,
    "bench": bench.bench,
    "demo": demo_,
    "info": info,
}
