# SPDX-License-Identifier: MIT
"""Runs the subcommands: each calls the library and shows the result.

A subcommand checks its arguments first, and then imports what it needs and nothing else: torch
alone takes seconds.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lap_ext
from lap_ext import allocation, structures
from lap_ext._files import new_directory, set_aside
from lap_ext._text import visible
from lap_ext.allocation import Sparsity, notation
from lap_ext.checkpoint import record
from lap_ext.cli import models, parser
from lap_ext.cli.output import Progress, result, terminal_width, writing
from lap_ext.errors import LapFileExistsError, LapValueError
from lap_ext.structures import Coupled, Structure

if TYPE_CHECKING:
    from lap_ext import checkpoint
    from lap_ext.checkpoint.stored import StoredPruning
    from lap_ext.report import Facts

_SINGLE = "model.safetensors"
_OF_STRUCTURES = ("aggregate", "multiple_of")  # options that decide the result of a structure
_ACROSS = ("cost", "uniform")  # of one across layers


def prune(options: Any) -> int:
    """Prunes a checkpoint directory, or a module, and writes it to a new directory."""
    start = time.monotonic()
    structure = options.structure  # mistakes cost nothing yet
    structure = None if structure is None else structures.of(structure)
    sparsity = _sparsity(options, structure)
    allocation.check_given(sparsity, structure)
    is_directory = models.is_directory(options)
    models.check_statistics(options)
    replaces = _replaces(options)
    from lap_ext.cli import outputs

    outputs.check(options)
    with Progress(not options.quiet) as progress:
        run = _prune_directory if is_directory else _prune_module
        with set_aside(options.out) if replaces else nullcontext():
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
    brief = f"{pruned.kept:,} of {pruned.total:,} weights kept, sparsity {pruned.sparsity:.2%}; "
    result(options, shown, f"{pruned}\n{_written(files)}", brief + _written(files))
    return 0


def _sparsity(options: Any, structure: Structure | None) -> Sparsity | None:
    """Reads and checks what is to be removed: --sparsity, --params or --flops."""
    given = [name for name in ("sparsity", *parser.TARGETS) if getattr(options, name) is not None]
    if len(given) > 1:
        raise LapValueError(
            "{argument} alone (it says what remains)", "another one too", argument=given[1]
        )
    if not given or given == ["sparsity"]:
        return _fraction(options) if given else None
    (name,) = given
    if not isinstance(structure, Coupled):
        raise LapValueError(
            "{structure='channel'}, head, expert or unit with {argument}",
            "none" if structure is None else structure.spelled,
            argument=name,
        )
    target = getattr(options, name)
    return allocation.params(target) if name == "params" else allocation.flops(target)


def _fraction(options: Any) -> Sparsity:
    """Reads and checks the texts of --sparsity."""
    sparsity = notation.of_texts(options.sparsity)
    allocation.of(sparsity)  # raises where it is no fraction
    return sparsity


def _written(files: Sequence[Path]) -> str:
    """Lists files for the last line of a result."""
    return f"written: {', '.join(visible(str(path)) for path in files)}"


def report(options: Any) -> int:
    """Makes the page of an earlier result, from its directory and the weights of the original."""
    real = options.result.resolve()
    name = f"{real.stem if real.is_file() else real.name}.html"
    page = options.out or (options.result if options.result.name else real).with_name(name)
    from lap_ext.checkpoint.stored import stored_pruning
    from lap_ext.cli import outputs
    from lap_ext.report import write

    earlier = stored_pruning(options.result)
    if options.model is None:
        options.model = _recorded_model(earlier)
    outputs.check_page(options, page)
    with Progress(not options.quiet) as progress:
        facts = _stored_facts(options, earlier, progress)
        with writing(page):
            write(page, facts)
    shown = {"model": options.model, "result": str(options.result), "out": str(page)}
    result(options, shown | {"measured": facts.to_dict()}, _written([page]))
    return 0


def _recorded_model(earlier: StoredPruning) -> str:
    """Returns the original's directory; a factory that a file names is not run."""
    model = earlier.model
    if model is not None and Path(model).is_dir():
        return model
    got = "a result that does not name it"
    if model is not None:
        got = f"a result of {model!r}, which is no directory here"
    expected = "{argument} (the original, whose weights are measured)"
    raise LapValueError(expected, got, "Give it after RESULT.", argument="model")


def _stored_facts(options: Any, earlier: StoredPruning, progress: Progress) -> Facts:
    """Measures an earlier result on the weights of its original."""
    given: dict[str, Any] = {"options": _texts(earlier.options), "on_progress": progress.follow}
    if models.is_directory(options):
        from lap_ext.checkpoint.reporting import checkpoint_facts

        progress.step("trace")
        given["example_inputs"] = models.examples(options.input)
        how = options.on_unsupported
        return checkpoint_facts(options.model, earlier, on_unsupported=how, **given)
    from lap_ext.pruning.reporting import model_facts

    _, topology = models.traced(options, progress)
    return model_facts(topology, earlier, {}, title=options.model, **given)


