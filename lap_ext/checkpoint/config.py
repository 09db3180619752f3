# SPDX-License-Identifier: MIT
"""What a config.json may say, checked before transformers sees it.

    refused     what would run code that is not transformers' own, or fetch a file
    left out    what only chooses how transformers computes: the structure is the same without it
    bounded     numbers of layers and labels, for which transformers makes lists before modules

The guard of the build (guard.py) does not rely on any of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lap_ext._files import small_file
from lap_ext.checkpoint.files import Checkpoint, parsed
from lap_ext.errors import LapValueError

GIVE = "Pass {model=} and {example_inputs=}."
_OWN = "Pass {model=}, which is your own code"
_REMOVE = f"{_OWN}, or remove it if transformers knows the model without it."

# attributes of transformers' config classes that give other keys another meaning
_INTERNAL = {"attribute_map", "sub_configs", "sub_configs_defaults"}
_FLOAT = "__float__"  # how transformers stores infinity
_QUANTIZED = {"quantization_config", "compression_config"}
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?|use_kernels")
_DEPTH = re.compile(  # what a build or a forward loops over
    r"(?!.*_per_)(.*_)?"
    r"(layers?|blocks?|depths?|stages?|repeats|loops?|cycles|passes|iters|group_num|pretraining_tp)"
)
_LABELS = "num_labels"
_MOST_LABELS = 1_000_000
_LARGEST, _MOST_TABLES = 4_000_000, 100_000  # bytes; tens of thousands of labels are 2 MB
_ABSURD = 10**12  # larger numbers do not add up with floats
_SHARED_LAYERS = 128  # a layer that is called so often is stored once

_Where = tuple[Any, ...]  # (where its table is, key); () is the whole config


def read(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads the config.json beside a checkpoint's files.

    Raises:
        LapValueError: it is no config, needs code or files of others, or is absurd.
    """
    path = checkpoint.path / "config.json"
    try:
        data = small_file(path, _LARGEST)
    except FileNotFoundError:
        raise LapValueError(f"config.json in {str(checkpoint.path)!r}", "none", GIVE) from None
    config = parsed(data, "config.json to be JSON", finite=False)
    if not isinstance(config, dict):
        raise LapValueError("config.json with a table", type(config).__name__, GIVE)
    if not isinstance(config.get("model_type"), str):
        got = _short(config.get("model_type"))
        raise LapValueError("config.model_type to name a model of transformers", got, GIVE)
    names = config.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        got = "none" if names is None else _short(names)
        raise LapValueError("config.architectures to name one class of transformers", got, GIVE)
    most = max(_SHARED_LAYERS, len(checkpoint.entries))
    for where, table, key, value in _items(config):
        _check_code(where, key, value)
        _check_size(where, key, value, most)
        if _IMPLEMENTATION.fullmatch(key):
            del table[key]
        elif key == "use_pretrained_backbone":
            table[key] = False
    return config


def _items(config: dict[str, Any]) -> Iterator[tuple[_Where, dict[str, Any], str, Any]]:
    """Lists (where it is, its table, key, value) of all tables at any depth."""
    waiting: list[tuple[_Where, Any]] = [((), config)]
    while waiting:
        where, inside = waiting.pop()
        is_table = isinstance(inside, dict)
        for key, value in list(inside.items() if is_table else enumerate(inside)):
            if is_table:
                yield (where, key), inside, key, value
            if isinstance(value, (dict, list)) and value:
                waiting.append(((where, key), value))
        if len(waiting) > _MOST_TABLES:
            raise LapValueError(f"config.json of {_MOST_TABLES:,} lists and tables at most", "more")


def _path(where: _Where) -> str:
    """Spells where a value is: 'encoder.num_layers'."""
    keys = []
    while where:
        where, key = where
        keys.append(str(key))
    return _short(".".join(reversed(keys)))


def _check_code(where: _Where, key: str, value: Any) -> None:
    """Refuses what would run code that is not transformers' own, or fetch a file."""
    if key == "auto_map":
        raise LapValueError(
            "a config.json without code", f"{_path(where)}, which names Python files", _REMOVE
        )
    if key in _INTERNAL or (key.startswith("__") and key != _FLOAT):
        raise LapValueError(
            "a config.json without internals of transformers", _path(where), "Remove it."
        )
    if key in _QUANTIZED and value is not None:
        raise LapValueError(
            "unquantized weights", f"a config with {_path(where)}", "Dequantize first."
        )
    is_path = key == "backbone" and isinstance(value, str) and any(x in value for x in "/:")
    if (
        is_path
        or (key == "backbone_kwargs" and value)
        or (key, value) == ("model_type", "timm_wrapper")
    ):
        raise LapValueError(
            "a config.json with the whole structure",
            f"{_path(where)}: {_short(value)}, which other packages or pages complete",
            f"{_OWN}.",
        )


def _check_size(where: _Where, key: str, value: Any, most: int) -> None:
    """Refuses numbers of layers that the files cannot hold, and absurd numbers of labels."""
    numbers = value if isinstance(value, list) else [value]
    if key == "attention_types":  # [[names, how often], ...]
        numbers = [x for pair in numbers if isinstance(pair, list) for x in pair]
    total = sum(min(abs(x), _ABSURD) for x in numbers if isinstance(x, (int, float)))
    if key == _LABELS and not total <= _MOST_LABELS:
        raise LapValueError(f"{_path(where)} <= {_MOST_LABELS:,} in config.json", _short(value))
    if isinstance(value, list):
        most *= 10  # also lists of the indices of layers
    if (key == "attention_types" or _DEPTH.fullmatch(key)) and not total <= most:
        raise LapValueError(
            f"{_path(where)} <= {most:,} in config.json (the files hold fewer layers)",
            _short(value),
            "Is config.json that of these weights?",
        )


def _short(value: Any) -> str:
    """Shows a value of the file on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
