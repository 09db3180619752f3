# SPDX-License-Identifier: MIT
"""Hugging Face checkpoints: the model of a config.json, its example inputs, names in the files.

transformers is imported here and nowhere else, and only when a config.json is needed. Code in the
checkpoint directory is never run (trust_remote_code=False).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lap_ext.errors import LapImportError, LapValueError

_GIVE = "Pass model= (on the meta device will do) and example_inputs=."
_LENGTH = 8  # tokens of the example: the topology does not depend on it
_IMAGE = 224  # pixels, for models that take images of any size

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Target = tuple[str, tuple[Any, ...]]  # name in the model, and how tensors are put together for it


def build(path: Path) -> nn.Module:
    """Builds the model of a directory's config.json on the meta device, in its own class."""
    if not (path / "config.json").is_file():
        raise LapValueError(f"config.json in {str(path)!r}", "none", _GIVE)
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise LapValueError(
            f"a config.json that transformers {transformers.__version__} knows",
            f"{type(error).__name__}: {_first_line(error)}",
            _GIVE,
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise LapValueError(
            "unquantized weights", "a config with quantization_config", "Dequantize first."
        )
    names = config.architectures or []
    kind: Any = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise LapValueError(
            "config.architectures to name one class of transformers", names or "none", _GIVE
        )
    build_from = getattr(kind, "_from_config")  # noqa: B009 (unknown to a checker)
    try:
        with torch.device("meta"):
            model: nn.Module = build_from(config)
    except Exception as error:
        raise LapValueError(
            f"a config that {names[0]} can be built from",
            f"{type(error).__name__}: {_first_line(error)}",
        ) from error
    return model.eval()


def inputs(model: Any) -> Shapes:
    """Makes named inputs of a model of transformers by its main input: shapes and dtypes."""
    config, main = model.config, getattr(model, "main_input_name", None)
    longest = getattr(config, "max_position_embeddings", None) or _LENGTH
    ids = ((1, min(_LENGTH, longest)), torch.int64)
    result: Shapes = {}
    if main == "input_ids":
        result[main] = ids
    elif main == "pixel_values":
        size = getattr(config, "image_size", None) or _IMAGE
        height, width = (size, size) if isinstance(size, int) else size
        result[main] = ((1, getattr(config, "num_channels", 3), height, width), torch.float32)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        length = 2 * config.max_source_positions  # Whisper's encoder halves it
        result[main] = ((1, config.num_mel_bins, length), torch.float32)
    else:
        raise LapValueError(
            "a model whose inputs follow from its config (text, images, or sound as for Whisper)",
            f"{type(model).__name__} with main input {main!r}",
            "Pass example_inputs=: a tensor, a tuple, or a dict of named ones.",
        )
    if getattr(config, "is_encoder_decoder", False):
        if "decoder_input_ids" in inspect.signature(model.forward).parameters:
            result["decoder_input_ids"] = ids
    return result


def targets(model: Any, names: Iterable[str]) -> dict[str, Target]:
    """Maps names in the files to names in the model, with how transformers converts tensors.

    The latter is () for a tensor that is stored as the model has it, else (converter, pattern).
    """
    try:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # an older transformers, which loads tensors as they are stored
        return {}
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
            f"Run: pip install transformers. Or: {_GIVE}",
            name="transformers",
        ) from None
    return transformers


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300].rstrip(".")
