# SPDX-License-Identifier: MIT
"""A pruned checkpoint against its original: bits of kept weights, zeros of pruned ones, counts.

    kept      the bits of the original's weight
    pruned    +0.0, all bits zero
    others    tensors without a mask: the bits of the original
    counts    of the masks, as the pruning's own record has them

Without a mask file every weight must be the original's or +0.0. Files are read in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lap_ext import allocation
from lap_ext._text import columns
from lap_ext.checkpoint import hf
from lap_ext.checkpoint.files import Entry, Folder
from lap_ext.checkpoint.names import Names
from lap_ext.checkpoint.reading import Buffer, Source
from lap_ext.cli import parser, weights
from lap_ext.cli.output import Progress
from lap_ext.masks.file import BitMasks


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    tensor: str
    problem: str
    count: int = 1  # weights, where it is about weights


@dataclass
class Verdict:
    """What a comparison found."""

    findings: list[Finding] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)  # name, kept, total
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: int = 0  # compared
    masked: bool = False  # a mask file was there

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        kept, total = (sum(row[key] for row in self.layers) for key in ("kept", "total"))
        sparsity = 1 - kept / total if total else 0.0
        return {
            "ok": not self.findings,
            "findings": [asdict(finding) for finding in self.findings],
            "tensors": self.tensors,
            "masks": self.masked,
            "kept": kept,
            "total": total,
            "sparsity": sparsity,
            "layers": self.layers,
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        rows = [("layer", "kept", "total", "sparsity")]
        for row in [*self.layers, {"name": "all"} | facts]:
            share = 1 - row["kept"] / row["total"] if row["total"] else 0.0
            rows.append((row["name"], f"{row['kept']:,}", f"{row['total']:,}", f"{share:.2%}"))
        lines = [columns(rows, right=(1, 2, 3)), ""]
        lines += [f"{finding.tensor}: {finding.problem}" for finding in self.findings]
        how = "" if self.masked else " There is no mask file: zeros were taken for pruned."
        if self.findings:
            lines.append(f"{len(self.findings)} findings in {self.tensors} tensors.{how}")
        else:
            lines.append(
                f"{self.tensors} tensors compared: every kept weight has its original's bits, every "
                f"pruned one is zero.{how}"
            )
        return "\n".join(lines)


def compare(
    pruned: Path,
    original: Path,
    progress: Progress,
    given: tuple[Sequence[str], str] | None = None,
) -> Verdict:
    """Compares two folders or files; given: sparsities and scope that the counts must meet."""
    after, before = weights.opened(pruned), weights.opened(original)
    mask_path = weights.masks_of(after)
    verdict = Verdict(masked=mask_path is not None)
    with ExitStack() as stack:
        masks = stack.enter_context(BitMasks(mask_path)) if mask_path else None
        pieces = _pieces(before, masks, verdict) if masks else {}
        both = list(_both(after, before, verdict))
        progress.step("verify", sum(entry.size for _, entry in both))
        sources, buffers = (Source(after.path), Source(before.path)), (Buffer(), Buffer())
        for new, old in both:
            _tensor(new, old, pieces.get(old.name), masks, sources, buffers, verdict, progress)
            verdict.tensors += 1
        if masks:
            _count(masks, verdict)
    _record(after, verdict, given)
    return verdict


def _both(after: Folder, before: Folder, verdict: Verdict) -> Iterator[tuple[Entry, Entry]]:
    """Tensors that both have, of the same shape and dtype."""
    new, old = after.entries, before.entries
    for name in sorted(old.keys() ^ new.keys()):
        where = "the pruned checkpoint lacks it" if name in old else "the original does not have it"
        verdict.findings.append(Finding(name, where))
    for name, entry in old.items():
        if name not in new:
            continue
        mine = new[name]
        if (mine.dtype, mine.shape) != (entry.dtype, entry.shape):
            text = f"{mine.dtype} {list(mine.shape)}, in the original {entry.dtype} {list(entry.shape)}"
            verdict.findings.append(Finding(name, text))
        else:
            yield mine, entry


def _pieces(folder: Folder, masks: BitMasks, verdict: Verdict) -> dict[str, tuple[str, int]]:
    """Tensor name -> its layer, and the first of the layer's weights that it holds."""
    entries, found, other = folder.entries, {}, []
    for layer in masks.shapes:
        parameter = f"{layer}.weight" if f"{layer}.weight" in entries else layer
        if parameter in entries and entries[parameter].shape == masks.shapes[layer]:
            found[parameter] = (layer, 0)
        else:
            other.append(layer)
    if (folder.path / "config.json").is_file():  # the model knows more: other names, tied copies
        try:
            found.update(_by_model(folder, masks))
            other = [layer for layer in other if layer not in {x for x, _ in found.values()}]
        except (ValueError, ModuleNotFoundError):
            if other:
                raise
    for layer in other:
        verdict.findings.append(
            Finding(layer, "a mask for a tensor that the original does not have")
        )
    return found


