# SPDX-License-Identifier: MIT
"""Writes and reads masks in a safetensors file, with one bit per weight and without pickle.

    one uint8 tensor of ceil(n / 8) bytes for each layer of n weights; bit b of byte i is weight
    8 * i + b in C order; the bits after the last weight are 0
    metadata: {"lap_ext": version, "format": "1", "layers": JSON object of name -> shape, in order}

This module itself writes the file (a length, a JSON header, the bytes). So the same masks give the
same bytes, which the safetensors package does not guarantee, and only torch is needed. That package
reads the file and checks what it reads; BitMasks reads one mask, or a chunk of one, at a time.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lap_ext import __version__
from lap_ext._files import replacing, safetensors_header, safetensors_package
from lap_ext.errors import LapValueError

FORMAT = "1"
_MAX_DIMS = 64  # torch's own limit for most of its operations
_MAX_WEIGHTS = 1 << 62


def save(path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Writes masks to a file atomically: at any time, path holds the old file or the new one."""
    head = header(masks)
    with replacing(path) as file:
        file.write(head)
        for mask in masks.values():
            file.write(_bytes(pack(mask)))


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the masks of a file to the CPU, in the order in which they were saved.

    Raises:
        LapValueError: the file is damaged or does not contain masks.
    """
    with BitMasks(path) as file:
        return {name: file.mask(name) for name in file.shapes}


class BitMasks:
    """The masks of a file, each of which is read when requested; open it in a `with` statement.

    Attributes:
        shapes: the shape of each layer by name, in the order in which the masks were saved.

    Raises:
        ValueError: the file is damaged or does not contain masks.
        OSError: there is no such file.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(Path(directory) / "masks", {"fc": torch.tensor([[True, False, True]])})
        ...     with BitMasks(Path(directory) / "masks") as masks:
        ...         masks.shapes, masks.mask("fc"), masks.chunk("fc", 1, 2)
        ({'fc': (1, 3)}, tensor([[ True, False,  True]]), tensor([False,  True]))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> BitMasks:
        package = safetensors_package("it reads the file")
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))
        try:
            self._file: Any = package.safe_open(self.path, framework="pt").__enter__()
        except package.SafetensorError as error:
            raise _not_masks(self.path, str(error)) from None
        self.shapes = _shapes(self.path, self._file.metadata() or {})
        if set(self._file.keys()) != set(self.shapes):
            raise _not_masks(self.path, "its tensors are not those its metadata lists")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def mask(self, name: str) -> Tensor:
        """Reads the mask of a layer, in the shape of its weight."""
        count = _count(self.shapes[name])
        packed = self._bits(name)[:]
        if count % 8 and int(packed[-1]) >> count % 8:
            raise _not_masks(self.path, f"{name!r} has bits after its last weight")
        return unpack(packed, self.shapes[name])

    def chunk(self, name: str, begin: int, count: int) -> Tensor:
        """Reads the flat part [begin, begin + count) of a layer's mask."""
        first = begin // 8
        packed = self._bits(name)[first : (begin + count + 7) // 8]
        flat = unpack(packed, (packed.numel() * 8,))
        return flat[begin - 8 * first : begin - 8 * first + count]

    def _bits(self, name: str) -> Any:
        """Opens what is stored of a mask, and checks its size before anything is allocated."""
        stored, shape = self._file.get_slice(name), self.shapes[name]
        if stored.get_dtype() != "U8" or list(stored.get_shape()) != [(_count(shape) + 7) // 8]:
            raise _not_masks(self.path, f"the bits of {name!r} do not fit its shape {list(shape)}")
        return stored


def pack(mask: Tensor) -> Tensor:
    """Packs a bool tensor of n elements into bits, uint8 [ceil(n / 8)].

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
    """Unpacks the bits made by `pack` into a bool tensor of the given shape."""
    flat = torch.empty(_count(shape), dtype=torch.bool, device=packed.device)
    for bit in range(8):
        column = flat[bit::8]
        column.copy_((packed[: column.numel()] >> bit) & 1)
    return flat.reshape(shape)


def _bytes(packed: Tensor) -> bytearray:
    """Copies a uint8 vector of any device to bytes, without numpy."""
    data = bytearray(packed.numel())
    if data:
        torch.frombuffer(data, dtype=torch.uint8).copy_(packed)
    return data


def _not_masks(path: Path, problem: str) -> LapValueError:
    """Makes the error of a file that does not hold masks."""
    return LapValueError("a file written by Masks.save", f"{str(path)!r}: {problem}")


def header(masks: Mapping[str, Tensor]) -> bytes:
    """Makes the header of a file of masks; only the shapes of the masks matter."""
    layers = {name: list(mask.shape) for name, mask in masks.items()}
    sizes = {name: (mask.numel() + 7) // 8 for name, mask in masks.items()}
    metadata = {
        "format": FORMAT,
        "lap_ext": __version__,
        "layers": json.dumps(layers, separators=(",", ":"), ensure_ascii=False),
    }
    tensors = ((name, "U8", [size], size) for name, size in sizes.items())
    return safetensors_header(tensors, metadata)


def _shapes(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Reads name -> shape from the metadata of a file."""
    if "lap_ext" not in metadata or "layers" not in metadata:
        raise _not_masks(path, "it is a safetensors file of something else")
    if metadata.get("format") != FORMAT:
        version = metadata.get("format")
        raise _not_masks(path, f"its format is {version!r} and this lap_ext reads {FORMAT!r}")
    try:
        layers = json.loads(metadata["layers"])
    except (ValueError, RecursionError):
        layers = None
    if not isinstance(layers, dict) or not all(map(_is_shape, layers.values())):
        raise _not_masks(path, "its metadata is damaged")
    return {name: tuple(shape) for name, shape in layers.items()}


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        return False
    if not all(type(size) is int and 0 <= size < _MAX_WEIGHTS for size in shape):
        return False
    return _count(max(size, 1) for size in shape) < _MAX_WEIGHTS


def _count(shape: Any) -> int:
    """Multiplies the sizes, exactly."""
    count = 1
    for size in shape:
        count *= size
    return count
