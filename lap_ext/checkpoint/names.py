# SPDX-License-Identifier: MIT
"""Which tensors in the files are which parameters of the model.

A parameter has one or more copies (a tied weight may be stored under each of its names). A copy has
one or more slices (experts that are stored one by one), each a range of its elements in C order.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from lap_ext._text import some
from lap_ext.checkpoint import hf
from lap_ext.checkpoint.files import DTYPES, Checkpoint, Copy, Slice
from lap_ext.checkpoint.reading import Source, same
from lap_ext.errors import LapTypeError, LapValueError, warn

_SHOWN = 3  # names in a warning


class Names:
    """The tensors of a checkpoint by the parameters and buffers of a model."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.checkpoint = checkpoint
        self._model = model
        self._entries = checkpoint.entries
        self._tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._tensors.update(model.named_buffers(remove_duplicate=False))
        self._aliases: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            self._aliases.setdefault(id(tensor), []).append(name)
        self._stored: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
        for name, (target, how) in self._targets(model).items():
            self._stored.setdefault(target, []).append((name, how))

    def _targets(self, model: nn.Module) -> dict[str, hf.Target]:
        """Maps names in the files to names in the model."""
        if hasattr(model, "_init_weights") and hasattr(model, "config"):  # a model of transformers
            targets = hf.targets(model, self._entries)
            if targets:
                return targets
        prefix = getattr(model, "base_model_prefix", "") + "."
        return {name: (self._near(name, prefix), ()) for name in self._entries}

    def _near(self, name: str, prefix: str) -> str:
        """Finds a name in the model, with or without the prefix of the base model."""
        known = (name, prefix + name, name.removeprefix(prefix))
        return next((x for x in known if x in self._tensors), name)

    def copies(self, name: str) -> list[Copy]:
        """Finds all that is stored of a parameter or buffer.

        Raises:
            LapValueError: it is not stored, or what is stored does not fit.
        """
        aliases = self._aliases[id(self._tensors[name])]
        copies = [copy for alias in aliases for copy in self._of_alias(alias)]
        if not copies:
            raise self._missing(name)
        return copies

    def _of_alias(self, name: str) -> list[Copy]:
        """Finds the copies that are stored under one name of a parameter."""
        stored = self._stored.get(name, [])
        full = [(stored_name,) for stored_name, how in stored if not how]
        slices = [(stored_name, how) for stored_name, how in stored if how]
        joined = [self._joined(name, slices)] if slices else []
        return [self._copy(name, names) for names in full + joined]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter or buffer in the model."""
        return tuple(self._tensors[name].shape)

    def unlike(self, source: Source) -> list[str]:
        """Lists parameters that the model ties to another one and the files store differently."""
        names = []
        for aliases in self._aliases.values():
            first, *others = [x for x in aliases if x in self._stored] or [""]
            names += [x for x in others if not self._alike(source, first, x)]
        return names

    def _alike(self, source: Source, one: str, other: str) -> bool:
        (first, *_), (second, *_) = self._of_alias(one), self._of_alias(other)
        return same(source, first, second)

    def has(self, name: str) -> bool:
        """Whether a tensor of this name or an alias of it is stored."""
        return any(x in self._stored for x in self._aliases[id(self._tensors[name])])

    def warn_of_unknown(self) -> None:
        """Warns of stored matrices that the model has no place for: they are never pruned."""
        unknown = [
            name
            for target, sources in self._stored.items()
            if target not in self._tensors
            for name, _ in sources
            if self._is_matrix(name) and not hf.ignores(self._model, name)
        ]
        if unknown:
            warn(
                f"The model has no parameter for {len(unknown)} stored tensors, which stay as they "
                f"are, unpruned: {some(map(repr, sorted(unknown)), _SHOWN)}. If they are layers, "
                "pass {model=}, or name the class that has them in config.architectures."
            )

    def _is_matrix(self, name: str) -> bool:
        """Whether a stored tensor may be a layer's weight."""
        entry = self._entries[name]
        is_float = entry.dtype.startswith(("F", "BF"))
        return is_float and len(entry.shape) > 1 and entry.numel > 0

    def _joined(self, name: str, slices: list[tuple[str, tuple[Any, ...]]]) -> tuple[str, ...]:
        """Lists the names whose tensors make up a parameter, in order."""
        converters = {id(how[0]): how[0] for _, how in slices}
        by_pattern: dict[str, list[str]] = {}
        for stored, (_, pattern) in slices:
            by_pattern.setdefault(pattern, []).append(stored)
        (converter,) = converters.values() if len(converters) == 1 else (None,)
        names = None if converter is None else hf.in_order(converter, by_pattern)
        if names is None:
            more = ", ..." if len(slices) > 1 else ""
            raise LapValueError(
                f"{name!r} to be stored in one tensor, or in several with its rows in order",
                f"{slices[0][0]!r}{more}, which transformers rearranges",
                "Load the model and save it with save_pretrained(..., save_original_format=False).",
            )
        return tuple(names)

    def _copy(self, name: str, stored: tuple[str, ...]) -> Copy:
        """Makes a copy of stored tensors whose shapes and dtypes fit."""
        shape = tuple(self._tensors[name].shape)
        entries = [self._entries[x] for x in stored]
        first = entries[0]
        together = sum(entry.numel for entry in entries)
        same_rows = all(entry.shape[-1:] == shape[-1:] for entry in entries)
        fits = same_rows if len(entries) > 1 else first.shape == shape
        if not fits or together != self._tensors[name].numel():
            shown = [list(first.shape), "..."] if len(entries) > 1 else list(first.shape)
            raise LapValueError(
                f"{first.name!r} in {first.shard!r} with the shape of {name!r} in the model, "
                f"{list(shape)}",
                shown,
                "Is config.json that of these weights?",
            )
        for entry in entries:
            if entry.dtype not in DTYPES or entry.dtype != first.dtype:
                raise LapTypeError(
                    f"{entry.name!r} as F64, F32, F16 or BF16 (all slices of {name!r} alike)",
                    entry.dtype,
                    "Dequantize first.",
                )
        begin, slices = 0, []
        for entry in entries:
            slices.append(Slice(entry, begin))
            begin += entry.numel
        return tuple(slices)

    def _missing(self, name: str) -> LapValueError:
        unknown = [
            stored
            for target, sources in self._stored.items()
            if target not in self._tensors
            for stored, _ in sources
        ]
        close = difflib.get_close_matches(name, unknown, n=1, cutoff=0.4)
        got = f"none, and {close[0]!r} that the model does not have" if close else "none"
        return LapValueError(
            f"a tensor {name!r} in {str(self.checkpoint.path)!r}, as the model has it", got
        )


def untied(checkpoint: Checkpoint, model: nn.Module) -> Names:
    """Unties parameters of a model that the files store differently, and makes its names."""
    hf.untie(model, Names(checkpoint, model).unlike(Source(checkpoint)))
    return Names(checkpoint, model)