def _draw(options: Any, facts: Facts) -> None:
    """Writes the report and the plots, where there are options for them."""
    from lap_ext.cli import outputs
    from lap_ext.report import plots, write

    done = f"; {str(options.out)!r} is complete"
    if options.report:
        with writing(options.report, done):
            write(options.report, facts)
    if options.plot:
        title = f"{facts.title}, {facts.criterion}"
        with writing(options.plot, done):
            plots.save(options.plot, plots.layers(facts.layers, title))
            plots.save(outputs.second(options.plot), plots.distributions(facts))


def _prune_directory(
    options: Any, sparsity: Sparsity | None, progress: Progress
) -> tuple[checkpoint.CheckpointResult, Facts | None]:
    """Streams a checkpoint directory."""
    from lap_ext import checkpoint

    reported = bool(options.report or options.plot)
    progress.step("prune")
    pruned = checkpoint.prune(
        options.model,
        options.out,
        sparsity,
        count_scores=reported,
        **_ranking_options(options),
        **_streaming_options(options, progress),
    )
    with writing(options.out):
        record.write(options.out, _chosen(options), pruned, options.model)
    if not reported:
        return pruned, None
    from lap_ext.checkpoint.reporting import checkpoint_facts

    facts = checkpoint_facts(
        options.model,
        pruned,
        options=_texts(_chosen(options)),
        example_inputs=models.examples(options.input),
        on_unsupported=options.on_unsupported,
        on_progress=progress.follow,
    )
    return pruned, facts


def _ranking_options(options: Any) -> dict[str, Any]:
    """Gathers the options that lap_ext.prune and checkpoint.prune take, but no scoring does."""
    names = ("structure", *_OF_STRUCTURES, *_ACROSS, "strict", "scope", "order", "rounds",
             "min_keep")  # fmt: skip
    return {name: getattr(options, name) for name in names}


def _streaming_options(options: Any, progress: Progress) -> dict[str, Any]:
    """Gathers the options of scoring that checkpoint.prune and checkpoint.scores take."""
    given = models.scoring_options(options)
    given |= {"on_unsupported": options.on_unsupported, "on_progress": progress.follow}
    given |= {"example_inputs": models.examples(options.input)}
    return given if options.memory is None else given | {"memory": options.memory}


def _prune_module(
    options: Any, sparsity: Sparsity | None, progress: Progress
) -> tuple[lap_ext.PruneResult, Facts | None]:
    """Prunes in memory and writes the model and the masks."""
    made, topology = models.traced(options, progress)
    progress.step("prune")
    given = models.scoring_options(options)
    given |= {"topology": topology, "on_progress": progress.follow}
    how = _ranking_options(options)
    pruned = lap_ext.prune(made.module, None, sparsity, apply=False, **how, **given)
    facts = None
    if options.report or options.plot:
        from lap_ext.checkpoint.usage import loading
        from lap_ext.pruning.reporting import model_facts

        progress.step("score")
        by_unit = options.criterion in parser.BY_UNIT
        scores = {} if by_unit else lap_ext.scores(made.module, **given)
        facts = model_facts(
            topology,
            pruned,
            scores,
            title=options.model,
            options=_texts(_chosen(options)),
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

    from lap_ext.checkpoint.files import MASKS

    with writing(options.out), new_directory(options.out) as directory:
        save_model(made.module, str(directory / _SINGLE), metadata={"format": "pt"})
        pruned.masks.save(directory / MASKS)
        record.write(directory, _chosen(options), pruned, options.model)


def _replaces(options: Any) -> bool:
    """Tells whether --out replaces an earlier result; raises unless it is that, or new, or empty.

    It is never the directory that lap-ext runs in.
    """
    out = options.out
    if not out.exists():
        return False
    runs_here = out.resolve() in (Path.cwd(), *Path.cwd().parents)
    if out.is_dir() and not runs_here:
        if not any(out.iterdir()):
            return False
        if (out / record.RECORD).is_file():
            if options.force:
                options.before = out.stat().st_ino
                return True
            cure = "Choose another name, or add --force to replace this earlier result."
            raise _taken(out, cure)
    raise _taken(out, "Choose another name.")


def _taken(out: Path, cure: str) -> LapFileExistsError:
    expected, got = "{argument} to be a new directory", repr(str(out))
    return LapFileExistsError(expected, got, cure, argument="out")


def _chosen(options: Any) -> dict[str, Any]:
    """Gathers the options that decide the result."""
    ranking = ("sparsity", "criterion", "scope", "order", "rounds", "normalize", "min_keep")
    chosen = {name: getattr(options, name) for name in (*ranking, "batch_norm", "layers")}
    chosen |= {"exclude": options.exclude, "statistics": options.data and str(options.data)}
    structure = options.structure
    chosen["structure"] = None if structure is None else structures.spelled(structure)
    others = () if options.structure is None else _OF_STRUCTURES
    if structure is not None and isinstance(structures.of(structure), Coupled):
        others = (
            *others,
            *_ACROSS,
            *(x for x in parser.TARGETS if getattr(options, x) is not None),
        )
    return chosen | {name: getattr(options, name) for name in others}


def _texts(chosen: Mapping[str, Any]) -> dict[str, str]:
    """Makes texts of options, for a report."""
    given = {name: value for name, value in chosen.items() if value not in (None, [])}
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in given.items()}


