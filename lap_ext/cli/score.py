# SPDX-License-Identifier: MIT
"""lap-ext score: a table of every layer's scores, and a file of all of them.

    q %       the smallest score such that at least q % of the layer's weights score it or less
    energy    sum of the squares of the layer's scores

A folder is scored a layer at a time: in memory are one layer's scores, a run of its weights and the
norms of all channels. The scores are those of lap_ext.scores, bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import lap_ext
from lap_ext._files import replacing
from lap_ext._text import columns
from lap_ext.checkpoint import memory, passes, plan
from lap_ext.checkpoint.files import open_folder
from lap_ext.checkpoint.reading import Buffer, bytes_of
from lap_ext.checkpoint.structure import structure_of
from lap_ext.cli import models
from lap_ext.cli.output import Progress, result, writing
from lap_ext.pruning import selection
from lap_ext.topology import Layer

_TENTHS = {"min": 0, "10%": 1, "median": 5, "90%": 9, "max": 10}
_MEMORY = 4 * 10**9  # as checkpoint.prune's
_BESIDE = {
    "none": 1,
    "norm": 5,
    "lamp": 16,
}  # float32 numbers a weight: scores, what normalizing needs
_KINDS = {torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class Scored:
    """The layers that are scored, the dtype of their scores, and the scores, one after the other."""

    layers: list[Layer]
    kinds: list[torch.dtype]
    scores: Iterator[Tensor]


def score(options: Any) -> int:
    """Scores a folder or a factory's module."""
    _can_write(options)
    with Progress(not options.quiet) as progress, ExitStack() as stack:
        of = _of_folder if models.is_folder(options) else _of_module
        scored = of(options, progress)
        file = None
        if options.out:
            head = _header(scored, options)
            size = len(head) + sum(_sizes(scored))
            file = stack.enter_context(_writing(options.out, size))
            file.write(head)
        rows = []
        for layer, scores in zip(scored.layers, scored.scores, strict=True):
            rows.append(_row(layer, scores))
            if file is not None:
                file.write(bytes_of(scores.cpu().contiguous()))
    told = {"model": options.model, "criterion": options.criterion, "normalize": options.normalize}
    told |= {"bn": options.bn, "out": options.out and str(options.out), "layers": rows}
    written = f"\nwritten: {options.out}" if options.out else ""
    result(options, told, f"{_table(rows)}{written}")
    return 0


def _can_write(options: Any) -> None:
    """The file is a new one, and not among those of the model."""
    out = options.out
    if out is None:
        return
    if out.exists():
        raise FileExistsError(f"expected --out to be a new file, got {str(out)!r}.")
    place, model = out.resolve().parent, Path(options.model)
    if not place.is_dir():
        raise FileNotFoundError(2, "No such folder", str(out.parent))
    if model.is_dir() and model.resolve() in (place, *place.parents):
        raise ValueError(f"expected --out outside of {options.model!r}, got {str(out)!r}.")


def _of_module(options: Any, progress: Progress) -> Scored:
    """Scores of a module, all in memory as the module is."""
    made, topology = models.traced(options, progress)
    progress.step("score")
    ways = models.ways(options)
    found = lap_ext.scores(made.module, topology, on_progress=progress.follow, **ways)
    layers = [topology.layers[name] for name in found]
    return Scored(layers, [scores.dtype for scores in found.values()], iter(found.values()))


def _of_folder(options: Any, progress: Progress) -> Scored:
    """Scores of a folder, each layer's computed when it is asked for."""
    chosen = plan.check_options("layer", options.criterion, "none", options.bn)
    files = open_folder(Path(options.model))
    progress.step("trace")
    structure = structure_of(files, None, None, options.unknown)
    room = _MEMORY if options.memory is None else options.memory
    exclude = tuple(options.exclude)
    found = plan.plan_of(structure, files, chosen, 0.0, "layer", "none", exclude, options.bn, room)
    task = found.task
    task.limits = _limits(options, task, room)
    task.on_progress = progress.follow
    sizes = {name: sum(x.entry.size for x in copies[0]) for name, copies in task.copies.items()}
    task.total = found.measured * sum(sizes.values()) + sum(sizes[x.name] for x in task.layers)
    progress.step("score")
    kinds = [_kind(options, task.dtype(layer)) for layer in task.layers]
    return Scored(task.layers, kinds, _streamed(options, task, found.measured))


