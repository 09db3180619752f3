# SPDX-License-Identifier: MIT
"""Hugging Face checkpoints: the model of a config.json, its example inputs, names in the files.

transformers is imported here and nowhere else, and only when a config.json is needed. It sees a
checked config (config.py), is guarded while it builds (guard.py), and runs no code but its own.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lap_ext._text import visible
from lap_ext.checkpoint import config
from lap_ext.checkpoint.files import Checkpoint
from lap_ext.checkpoint.guard import guarded
from lap_ext.errors import LapError, LapImportError, LapValueError

_LENGTH = 8  # tokens of the example: the topology does not depend on it
_IMAGE = 224  # pixels, for models that take images of any size
_LARGEST = 4_096  # of an image's side, ...: the trace follows each position

_SEVERAL_IMAGES = {"idefics2", "idefics3", "smolvlm"}  # pixel_values of several images each

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Target = tuple[str, tuple[Any, ...]]  # name in the model, and how tensors are put together for it


@contextmanager
def telling(expected: str, cure: str) -> Iterator[None]:
    """Turns whatever goes wrong in code of transformers into one error with a cure."""
    try:
        yield
    except LapError:
        raise
    except Exception as error:
        line = visible(str(error).strip().split("\n")[0][:300].rstrip("."))
        got = f"{type(error).__name__}: {line}" if line else type(error).__name__
        raise LapValueError(expected, got, cure) from error


def build(checkpoint: Checkpoint) -> nn.Module:
    """Builds the model of a directory's config.json on the meta device, in its own class."""
    read = config.read(checkpoint)
    transformers = _transformers()
    (name,) = read["architectures"]
    known = f"a config.json that transformers {transformers.__version__} knows"
    with guarded(checkpoint), tempfile.TemporaryDirectory() as empty:
        with telling(known, config.GIVE):
            # nothing but the checked config is in reach of transformers
            (Path(empty) / "config.json").write_text(json.dumps(read))
            made = transformers.AutoConfig.from_pretrained(
                empty, trust_remote_code=False, local_files_only=True
            )
            kind: Any = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise LapValueError(
                "config.architectures to name one class of transformers",
                repr(name)[:80],
                config.GIVE,
            )
        build_from = getattr(kind, "_from_config")  # noqa: B009 (unknown to a checker)
        with telling(f"a config.json that {name} can be built from", config.GIVE):
            with torch.device("meta"):
                model: nn.Module = build_from(made)
    return model.eval()