def _by_model(folder: Folder, masks: BitMasks) -> dict[str, tuple[str, int]]:
    """The same through the model of config.json: names that transformers changes, tied copies."""
    model = hf.build(folder.path)
    names, known = Names(folder, model), dict(model.named_parameters())
    found = {}
    for layer in masks.shapes:
        parameter = f"{layer}.weight" if f"{layer}.weight" in known else layer
        if parameter in known:
            pieces = [piece for copy in names.copies(parameter) for piece in copy]
            found.update({piece.entry.name: (layer, piece.begin) for piece in pieces})
    return found


def _tensor(
    new: Entry,
    old: Entry,
    place: tuple[str, int] | None,
    masks: BitMasks | None,
    sources: tuple[Source, Source],
    buffers: tuple[Buffer, Buffer],
    verdict: Verdict,
    progress: Progress,
) -> None:
    """Compares one tensor."""
    changed = lost = alive = zeroed = 0
    pairs = zip(
        weights.bits(sources[0], new, buffers[0]),
        weights.bits(sources[1], old, buffers[1]),
        strict=True,
    )
    for (first, mine), (_, theirs) in pairs:
        same = mine == theirs
        if masks is not None and place is not None:
            layer, begin = place
            kept = masks.part(layer, begin + first, mine.numel())
            wrong = ~same & kept
            changed += int(wrong.count_nonzero())
            lost += int((wrong & (mine == 0)).count_nonzero())
            alive += int(((mine != 0) & ~kept).count_nonzero())
        elif masks is not None:
            changed += int((~same).count_nonzero())
        else:
            zero = mine == 0
            zeroed += int(zero.count_nonzero())
            changed += int((~same & ~zero).count_nonzero())
        progress.advance(mine.numel() * mine.element_size())
    if changed:
        what = "kept weights" if place else "elements"
        also = f" ({lost} of them zero)" if lost else ""
        text = f"{changed} {what} differ from the original{also}"
        verdict.findings.append(Finding(new.name, text, changed))
    if alive:
        text = f"{alive} pruned weights are not zero"
        verdict.findings.append(Finding(new.name, text, alive))
    if masks is None and zeroed and len(new.shape) > 1:
        name = new.name.removesuffix(".weight")
        verdict.shapes[name] = new.shape
        row = {"name": name, "kept": new.numel - zeroed, "total": new.numel}
        verdict.layers.append(row)


def _count(masks: BitMasks, verdict: Verdict) -> None:
    """How many weights each mask keeps."""
    for name, shape in masks.shapes.items():
        total = torch.Size(shape).numel()
        verdict.shapes[name] = shape
        parts = range(0, total, weights.PIECE)
        kept = sum(
            int(masks.part(name, at, min(weights.PIECE, total - at)).count_nonzero())
            for at in parts
        )
        verdict.layers.append({"name": name, "kept": kept, "total": total})


def _record(folder: Folder, verdict: Verdict, given: Any) -> None:
    """The counts that the pruning says it has left, and those that the sparsity asks for."""
    path = folder.path / weights.RECORD
    found = {row["name"]: (row["kept"], row["total"]) for row in verdict.layers}
    if path.is_file():
        try:
            record = json.loads(path.read_bytes())
            rows = {row["name"]: (int(row["kept"]), int(row["total"])) for row in record["layers"]}
            given = given or (list(record["asked"]["sparsity"]), record["asked"]["scope"])
        except (ValueError, KeyError, TypeError, RecursionError):
            verdict.findings.append(Finding(weights.RECORD, "it is damaged"))
            return
        for name in sorted(rows.keys() | found.keys()):
            if rows.get(name) != found.get(name):
                text = f"(kept, total) is {found.get(name)} in the masks, {rows.get(name)} recorded"
                verdict.findings.append(Finding(name, text))
    if given:
        _asked(given[0], given[1], verdict)


def _asked(sparsity: Sequence[str], scope: str, verdict: Verdict) -> None:
    """The counts that a sparsity asks for, of each layer or of all."""
    wanted = allocation.of(parser.sparsity(sparsity))
    shapes = verdict.shapes
    if scope == "global":
        kept = sum(row["kept"] for row in verdict.layers)
        if (keep := allocation.total(wanted, shapes)) != kept:
            text = f"{kept} weights are kept, a sparsity of {', '.join(sparsity)} keeps {keep}"
            verdict.findings.append(Finding("all layers", text))
        return
    keeps = wanted.keeps(shapes)
    for row in verdict.layers:
        keep = keeps.get(row["name"], row["kept"])
        if keep != row["kept"]:
            text = (
                f"{row['kept']} weights are kept, a sparsity of {', '.join(sparsity)} keeps {keep}"
            )
            verdict.findings.append(Finding(row["name"], text))
