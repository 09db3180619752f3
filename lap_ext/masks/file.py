# SPDX-License-Identifier: MIT
"""Masks in a safetensors file: one bit per weight, never pickle.

    one uint8 tensor per layer, ceil(n / 8) bytes: bit b of byte i is weight 8 * i + b, in C order;
    the bits after the last weight are 0
    metadata: {"lap_ext": version, "format": "1", "layers": JSON object of name -> shape, in order}

The file is written here (a length, a JSON header, the bytes): the same masks give the same bytes,
which the safetensors package does not promise, and nothing but torch is needed. It is read by that
package, which checks what it reads; BitMasks reads one mask at a time, or a part of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lap_ext import __version__
from lap_ext._files import replacing, safetensors_header, safetensors_package

FORMAT = "1"
_MAX_DIMS = 64  # torch's own limit for most of its operations
_MAX_WEIGHTS = 1 << 62


def save(function: str, path: str | os.PathLike[str], masks: Mapping[str, Tensor]) -> None:
    """Writes beside path and renames: path holds the old file or the new one, never a part."""
    head = header(function, masks)
    with replacing(path) as file:
        file.write(head)
        for mask in masks.values():
            file.write(_bytes(pack(mask)))


def load(function: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks of a file on the CPU, in their order; ValueError if it is no such file."""
    with BitMasks(path, function) as file:
        return {name: file.whole(name) for name in file.shapes}


class BitMasks:
    """Masks of a file, read when they are asked for; open in `with`.

    Attributes:
        shapes: layer name -> shape, in the order in which they were saved.

    Raises:
        ValueError: the file is damaged or of something else.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save("save", Path(folder) / "masks", {"fc": torch.tensor([[True, False, True]])})
        ...     with BitMasks(Path(folder) / "masks") as masks:
        ...         masks.shapes, masks.whole("fc"), masks.part("fc", 1, 2)
        ({'fc': (1, 3)}, tensor([[ True, False,  True]]), tensor([False,  True]))
    """

    def __init__(self, path: str | os.PathLike[str], function: str = "masks") -> None:
        self.path = Path(path)
        self.function = function
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> BitMasks:
        package = safetensors_package(self.function, "it reads the file")
        self._broken: type[Exception] = package.SafetensorError
        if self.path.is_dir():
            raise IsADirectoryError(
                f"{self.function}: expected a file, got the directory {str(self.path)!r}."
            )
        with self._told():
            self._file: Any = package.safe_open(self.path, framework="pt").__enter__()
            self.shapes = _shapes(self._file.metadata() or {})
            if set(self._file.keys()) != set(self.shapes):
                raise _FileError("its tensors are not those its metadata lists")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def whole(self, name: str) -> Tensor:
        """The mask of a layer, in its shape."""
        count = _count(self.shapes[name])
        packed = self._bits(name)[:]
        with self._told():
            if count % 8 and int(packed[-1]) >> count % 8:
                raise _FileError(f"{name!r} has bits after its last weight")
        return unpack(packed, self.shapes[name])

    def part(self, name: str, begin: int, count: int) -> Tensor:
        """Whether weights [begin, begin + count) of a layer are kept, flat."""
        first = begin // 8
        packed = self._bits(name)[first : (begin + count + 7) // 8]
        flat = unpack(packed, (packed.numel() * 8,))
        return flat[begin - 8 * first : begin - 8 * first + count]

    def _bits(self, name: str) -> Any:
        """What is stored; nothing is allocated before its size is known to be that of the bits."""
        stored, shape = self._file.get_slice(name), self.shapes[name]
        with self._told():
            if stored.get_dtype() != "U8" or list(stored.get_shape()) != [(_count(shape) + 7) // 8]:
                raise _FileError(f"the bits of {name!r} do not fit its shape {list(shape)}")
        return stored

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What is wrong with the file, as one ValueError."""
        try:
            yield
        except (_FileError, self._broken) as error:
            raise ValueError(
                f"{self.function}: expected a file written by Masks.save, got "
                f"{str(self.path)!r}: {error}."
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


def header(function: str, masks: Mapping[str, Tensor]) -> bytes:
    """What a file of masks begins with; only shapes are looked at."""
    layers = {name: list(mask.shape) for name, mask in masks.items()}
    sizes = {name: (mask.numel() + 7) // 8 for name, mask in masks.items()}
    metadata = {
        "format": FORMAT,
        "lap_ext": __version__,
        "layers": json.dumps(layers, separators=(",", ":"), ensure_ascii=False),
    }
    tensors = ((name, "U8", [size], size) for name, size in sizes.items())
    return safetensors_header(function, tensors, metadata)


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


def _count(shape: Any) -> int:
    """Product of the sizes, exactly."""
    count = 1
    for size in shape:
        count *= size
    return count