def _streamed(options: Any, task: passes.Task, measured: bool) -> Iterator[Tensor]:
    if measured:
        passes.measure(task)
    buffer = Buffer()
    for layer in task.layers:
        scorer = passes.scorer(task, layer, "plain")
        kind = torch.float64 if task.dtype(layer) == torch.float64 else torch.float32
        scores = torch.empty(math.prod(layer.shape), dtype=kind)
        for first, weight in task.runs(layer, task.copies[layer.name][0], buffer, "score"):
            scores[first : first + weight.numel()] = scorer(weight, first)
        yield selection.normalized(scores.view(layer.shape), options.normalize, None)


def _kind(options: Any, weight: torch.dtype) -> torch.dtype:
    """The dtype of scores, as lap_ext.scores has it."""
    single = options.normalize == "none" and weight != torch.float64
    return torch.float32 if single else torch.float64


def _limits(options: Any, task: passes.Task, room: int) -> memory.Limits:
    """The limits of what the budget leaves beside the scores of the largest layer."""
    width = {x.name: 4 * (1 + (task.dtype(x) == torch.float64)) for x in task.layers}
    needs = {x.name: math.prod(x.shape) * width[x.name] * _BESIDE[options.normalize]
             for x in task.layers}  # fmt: skip
    largest = max(needs, key=lambda name: needs[name], default="")
    needed = needs.get(largest, 0)
    topology, criterion = task.network.topology, task.criterion
    try:
        return memory.limits(room - needed, topology, task.copies, criterion, options.bn)
    except ValueError:
        raise ValueError(
            f"expected --memory of more than {needed:,} bytes (all scores of layer {largest!r} are "
            f"in memory at a time, and a part of its weights), got {room:,}."
        ) from None


def _header(scored: Scored, options: Any) -> bytes:
    """The first bytes of a safetensors file: the length of a table, and the table."""
    ways = {name: getattr(options, name) for name in ("criterion", "normalize", "bn")}
    table: dict[str, Any] = {"__metadata__": {"lap_ext": lap_ext.__version__, **ways}}
    begin = 0
    for layer, kind, size in zip(scored.layers, scored.kinds, _sizes(scored), strict=True):
        if layer.name in table:
            raise ValueError(
                f"expected layer names that a safetensors file can hold, got {layer.name!r}. "
                "Rename that parameter."
            )
        place = [begin, begin + size]
        table[layer.name] = {
            "dtype": _KINDS[kind], "shape": list(layer.shape), "data_offsets": place
        }  # fmt: skip
        begin += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sizes(scored: Scored) -> list[int]:
    pairs = zip(scored.layers, scored.kinds, strict=True)
    return [math.prod(layer.shape) * kind.itemsize for layer, kind in pairs]


@contextmanager
def _writing(out: Path, size: int) -> Iterator[IO[bytes]]:
    """A file beside out that becomes it at the end, and goes away if anything fails."""
    free = shutil.disk_usage(out.resolve().parent).free
    if free < size:
        text = f"expected {size:,} bytes on the disk of {str(out)!r}, got {free:,} that are free."
        raise ValueError(text)
    with writing(out), replacing(out) as file:
        yield file


def _row(layer: Layer, scores: Tensor) -> dict[str, Any]:
    """The figures of a layer; None for those that a layer without weights has not."""
    count = scores.numel()
    ranks = {name: max(1, -(-count * tenths // 10)) for name, tenths in _TENTHS.items()}
    width = scores.shape[-1] if scores.dim() else 1
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "dtype": str(scores.dtype).removeprefix("torch."),
        "weights": count,
        "zeros": count - int(scores.count_nonzero()),
        "quantiles": {
            name: _number(lap_ext.kth_largest(scores, count - rank + 1)) if count else None
            for name, rank in ranks.items()
        },
        "energy": _number(math.fsum(selection.row_energies(scores, width))),
    }


def _number(value: Any) -> float | str:
    """A number as JSON has it; "inf" is a text there."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _table(rows: list[dict[str, Any]]) -> str:
    shown = [("layer", "shape", "weights", "zeros", *_TENTHS, "energy")]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        share = f"{row['zeros'] / max(1, row['weights']):.2%}"
        numbers = ["" if x is None else f"{float(x):.3g}" for x in row["quantiles"].values()]
        energy = f"{float(row['energy']):.3g}"
        shown.append((row["name"], shape, f"{row['weights']:,}", share, *numbers, energy))
    weights, zeros = (sum(row[key] for row in rows) for key in ("weights", "zeros"))
    energy = f"{math.fsum(float(row['energy']) for row in rows):.3g}"
    share = f"{zeros / max(1, weights):.2%}"
    shown.append(("all", "", f"{weights:,}", share, *[""] * len(_TENTHS), energy))
    return columns(shown, right=range(2, len(shown[0])))
