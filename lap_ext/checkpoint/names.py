# SPDX-License-Identifier: MIT
"""Tensors in files <-> parameters of the model.

A parameter has one or more copies (a tied weight may be stored under each of its names), and a copy
one or more pieces (experts that are stored one by one): runs of its elements in C order.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from lap_ext.checkpoint import hf
from lap_ext.checkpoint.files import DTYPES, FUNCTION, Copy, Folder, Piece, wrong
from lap_ext.checkpoint.reading import Source, same


class Names:
    """Which tensors of a folder are which parameters and buffers of a model."""

    def __init__(self, folder: Folder, model: nn.Module) -> None:
        self.folder = folder
        self._entries = folder.entries
        self._tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._tensors.update(model.named_buffers(remove_duplicate=False))
        self._aliases: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            self._aliases.setdefault(id(tensor), []).append(name)
        self._stored: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
        for name, (target, how) in self._targets(model).items():
            self._stored.setdefault(target, []).append((name, how))

    def _targets(self, model: nn.Module) -> dict[str, hf.Target]:
        """Name in the files -> name in the model."""
        if hasattr(model, "_init_weights") and hasattr(model, "config"):  # a model of transformers
            found = hf.targets(model, self._entries)
            if found:
                return found
        prefix = getattr(model, "base_model_prefix", "") + "."
        return {name: (self._near(name, prefix), ()) for name in self._entries}

    def _near(self, name: str, prefix: str) -> str:
        """A name as the model has it, with or without the prefix of the base model."""
        known = (name, prefix + name, name.removeprefix(prefix))
        return next((x for x in known if x in self._tensors), name)

    def copies(self, name: str) -> list[Copy]:
        """Where a parameter or buffer is stored; ValueError if it is nowhere or does not fit."""
        aliases = self._aliases[id(self._tensors[name])]
        found = [copy for alias in aliases for copy in self._of_alias(alias)]
        if not found:
            raise self._missing(name)
        return found

    def _of_alias(self, name: str) -> list[Copy]:
        """What is stored under one name of a parameter."""
        stored = self._stored.get(name, [])
        whole = [(stored_name,) for stored_name, how in stored if not how]
        parts = [(stored_name, how) for stored_name, how in stored if how]
        joined = [self._joined(name, parts)] if parts else []
        return [self._copy(name, names) for names in whole + joined]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the model has for a parameter or buffer."""
        return tuple(self._tensors[name].shape)

    def unlike(self, source: Source) -> list[str]:
        """Names of parameters that the model ties to another one and the files store differently."""
        found = []
        for aliases in self._aliases.values():
            first, *others = [x for x in aliases if x in self._stored] or [""]
            found += [x for x in others if not self._alike(source, first, x)]
        return found

    def _alike(self, source: Source, one: str, other: str) -> bool:
        (first, *_), (second, *_) = self._of_alias(one), self._of_alias(other)
        return same(source, first, second)

    def has(self, name: str) -> bool:
        """Whether a tensor of this name or an alias of it is stored."""
        return any(x in self._stored for x in self._aliases[id(self._tensors[name])])

    def _joined(self, name: str, parts: list[tuple[str, tuple[Any, ...]]]) -> tuple[str, ...]:
        """The names whose tensors make up a parameter, in order."""
        converters = {id(how[0]): how[0] for _, how in parts}
        by_pattern: dict[str, list[str]] = {}
        for stored, (_, pattern) in parts:
            by_pattern.setdefault(pattern, []).append(stored)
        (converter,) = converters.values() if len(converters) == 1 else (None,)
        names = None if converter is None else hf.in_order(converter, by_pattern)
        if names is None:
            raise wrong(
                f"{name!r} to be stored whole, or in rows one after the other",
                f"{parts[0][0]!r}{', ...' if len(parts) > 1 else ''}, which transformers rearranges",
                "Load the model and save it with save_pretrained(..., save_original_format=False).",
            )
        return tuple(names)

    def _copy(self, name: str, stored: tuple[str, ...]) -> Copy:
        """The pieces, checked: shapes, dtypes."""
        shape = tuple(self._tensors[name].shape)
        entries = [self._entries[x] for x in stored]
        first = entries[0]
        together = sum(entry.numel for entry in entries)
        same_rows = all(entry.shape[-1:] == shape[-1:] for entry in entries)
        fits = same_rows if len(entries) > 1 else first.shape == shape
        if not fits or together != self._tensors[name].numel():
            shown = [list(first.shape), "..."] if len(entries) > 1 else list(first.shape)
            raise wrong(
                f"{first.name!r} in {first.shard!r} with the shape of {name!r} in the model, "
                f"{list(shape)}",
                shown,
                "Is config.json that of these weights?",
            )
        for entry in entries:
            if entry.dtype not in DTYPES or entry.dtype != first.dtype:
                raise TypeError(
                    f"{FUNCTION}: expected {entry.name!r} as F64, F32, F16 or BF16 (all parts of "
                    f"{name!r} alike), got {entry.dtype}. Dequantize first."
                )
        begin, pieces = 0, []
        for entry in entries:
            pieces.append(Piece(entry, begin))
            begin += entry.numel
        return tuple(pieces)

    def _missing(self, name: str) -> ValueError:
        unknown = [
            stored for target, found in self._stored.items() if target not in self._tensors
            for stored, _ in found
        ]  # fmt: skip
        close = difflib.get_close_matches(name, unknown, n=1, cutoff=0.4)
        got = f"none, and {close[0]!r} that the model does not have" if close else "none"
        return wrong(f"a tensor {name!r} in {str(self.folder.path)!r}, as the model has it", got)
