# SPDX-License-Identifier: MIT
"""Atomic writes, bounded reads, strict JSON, headers of safetensors files, sizes such as "4GB"."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

from lap_ext.errors import LapFileNotFoundError, LapImportError, LapOSError, LapValueError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a new file that is renamed to path once it is complete and on the disk.

    An old file stays until then, and for good if anything fails. A link stays a link. What a killed
    process has left of a file of this name is removed.

    Raises:
        LapOSError: a directory, a pipe or a device has this name; nothing was written.
        LapFileNotFoundError: there is no directory for it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with replacing(Path(directory) / "note") as file:
        ...         _ = file.write(b"done")
        ...     (Path(directory) / "note").read_bytes()
        b'done'
    """
    _check_free(path, "a file, or none yet,", stat.S_ISREG, errno.EISDIR)
    given, path = path, Path(path).resolve()
    if not path.parent.is_dir():
        raise LapFileNotFoundError(
            f"a directory for the file {str(given)!r}",
            f"none at {str(path.parent)!r}",
            "Make it first, or correct the path.",
            number=errno.ENOENT,
        )
    with _beside(path, _new_file) as (temporary, descriptor):
        with open(descriptor, "wb", closefd=False) as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a temporary directory that is renamed to path once its files are on the disk.

    It is removed if anything fails, or else, after a kill, by the next call with this path.

    Raises:
        LapOSError: something other than a directory has this name; nothing was written.
    """
    _check_free(path, "a new or empty directory", stat.S_ISDIR, errno.ENOTDIR)
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path, _new_folder) as (temporary, _):
        yield temporary
        for file in temporary.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        temporary.rename(path)


@contextmanager
def set_aside(path: str | os.PathLike[str]) -> Iterator[None]:
    """Moves a directory to .NAME.previous while a new one of its name is made.

    It is removed once the new one is there, and moved back if there is none at the end. After a
    kill it stays where it is. A link stays a link.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     out = Path(root) / "out"
        ...     out.mkdir()
        ...     with set_aside(out):
        ...         before = out.exists()
        ...     before, out.exists()             # nothing was made, so that the old one is back
        (False, True)
    """
    real = Path(os.path.realpath(path))
    previous = real.with_name(f".{real.name}.previous")
    if previous.exists():
        got = "one that an earlier run has left"
        cure = "Move it back or remove it."
        raise LapOSError(f"no {str(previous)!r}", got, cure, number=errno.EEXIST)
    real.rename(previous)
    try:
        yield
    finally:
        if real.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(real)


def _check_free(
    path: str | os.PathLike[str], expected: str, fits: Callable[[int], bool], number: int
) -> None:
    """Raises unless nothing has this name, or something that fits."""
    try:  # before it is resolved: the name that /dev/stdout resolves to may lead nowhere
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    if not fits(mode):
        got = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise LapOSError(f"{expected} at {str(path)!r}", got, "Choose another name.", number=number)


@contextmanager
def _beside(path: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """Gives something new beside path, and its descriptor; it is removed after an error.

    Its writer holds a lock on it. Where that lock is free the writer is gone, and the next one
    removes it.
    """
    _remove_left(path)
    made = None
    while made is None:
        made = _locked(path.with_name(f".{path.name}.{secrets.token_hex(8)}.part"), make)
    temporary, descriptor = made
    try:
        yield temporary, descriptor
    except BaseException:
        with suppress(OSError):
            _remove(temporary, descriptor)
        raise
    finally:
        os.close(descriptor)


def _locked(temporary: Path, make: Callable[[Path], int]) -> tuple[Path, int] | None:
    """Makes a file or directory and locks it; None if it was taken away in between."""
    descriptor = make(temporary)
    with suppress(OSError):  # another process holds the lock, or this disk has none
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if _is_at(temporary, descriptor):
        return temporary, descriptor
    os.close(descriptor)
    return None


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK)


def _remove_left(path: Path) -> None:
    """Removes what writers that are gone have left beside path; whatever fails is left alone."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.part")
    with suppress(OSError):
        for other in [x for x in path.parent.iterdir() if ours.fullmatch(x.name)]:
            with suppress(OSError):
                _remove_unlocked(other)


def _remove_unlocked(path: Path) -> None:
    """Removes a file or directory of ours whose lock is free."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK)
    try:
        facts = os.fstat(descriptor)
        plain = stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)
        if plain and facts.st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path, descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path, descriptor: int) -> None:
    """Removes a file or directory that is open, unless it was renamed meanwhile."""
    if _is_at(path, descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_at(path: Path, descriptor: int) -> bool:
    """Tells whether path is the file or directory that is open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


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
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            got = _KINDS.get(stat.S_IFMT(facts.st_mode), "a device")
            raise LapValueError(f"a regular file {str(path)!r}", got)
        if facts.st_size > most:
            raise LapValueError(f"{str(path)!r} of {most:,} bytes at most", f"{facts.st_size:,}")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(facts.st_size + 1)  # read() allocates as much as it is asked for
    finally:
        os.close(descriptor)
    if len(data) > facts.st_size:
        raise LapValueError(f"{str(path)!r} not to change while it is read", "a longer file")
    return data


def parsed_json(text: str | bytes, most: int = 16_000_000, *, finite: bool = True) -> Any:
    """Parses JSON in which no key occurs twice in an object.

    Args:
        text: the JSON.
        most: characters that are allowed.
        finite: whether every number must be finite; transformers writes Infinity into configs.

    Raises:
        LapValueError: it is no such JSON, has more than most characters, or is nested too deeply.

    Example:
        >>> parsed_json('{"a": [1, 0.5]}')
        {'a': [1, 0.5]}
    """
    if len(text) > most:
        raise _no_json(f"{len(text):,} characters where {most:,} are allowed")

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise _no_json(f"{key[:50]!r} twice")
            result[key] = value
        return result

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise _no_json(f"the number {digits[:20]}")
        return value

    try:
        return json.loads(text, object_pairs_hook=table, parse_float=number, parse_constant=number)
    except LapValueError:
        raise
    except ValueError as error:
        raise _no_json(str(error)) from None
    except RecursionError:
        raise _no_json("one that is nested too deeply") from None


def _no_json(got: str) -> LapValueError:
    return LapValueError("JSON with finite numbers and every key once", got)


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
