# SPDX-License-Identifier: MIT
"""Atomic writes of files and directories, bounded reads, headers of safetensors files, sizes such as "4GB"."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

from lap_ext.errors import LapImportError, LapValueError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a new file that is renamed to path once it is complete and on the disk.

    An old file stays until then, and for good if anything fails. A link stays a link.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with replacing(Path(directory) / "note") as file:
        ...         _ = file.write(b"done")
        ...     (Path(directory) / "note").read_bytes()
        b'done'
    """
    path = Path(path).resolve()
    with _beside(path) as temporary:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a temporary directory that is renamed to path once its files are on the disk.

    It is removed if anything fails.
    """
    path = Path(path).resolve()
    with _beside(path) as temporary:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        temporary.rename(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside path; what has it is removed after an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield temporary
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def small_file(path: str | os.PathLike[str], most: int = 10_000_000) -> bytes:
    """Reads a regular file; one of another kind or of more than most bytes is refused unread.

    Raises:
        LapValueError: it is a directory, a pipe, a device, or too large.
        OSError: there is none, or it cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = (Path(directory) / "config.json").write_bytes(b"{}")
        ...     small_file(Path(directory) / "config.json")
        b'{}'
    """
    # a pipe without a writer would block open() itself
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise LapValueError(f"a regular file {str(path)!r}", "something else")
        if facts.st_size > most:
            raise LapValueError(f"{str(path)!r} of {most:,} bytes at most", f"{facts.st_size:,}")
        data = file.read(most + 1)
    if len(data) > most:  # it has grown meanwhile
        raise LapValueError(f"{str(path)!r} of {most:,} bytes at most", "more")
    return data


def safetensors_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]],
    metadata: Mapping[str, str],
) -> bytes:
    """Makes the header of a safetensors file: the length of its JSON table, and the table.

    Args:
        tensors: (name, dtype as the format spells it, shape, bytes), in the order of the file.
        metadata: texts about the file.

    Raises:
        ValueError: a name that the table cannot hold.

    Example:
        >>> header = safetensors_header([("a", "U8", [3], 3)], {})
        >>> int.from_bytes(header[:8], "little"), header[8:]
        (72, b'{"__metadata__":{},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}} ')
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, dtype, shape, size in tensors:
        if name in table:
            raise LapValueError(
                "layer names that a safetensors file can hold",
                repr(name),
                "Rename that parameter.",
            )
        offsets = [begin, begin + size]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        begin += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors
    return len(text).to_bytes(8, "little") + text


def safetensors_package(why: str) -> Any:
    """Imports the safetensors package; without it, the error says why it is needed."""
    try:
        import safetensors
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise LapImportError(
            f"the safetensors package ({why})",
            "none",
            "Run: pip install safetensors.",
            name="safetensors",
        ) from None
    return safetensors


def parsed_size(text: str) -> int | None:
    """Reads a number of bytes such as "4GB" (units of 10^9) or "512MiB" (units of 2^20).

    Returns:
        The bytes, rounded down; None if the text is no such number.

    Example:
        >>> parsed_size("4GB"), parsed_size("1.5 MiB"), parsed_size("1000"), parsed_size("4 apples")
        (4000000000, 1572864, 1000, None)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", text.upper())
    if match is None:
        return None
    base = 1024 if match[3] else 1000
    return int(Fraction(match[1]) * base ** _POWERS[match[2] or ""])
