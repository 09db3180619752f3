# SPDX-License-Identifier: MIT
"""The working directory: made by us, closed to others, for one process at a time.

What somebody has planted under one of its names (a link, a pipe, a file of another user) is an
error that names it; nothing in it is followed, opened or removed. From then on no other user can
reach into it, so that its files may be opened by name. The directory that it is in is the user's
choice: whoever may rename things there can take the whole output away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from lap_ext.errors import LapOSError, LapValueError

_LOCK = "lock"
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_CURE = "Remove it, or choose another name."


def hold(directory: Path, out: Path, names: Collection[str]) -> int:
    """Makes a working directory, or takes one of ours, and locks it.

    Args:
        directory: its path.
        out: what is written in it, for the error.
        names: what an earlier run may have left in it.

    Returns:
        The descriptor of the lock; to close it ends the lock.

    Raises:
        LapValueError: the directory is not ours, or holds something else.
        LapOSError: another process holds the lock.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        new = _make(directory)
        with suppress(FileNotFoundError):  # a run that ends right now removes it
            owner = _owner(directory, new)
            _check_left(directory, owner, {*names, _LOCK})
            lock = os.open(directory / _LOCK, flags, 0o600)
            try:
                _take(lock, out)
                if os.path.samestat((directory / _LOCK).lstat(), os.fstat(lock)):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def _make(directory: Path) -> bool:
    """Makes the directory; False if there is something."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _owner(directory: Path, new: bool) -> int:
    """Checks that the directory is ours, and closes it to others; returns whose its files are."""
    expected = f"a working directory {str(directory)!r} of your own"
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory, flags)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise LapValueError(expected, _kind(directory.lstat()), _CURE) from None
    try:
        facts = os.fstat(descriptor)
        if not new and facts.st_uid != os.geteuid():
            raise LapValueError(expected, "somebody else's", _CURE)
        if facts.st_mode & 0o077:
            with suppress(OSError):  # a disk without permissions
                os.fchmod(descriptor, 0o700)
        return facts.st_uid  # not always ours: a server may squash it
    finally:
        os.close(descriptor)


def _check_left(directory: Path, owner: int, names: Collection[str]) -> None:
    """Raises unless the directory holds only files and directories that a run may have left."""
    for path in sorted(directory.iterdir()):
        try:
            facts = path.lstat()
        except FileNotFoundError:  # another run is at work
            continue
        got = "" if path.name in names else path.name
        if stat.S_IFMT(facts.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            got = f"{path.name} ({_kind(facts)})"
        elif facts.st_uid != owner:
            got = f"{path.name} (somebody else's)"
        elif path.name == _LOCK and not stat.S_ISREG(facts.st_mode):
            got = f"{path.name} (a directory)"
        if got:
            expected = f"nothing but an earlier run's files in {str(directory)!r}"
            raise LapValueError(expected, got, _CURE)


def _kind(facts: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(facts.st_mode), "a device")


def _take(lock: int, out: Path) -> None:
    """Locks a file, or raises LapOSError."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise LapOSError(
            f"one process at a time that writes {str(out)!r}",
            "another one at work",
            "Wait for it, or choose another name.",
            number=error.errno,
        ) from None


def remove(directory: Path) -> None:
    """Removes a working directory whose lock is held; what cannot be removed stays.

    The lock goes last: as soon as it is gone, another run may begin.
    """
    for path in directory.iterdir():
        if path.name != _LOCK:
            delete(path)
    with suppress(OSError):
        (directory / _LOCK).unlink()
        directory.rmdir()


def leave(directory: Path) -> None:
    """Leaves a working directory as it is, and removes it if there is nothing in it."""
    if [path.name for path in directory.iterdir()] == [_LOCK]:
        remove(directory)


def delete(path: Path) -> None:
    """Removes a file, a link or a directory, if there is one; what a link leads to stays."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
