# SPDX-License-Identifier: MIT
"""Writes and reads masks in a safetensors file, with one bit per weight and without pickle.

    one uint8 tensor of ceil(n / 8) bytes for each layer of n weights; bit b of byte i is weight
    8 * i + b in C order; the bits after the last weight are 0
    metadata: {"lap_ext": version, "format": "2", "layers": JSON object of name -> shape, in order,
    "checksums": JSON object of name -> checksum}, and "structure" if the masks have one
    checksum: BLAKE2b with 16 bytes, of the JSON of [name, shape], or [name, shape, structure], and
    the bytes of the tensor

A layer is compared with its checksum when it is first read, so that a damaged mask is an error and
no other mask.

This module itself writes the file (a length, a JSON header, the bytes). So the same masks give the
same bytes, which the safetensors package does not guarantee, and only torch is needed. That package
reads the file and checks what it reads; BitMasks reads one mask, or a chunk of one, at a time.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lap_ext import __version__
from lap_ext._files import parsed_json, replacing, safetensors_header, safetensors_package
from lap_ext._text import did_you_mean
from lap_ext.errors import LapFileNotFoundError, LapOSError, LapTypeError, LapValueError
from lap_ext.structures import LONGEST as LONGEST_STRUCTURE
from lap_ext.structures import spelled

FORMAT = "2"
CHUNK = 1 << 20  # bytes of a mask that are hashed together
_LONGEST = 16_000_000  # characters of the names and shapes, or of the checksums
_WRITTEN = "a file written by Masks.save"
_MAX_DIMS = 64  # torch's own limit for most of its operations
_MAX_WEIGHTS = 1 << 62


def save(
    path: str | os.PathLike[str], masks: Mapping[str, Tensor], structure: str | None = None
) -> None:
    """Writes masks to a file atomically: at any time, path holds the old file or the new one."""
    head, sums = header(masks, structure=structure), {}
    with replacing(_checked(path)) as file:
        file.write(head)
        for name, mask in masks.items():
            data = _bytes(pack(mask))
            sums[name] = checksum(name, mask.shape, [data], structure)
            file.write(data)
        file.seek(0)
        file.write(header(masks, sums, structure))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None]:
    """Reads the masks of a file to the CPU, in the order in which they were saved; the structure.

    Raises:
        LapTypeError: path is not a path.
        LapOSError: there is no such file.
        LapValueError: the file is damaged or does not contain masks.
    """
    with BitMasks(path) as file:
        return {name: file.mask(name) for name in file.shapes}, file.structure


class BitMasks:
    """The masks of a file, each of which is read when requested; open it in a `with` statement.

    Attributes:
        shapes: the shape of each layer by name, in the order in which the masks were saved.
        structure: that of the masks, or None.

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
        self.path = _checked(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.structure: str | None = None
        self._unchecked: dict[str, str] = {}  # name -> checksum

    def __enter__(self) -> BitMasks:
        package = safetensors_package("it reads the file")
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError:
            raise _no_file(self.path) from None
        if stat.S_ISDIR(mode):
            raise LapOSError(
                _WRITTEN,
                f"the directory {str(self.path)!r}",
                "Pass the file in it.",
                number=errno.EISDIR,
            )
        if not stat.S_ISREG(mode):  # to open a pipe would wait for its writer
            raise _not_masks(self.path, "it is a pipe or a device")
        try:
            self._file: Any = package.safe_open(self.path, framework="pt").__enter__()
        except package.SafetensorError as error:
            raise _not_masks(self.path, str(error)) from None
        metadata = self._file.metadata() or {}
        self.shapes, self._unchecked = _tables(self.path, metadata)
        self.structure = _structure(self.path, metadata)
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
        """Opens what is stored of a mask, once its size and its checksum are found right."""
        stored, shape = self._file.get_slice(name), self.shapes[name]
        size = (_count(shape) + 7) // 8
        if stored.get_dtype() != "U8" or list(stored.get_shape()) != [size]:
            raise _not_masks(self.path, f"the bits of {name!r} do not fit its shape {list(shape)}")
        if name in self._unchecked:
            chunks = (_bytes(stored[begin : begin + CHUNK]) for begin in range(0, size, CHUNK))
            if checksum(name, shape, chunks, self.structure) != self._unchecked[name]:
                raise _not_masks(
                    self.path,
                    f"the mask of {name!r} does not match its checksum",
                    "Copy it again, or prune again.",
                )
            del self._unchecked[name]
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


def _checked(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise LapTypeError("{argument} to be a str or a Path", type(path).__name__, argument="path")
    return Path(path)


def _no_file(path: Path) -> LapFileNotFoundError:
    """Makes the error of a file that is not there."""
    near: list[str] = []
    with suppress(OSError):
        near = [x.name for x in path.parent.iterdir()]
    cure = did_you_mean(path.name, near) or "Check the path."
    return LapFileNotFoundError(_WRITTEN, f"nothing at {str(path)!r}", cure, number=errno.ENOENT)


def _not_masks(path: Path, problem: str, cure: str = "") -> LapValueError:
    """Makes the error of a file that does not hold masks."""
    return LapValueError(_WRITTEN, f"{str(path)!r}: {problem}", cure)


def checksum(
    name: str,
    shape: Iterable[int],
    chunks: Iterable[bytes | bytearray],
    structure: str | None = None,
) -> str:
    """Hashes a layer's name, its shape and the packed bits of its mask.

    Args:
        name: of the layer.
        shape: of its weight.
        chunks: the packed bits, in any number of parts.
        structure: of the masks; without one, the checksum is that of files that know none.

    Example:
        >>> checksum("fc", (2, 3), [b"%"]) == checksum("fc", (2, 3), [b"", b"%"])
        True
    """
    facts = [name, list(shape), *([] if structure is None else [structure])]
    digest = blake2b(json.dumps(facts).encode(), digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def header(
    masks: Mapping[str, Tensor],
    checksums: Mapping[str, str] | None = None,
    structure: str | None = None,
) -> bytes:
    """Makes the header of a file of masks.

    Args:
        masks: only their shapes matter.
        checksums: of the layers, in the same order. With None, zeros take their place: the header
            is as long as it will be.
        structure: of the masks, or None.
    """
    sizes = {name: (mask.numel() + 7) // 8 for name, mask in masks.items()}
    metadata = {
        "format": FORMAT,
        "lap_ext": __version__,
        "layers": _json({name: list(mask.shape) for name, mask in masks.items()}),
        "checksums": _json(dict.fromkeys(masks, "0" * 32) if checksums is None else checksums),
    }
    if structure is not None:
        metadata["structure"] = structure
    longest = max(map(len, metadata.values()))
    if longest > _LONGEST:
        raise LapValueError(
            f"names of layers that take {_LONGEST:,} characters at most", f"{longest:,}"
        )
    tensors = ((name, "U8", [size], size) for name, size in sizes.items())
    return safetensors_header(tensors, metadata)


def _json(table: Mapping[str, object]) -> str:
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False)


def _tables(
    path: Path, metadata: Mapping[str, str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Reads name -> shape and name -> checksum from the metadata of a file."""
    version = metadata.get("format")
    if "lap_ext" in metadata and "layers" in metadata and version != FORMAT:
        raise _not_masks(
            path,
            f"its format is {version!r} and this lap_ext reads {FORMAT!r}",
            f"Prune again, or read it with lap_ext {metadata['lap_ext']}, which wrote it.",
        )
    if not {"lap_ext", "layers", "checksums"} <= metadata.keys():
        raise _not_masks(path, "it is a safetensors file of something else")
    try:
        shapes = parsed_json(metadata["layers"], _LONGEST)
        sums = parsed_json(metadata["checksums"], _LONGEST)
    except LapValueError as error:
        raise _not_masks(path, f"its metadata is damaged ({error.got})") from None
    if not (
        isinstance(shapes, dict)
        and isinstance(sums, dict)
        and shapes.keys() == sums.keys()
        and all(map(_is_shape, shapes.values()))
        and all(isinstance(x, str) for x in sums.values())
    ):
        raise _not_masks(path, "its metadata is damaged")
    return {name: tuple(shape) for name, shape in shapes.items()}, sums


def _structure(path: Path, metadata: Mapping[str, str]) -> str | None:
    """Reads the structure of the masks; None where a file has none, as older ones."""
    text = metadata.get("structure")
    if text is None:
        return None
    try:
        known = len(text) <= LONGEST_STRUCTURE and spelled(text) == text
    except LapValueError:
        known = False
    if not known:
        got = f"its structure is {text[:20]!r}, which this lap_ext does not know"
        raise _not_masks(path, got)
    return text


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
