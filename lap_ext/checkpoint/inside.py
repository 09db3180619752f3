# SPDX-License-Identifier: MIT
"""What of a checkpoint directory may be read: regular files that lie in it.

A link may lead to a file of the same directory, or to a blob of the hub's cache that the directory
is in (<repo>/snapshots/<revision>/name -> <repo>/blobs/<hash>). Any other link, and a pipe, a
socket or a device, is refused by name: its content, perhaps secret, would be copied into the
result. What was checked is opened by its real path, without following a link again, and is known by
its stamp from then on.
"""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from lap_ext.errors import LapValueError

HIDDEN = {".git", ".cache"}  # what git and the hub's downloader keep beside a checkpoint
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_DEEPEST = 64  # levels of directories
_FILES = {stat.S_IFREG, stat.S_IFDIR}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}


class Stamp(NamedTuple):
    """What changes when a file is written, renamed over or restored with its old time."""

    size: int
    mtime_ns: int
    ctime_ns: int  # no program can set it
    inode: int
    device: int

    @classmethod
    def of(cls, facts: os.stat_result) -> Stamp:
        """Takes it from the result of a stat."""
        return cls(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev)


def check(directory: Path) -> None:
    """Raises unless a directory holds regular files, few levels, and links that stay inside."""
    root = Path(os.path.realpath(directory))
    for folder, folders, names in os.walk(root):
        if len(Path(folder).relative_to(root).parts) > _DEEPEST:
            raise LapValueError(f"at most {_DEEPEST} levels in {str(directory)!r}", "more")
        folders[:] = [name for name in folders if name not in HIDDEN]
        for name in (*folders, *names):
            if name not in HIDDEN:
                _real(root, Path(folder, name), directory)


def real(directory: Path, inner: str | Path) -> Path:
    """Returns the real path of what has a name in a directory, if it may be read."""
    root = Path(os.path.realpath(directory))
    return _real(root, root / inner, directory)


def opened(path: Path, stamp: Stamp | None = None) -> FileIO:
    """Opens the regular file of a real path, unbuffered; with a stamp, only the file that has it.

    Raises:
        LapValueError: it is another file by now.
    """
    try:  # a pipe without a writer would block open() itself
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        raise changed(path.name) from None
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or (stamp is not None and Stamp.of(facts) != stamp):
        os.close(descriptor)
        raise changed(path.name)
    return FileIO(descriptor)


def changed(name: str) -> LapValueError:
    """Makes the error of a file that is another one than at the start."""
    return LapValueError(
        "files that do not change while they are read",
        f"another {name!r} than at the start",
        "Run it again when nothing writes to them.",
    )


def _real(root: Path, path: Path, directory: Path) -> Path:
    """Resolves a path in root, the real path of directory; raises unless it may be read."""
    target = Path(os.path.realpath(path))
    expected = f"a file {str(path.relative_to(root))!r} in {str(directory)!r}"
    if root not in (target, *target.parents) and target.parent != _blobs(root):
        raise LapValueError(
            expected,
            f"a link to {str(target)!r}",
            "Copy that file into the directory, or pass the directory that has the files.",
        )
    try:
        kind = stat.S_IFMT(target.lstat().st_mode)
    except FileNotFoundError:  # a link to nothing: not read either
        return target
    if kind not in _FILES and kind != stat.S_IFLNK:  # a link that resolves to a link is a circle
        raise LapValueError(expected, _SPECIAL.get(kind, "a device"), "Remove it.")
    return target


def _blobs(root: Path) -> Path | None:
    """Finds the real path of the blobs of the cache that root is a snapshot of, or lies in one."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            return folder.parent.parent / "blobs"
    return None
