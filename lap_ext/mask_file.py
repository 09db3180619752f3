# SPDX-License-Identifier: MIT
"""Masks in a safetensors file: one bit per weight, never pickle.

    one uint8 tensor per layer, ceil(n / 8) bytes: bit b of byte i is weight 8 * i + b, in C order;
    the bits after the last weight are 0
    metadata: {"lap_ext": version, "format": "1", "layers": JSON object of name -> shape, in order}

The file is written here (a length, a JSON header, the bytes): the same masks give the same bytes,
which the safetensors package does not promise, and nothing but torch is needed. It is read by that
package, which checks what it reads.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import lap_ext

FORMAT = "1"
_MAX_DIMS = 64  # torch's own limit for most of its operations
_MAX_WEIGHTS = 1 << 62


def save(function: str, path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Writes beside path and renames: path holds the old file or the new one, never a part."""
    head = _header(function, masks)
    with _replacing(Path(path)) as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for mask in masks.values():
            file.write(_bytes(pack(mask)))


def load(function: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks of a file on the CPU, in their order; ValueError if it is no such file."""
    opener, broken = _safetensors(function)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{function}: expected a file, got the directory {str(path)!r}.")
    try:
        with opener(path, framework="pt") as file:
            shapes = _shapes(file.metadata() or {})
            if set(file.keys()) != set(shapes):
                raise _FileError("its tensors are not those its metadata lists")
            return {name: _read(file, name, shape) for name, shape in shapes.items()}
    except (_FileError, broken) as error:
        raise ValueError(
            f"{function}: expected a file written by Masks.save, got {str(path)!r}: {error}."
        ) from None


def pack(mask: Tensor) -> Tensor:
    """The bits of a bool tensor, uint8 [ceil(n / 8)].

    Example:
        >>> import torch
        >>> pack(torch.tensor([True, False, True, False, False, False, False, True, True]))
        tensor([133,   1], dtype=torch.uint8)
    """
    flat = mask.detach().contiguous().view(torch.uint8).flatten()
    packed = flat.new_zeros((flat.numel() + 7) // 8)
    for bit in range(8):
        column = flat[bit::8]
        packed[: column.numel()] |= column << bit
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of this shape that pack was given."""
    flat = torch.empty(_count(shape), dtype=torch.bool, device=packed.device)
    for bit in range(8):
        column = flat[bit::8]
        column.copy_((packed[: column.numel()] >> bit) & 1)
    return flat.reshape(shape)


def _bytes(packed: Tensor) -> bytearray:
    """The bytes of a uint8 vector of any device, without numpy."""
    data = bytearray(packed.numel())
    if data:
        torch.frombuffer(data, dtype=torch.uint8).copy_(packed)
    return data


class _FileError(Exception):
    """What is wrong with a file, as the end of a sentence."""


def _header(function: str, masks: Mapping[str, Tensor]) -> bytes:
    """The JSON header, padded to 8 bytes as the format asks."""
    layers = {name: list(mask.shape) for name, mask in masks.items()}
    if "__metadata__" in layers:
        raise ValueError(
            f"{function}: expected layer names that a safetensors file can hold, "
            "got '__metadata__'. Rename that parameter."
        )
    metadata = {
        "format": FORMAT,
        "lap_ext": lap_ext.__version__,
        "layers": json.dumps(layers, separators=(",", ":"), ensure_ascii=False),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, mask in masks.items():
        size = (mask.numel() + 7) // 8
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of path once it is complete and on the disk."""
    path = path.resolve()  # a link stays a link
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _safetensors(function: str) -> tuple[Any, type[Exception]]:
    """safetensors.safe_open and the error it raises."""
    try:
        import safetensors
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ModuleNotFoundError(
            f"{function}: expected the safetensors package (it reads the file), got none. "
            "Run: pip install safetensors",
            name="safetensors",
        ) from None
    return safetensors.safe_open, safetensors.SafetensorError


def _shapes(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape as the metadata has it."""
    if "lap_ext" not in metadata or "layers" not in metadata:
        raise _FileError("it is a safetensors file of something else")
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise _FileError(f"its format is {found!r} and this lap_ext reads {FORMAT!r}")
    try:
        layers = json.loads(metadata["layers"])
    except (ValueError, RecursionError):
        raise _FileError("its metadata is damaged") from None
    if not isinstance(layers, dict) or not all(map(_is_shape, layers.values())):
        raise _FileError("its metadata is damaged")
    return {name: tuple(shape) for name, shape in layers.items()}


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        return False
    if not all(type(size) is int and 0 <= size < _MAX_WEIGHTS for size in shape):
        return False
    return _count(max(size, 1) for size in shape) < _MAX_WEIGHTS


def _read(file: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    """One mask; nothing is allocated before its size is known to be that of the bits."""
    stored, count = file.get_slice(name), _count(shape)
    if stored.get_dtype() != "U8" or list(stored.get_shape()) != [(count + 7) // 8]:
        raise _FileError(f"the bits of {name!r} do not fit its shape {list(shape)}")
    packed = file.get_tensor(name)
    if count % 8 and int(packed[-1]) >> count % 8:
        raise _FileError(f"{name!r} has bits after its last weight")
    return unpack(packed, shape)


def _count(shape: Any) -> int:
    """Product of the sizes, exactly."""
    count = 1
    for size in shape:
        count *= size
    return count