def score(options: Any) -> int:
    """Shows a table of every layer's scores, and writes all scores to a file with --out."""
    directory = Path(options.model) if models.is_directory(options) else None
    models.check_statistics(options)
    from lap_ext import checkpoint
    from lap_ext.checkpoint import stream
    from lap_ext.cli import outputs

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
    brief = f"{len(table.layers)} layers scored"
    result(options, shown, f"{table}{written}", f"{brief}{written}".replace("\n", "; "))
    return 0


def _score_module(options: Any, progress: Progress) -> checkpoint.ScoreStream:
    """Scores a module; all scores are in memory, as the module is."""
    from lap_ext.checkpoint import ScoreStream

    made, topology = models.traced(options, progress)
    progress.step("score")
    given = models.scoring_options(options)
    scores = lap_ext.scores(made.module, topology=topology, on_progress=progress.follow, **given)
    described = {name: given[name] for name in ("criterion", "normalize", "batch_norm")}
    return ScoreStream.of_model(topology, scores, described)


def inspect(options: Any) -> int:
    """Shows layers, their neighbors, sizes and zeros."""
    is_directory = models.is_directory(options)
    from lap_ext import checkpoint
    from lap_ext.checkpoint.inspecting import inspect_model

    with Progress(not options.quiet) as progress:
        if is_directory:
            progress.step("trace")
            inspection = checkpoint.inspect(
                options.model,
                example_inputs=models.examples(options.input),
                on_unsupported=options.on_unsupported,
                on_progress=progress.follow,
            )
        else:
            _, topology = models.traced(options, progress)
            inspection = inspect_model(topology, progress.follow)
    if options.dot:
        dot = inspection.topology.to_dot()
        result(options, {"dot": dot}, dot)
    else:
        share = inspection.zeros / max(1, inspection.weights)
        brief = f"{len(inspection.layers)} layers, {inspection.weights:,} weights, "
        brief += f"{share:.2%} of them zero; {inspection.bytes:,} bytes"
        shown = {"model": options.model} | inspection.to_dict()
        width = None if options.wide else terminal_width()
        table = inspection.table(width) if width else inspection.table(most=sys.maxsize)
        result(options, shown, table, brief)
    return 0


def verify(options: Any) -> int:
    """Compares a pruned checkpoint with its original; returns 1 if it has findings."""
    sparsity = _fraction(options) if options.sparsity else None
    from lap_ext.checkpoint import verify

    with Progress(not options.quiet) as progress:
        progress.step("verify")
        verdict = verify(
            options.pruned,
            options.original,
            sparsity=sparsity,
            scope=options.scope,
            on_progress=progress.follow,
        )
    result(options, verdict.to_dict(), str(verdict), verdict.summary())
    return 0 if verdict.ok else 1


def info(options: Any) -> int:
    """Shows versions and which kernels are loaded."""
    build = lap_ext.info()
    result(options, asdict(build), str(build), str(build).replace("\n", "; "))
    return 0


def bench(options: Any) -> int:
    """Times lap_ext on this machine, on standard shapes or those of the layers of a model."""
    if not 0 <= options.sparsity < 1:
        raise LapValueError("0 <= {argument} < 1", f"{options.sparsity:g}", argument="sparsity")
    is_directory = options.model is not None and models.is_directory(options)
    from lap_ext.cli.bench import bench as measured

    return measured(options, is_directory)


def demo_(options: Any) -> int:
    """Runs the demo; with --json prints its figures and draws no plot."""
    from lap_ext import demo

    if not options.json:
        given = ["--seeds", str(options.seeds), "--steps", str(options.steps)]
        with redirect_stdout(io.StringIO()) if options.quiet else nullcontext():
            status = demo.main([*given, "--out", str(options.out)])
        if status == 0 and options.quiet:
            result(options, {}, _written([options.out]))
        return 2 if status == 1 else status
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
    "report": report,
    "bench": bench,
    "demo": demo_,
    "info": info,
}
