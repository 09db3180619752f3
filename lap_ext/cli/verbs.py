# SPDX-License-Identifier: MIT
"""What each verb does: it asks the library, and shows the result."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lap_ext
from lap_ext import checkpoint, demo, report
from lap_ext._text import columns
from lap_ext.checkpoint.files import MASKS, open_folder
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.cli import bench, gather, models, score, verify, weights
from lap_ext.cli.output import Progress, result, writing
from lap_ext.cli.parser import sparsity
from lap_ext.report import Facts, plots
from lap_ext.topology import Layer, Topology

_SINGLE, _PROGRAM = "model.safetensors", "model.pt2"


def prune(options: Any) -> int:
    """Prunes a folder or a factory's module into a new folder."""
    removed = sparsity(options.sparsity)  # a mistake here costs nothing yet
    _can_write(options)
    start = time.monotonic()
    with Progress(not options.quiet) as progress:
        if models.is_folder(options):
            found, facts = _prune_folder(options, removed, progress)
        else:
            found, facts = _prune_module(options, removed, progress)
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
) -> tuple[Any, Facts | None]:  # fmt: skip
    """Streams a checkpoint."""
    folder = Path(options.model)
    more = {} if options.memory is None else {"memory": options.memory}
    progress.step("prune")
    found = checkpoint.prune(
        folder,
        options.out,
        removed,
        scope=options.scope,
        criterion=options.criterion,
        normalize=options.normalize,
        exclude=tuple(options.exclude),
        bn=options.bn,
        unknown=options.unknown,
        count_scores=bool(options.report or options.plot),
        on_progress=progress.follow,
        **more,
    )
    with writing(options.out):
        report.page.replace(options.out / weights.RECORD, _record(options, found))
    if not (options.report or options.plot):
        return found, None
    known = gather.structure(open_folder(folder), options.unknown)
    facts = _facts(options)
    gather.of_folder(facts, known.topology, known.copies, options.out, found.scores, progress)
    return found, facts


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
        facts = _facts(options)
        facts.bytes_before = _bytes(made.module)
        facts.bytes_after = facts.bytes_before
        progress.step("score")
        scores = lap_ext.scores(made.module, topology, **ways)
        gather.of_model(facts, topology, found.masks, scores, progress)
    found.masks.apply(made.module)
    progress.step("write")
    _write(options, made, found)
    return found, facts


def _write(options: Any, made: models.Made, found: lap_ext.PruneResult) -> None:
    """The pruned model, of its own kind, the masks, and what was asked."""
    from safetensors.torch import save_model

    with writing(options.out), new_folder(options.out) as part:
        if made.program is None:
            save_model(made.module, str(part / _SINGLE), metadata={"format": "pt"})
        else:  # its weights are those of the module
            torch.export.save(made.program, part / _PROGRAM)
        found.masks.save(part / MASKS)
        (part / weights.RECORD).write_text(_record(options, found), encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside out that becomes it at the end, and goes away if anything fails."""
    out = out.resolve()
    part = out.with_name(f".{out.name}.{secrets.token_hex(8)}.part")
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.iterdir():  # on the disk before the name is there
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


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


def _facts(options: Any) -> Facts:
    shown = {k: ", ".join(v) if isinstance(v, list) else v for k, v in _asked(options).items()}
    given = {name: value for name, value in shown.items() if value}
    return Facts(options.model, options.criterion, [], given)


def _record(options: Any, found: lap_ext.PruneResult) -> str:
    """What was asked and what each layer has left, for verify."""
    told = json.loads(found.to_json())
    facts = {"lap_ext": lap_ext.__version__, "asked": _asked(options), "layers": told["layers"]}
    return json.dumps(facts, indent=2) + "\n"


def _bytes(module: Any) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def inspect(options: Any) -> int:
    """Shows layers, who feeds whom, sizes and zeros."""
    with Progress(not options.quiet) as progress:
        if models.is_folder(options):
            topology, rows, size = _inspect_folder(options, progress)
        else:
            made, topology = models.traced(options, progress)
            rows, size = _inspect_module(topology, progress), _bytes(made.module)
    if options.dot:
        result(options, {"dot": topology.to_dot()}, topology.to_dot())
        return 0
    weights_, zeros = (sum(row[key] for row in rows) for key in ("weights", "zeros"))
    told = {
        "model": options.model,
        "bytes": size,
        "weights": weights_,
        "zeros": zeros,
        "layers": rows,
        "others": list(topology.others),
        "stops": list(topology.stops),
    }
    result(options, told, _inspected(rows, topology, size))
    return 0


def _inspect_folder(
    options: Any, progress: Progress
) -> tuple[Topology, list[dict[str, Any]], int]:  # fmt: skip
    folder = open_folder(Path(options.model))
    progress.step("trace")
    known = gather.structure(folder, options.unknown)
    first = {name: copies[0] for name, copies in known.copies.items()}
    progress.step("count zeros", sum(p.entry.size for pieces in first.values() for p in pieces))
    source, buffer, rows = Source(folder.path), Buffer(), []
    for name, layer in known.topology.layers.items():
        zeros = 0
        for piece in first[name]:
            zeros += weights.zeros(source, piece.entry, buffer)
            progress.advance(piece.entry.size)
        rows.append(_row(layer, zeros))
    return known.topology, rows, weights.size(folder)


def _inspect_module(topology: Topology, progress: Progress) -> list[dict[str, Any]]:
    layers, rows = topology.layers.values(), []
    progress.step("count zeros", sum(layer.weight.numel() for layer in layers))
    for layer in layers:
        rows.append(_row(layer, layer.weight.numel() - int(layer.weight.count_nonzero())))
        progress.advance(layer.weight.numel())
    return rows


def _row(layer: Layer, zeros: int) -> dict[str, Any]:
    count = layer.weight.numel()
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "dtype": str(layer.weight.dtype).removeprefix("torch."),
        "weights": count,
        "zeros": zeros,
        "sparsity": zeros / count if count else 0.0,
        "fed_by": gather.neighbors(layer.prev),
        "read_by": gather.neighbors(layer.next),
    }


def _inspected(rows: list[dict[str, Any]], topology: Topology, size: int) -> str:
    table = [("layer", "kind", "shape", "weights", "zeros", "fed by", "read by")]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        counts = f"{row['weights']:,}", f"{row['sparsity']:.2%}"
        table.append((row["name"], row["kind"], shape, *counts, row["fed_by"], row["read_by"]))
    count = sum(row["weights"] for row in rows)
    zeros = sum(row["zeros"] for row in rows)
    table.append(("all", "", "", f"{count:,}", f"{zeros / max(1, count):.2%}", "", ""))
    lines = [columns(table, right=(3, 4))]
    if topology.others:
        lines.append(f"no layers, never pruned: {', '.join(topology.others)}")
    lines += [f"stopped at: {text}" for text in topology.stops]
    return "\n".join([*lines, f"{size:,} bytes"])


def verify_(options: Any) -> int:
    """Compares a pruned checkpoint with its original; 1 if anything is not as it should be."""
    given = (options.sparsity, options.scope) if options.sparsity else None
    with Progress(not options.quiet) as progress:
        verdict = verify.compare(options.pruned, options.original, progress, given)
    result(options, verdict.to_dict(), str(verdict))
    return 1 if verdict.findings else 0


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
    "score": score.score,
    "inspect": inspect,
    "verify": verify_,
    "bench": bench.bench,
    "demo": demo_,
    "info": info,
}