def inputs(model: Any) -> list[Shapes]:
    """Makes named inputs of a model of transformers from its config: shapes and dtypes.

    Returns:
        Inputs for every branch that forward has parameters for (text, images, sound); after them,
        if there are several, those of the main branch alone.
    """
    made, main = model.config, getattr(model, "main_input_name", None)
    names = inspect.signature(model.forward).parameters
    ids = _token_ids(made)
    makers = {
        "input_ids": lambda: ids,
        "pixel_values": lambda: _pixels(made),
        "input_features": lambda: _sound(made),
    }
    if main not in makers or (main == "input_features" and not hasattr(made, "num_mel_bins")):
        raise LapValueError(
            "a model whose inputs follow from its config (text, images, or sound as for Whisper)",
            f"{type(model).__name__} with main input {main!r}",
            "Pass {example_inputs=}: a tensor, a tuple, or a dict of named ones.",
        )
    decoder = {}
    if getattr(made, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        decoder["decoder_input_ids"] = ids
    alone = {main: makers[main](), **decoder}
    both = {name: makers[name]() for name in ("input_ids", "pixel_values") if name in names}
    if len(both) < 2 or main == "input_features":
        return [alone]
    if "qformer_input_ids" in names:
        both["qformer_input_ids"] = ids
    return [{**both, **decoder}, alone]


def _token_ids(made: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Makes the input of a text model."""
    text = getattr(made, "text_config", None) or made
    longest = getattr(text, "max_position_embeddings", None) or _LENGTH
    longest = _whole("max_position_embeddings", longest, sys.maxsize)
    return (1, min(_LENGTH, longest)), torch.int64


def _pixels(made: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Makes the input of an image model, [1, C, H, W]; [1, 1, C, H, W] where several are taken."""
    parts = [getattr(made, name, None) for name in ("vision_config", "encoder")]
    vision = next((x for x in parts if hasattr(x, "image_size")), made)
    size = getattr(vision, "image_size", None) or _IMAGE
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    height, width = (_whole("image_size", side) for side in sides)
    channels = _whole("num_channels", getattr(vision, "num_channels", 3))
    images = (1, 1) if getattr(made, "model_type", "") in _SEVERAL_IMAGES else (1,)
    return (*images, channels, height, width), torch.float32


def _sound(made: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Makes the input of a sound model."""
    bins = _whole("num_mel_bins", made.num_mel_bins)
    frames = getattr(made, "max_source_positions", None)
    length = 2 * _whole("max_source_positions", frames)  # Whisper's encoder halves it
    return (1, bins, length), torch.float32


def _whole(name: str, value: Any, most: int = _LARGEST) -> int:
    """Returns a size that the config gives to inputs."""
    if type(value) is not int or not 1 <= value <= most:
        raise LapValueError(
            f"config.{name} to be a whole number from 1 to {most:,}",
            repr(value)[:80],
            "Pass {example_inputs=}.",
        )
    return value


def targets(model: Any, names: Iterable[str]) -> dict[str, Target]:
    """Maps names in the files to names in the model, with how transformers converts tensors.

    The latter is () for a tensor that is stored as the model has it, else (converter, pattern).
    """
    try:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # an older transformers, which loads tensors as they are stored
        return {}
    with telling("names of tensors that transformers can map to the model", config.GIVE):
        mapping = get_model_conversion_mapping(model)
        renamings = [x for x in mapping if isinstance(x, loading.WeightRenaming)]
        converters = [x for x in mapping if isinstance(x, loading.WeightConverter)]
        by_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
        state, prefix = model.state_dict(), model.base_model_prefix
        result: dict[str, Target] = {}
        for name in sorted(names, key=loading.dot_natural_key):
            new, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
            if new not in state and name in state:
                new, pattern = name, None
            result[name] = (new, () if pattern is None else (by_pattern[pattern], pattern))
        return result


def in_order(converter: Any, by_pattern: dict[str, list[str]]) -> list[str] | None:
    """Orders stored names so that their joined tensors are the model's; None if there is no order.

    Experts [E][O, I] stacked, and [E][A, I], [E][B, I] stacked and joined in their rows; tensors
    joined in their rows.
    """
    steps = [(type(op).__name__, getattr(op, "dim", 0)) for op in converter.operations]
    lists = [by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern]
    if len(converter.target_patterns) != 1 or len({len(names) for names in lists}) != 1:
        return None
    stacked = ("MergeModulelist", 0)
    if steps == [stacked, ("Concatenate", 1)] or (steps == [stacked] and len(lists) == 1):
        return [name for names in zip(*lists, strict=True) for name in names]
    if steps == [("Concatenate", 0)] and len(lists[0]) == 1:
        return [name for (name,) in lists]
    return None


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Gives parameters their own tensors, as transformers does where the stored ones differ."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        old = module._parameters[attribute]
        assert old is not None
        module._parameters[attribute] = nn.Parameter(torch.empty_like(old), requires_grad=False)


def initialize(model: Any, buffers: Iterable[str]) -> None:
    """Gives buffers that are in no file the values that transformers gives them when it loads."""
    for name in buffers:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[attribute] = torch.empty_like(module._buffers[attribute], device="cpu")
        with torch.no_grad():
            model._init_weights(module)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise LapImportError(
            "the transformers package (it knows the model of a config.json)",
            "none",
            f"Run: pip install transformers. Or: {config.GIVE}",
            name="transformers",
        ) from None
    return transformers


def ignores(model: Any, name: str) -> bool:
    """Whether transformers leaves a stored tensor that the model does not have without a word."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
