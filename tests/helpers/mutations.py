# SPDX-License-Identifier: MIT
"""Files as hostile hands would leave them: changed bytes, changed JSON, other kinds of file."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SECONDS, BYTES = 10, 10**9  # what one file may cost
NUMBERS = [-1, 0, 1, 2, 3, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 0.5, 1e308, -0.0]
RAW = ["1e400", "NaN", "-Infinity", "1" * 5000, "[" * 3000 + "]" * 3000, '{"a":1,"a":2}', "\x00"]
TEXTS = ["", ".", "..", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "\u202e", "x" * 5000, "F32",
         "BF16", "F8_E4M3", "I64", "U8", "0.weight", "model.safetensors"]  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from([[], {}, [[]], [0], {"a": []}]),
)
_MARK = "@raw@"  # stands for a piece of JSON that json.dumps cannot write


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Changes a few bytes, or cuts, repeats or inserts a range."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(result)))
        end = min(len(result), at + draw(st.sampled_from([1, 1, 1, 2, 8, 64])))
        action = draw(st.sampled_from(["flip", "set", "cut", "repeat", "insert", "end"]))
        if action == "flip" and at < len(result):
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "set" and at < len(result):
            result[at] = draw(st.sampled_from([0, 1, 0x22, 0x7F, 0x80, 0xFF]))
        elif action == "cut":
            del result[at:end]
        elif action == "repeat":
            result[at:at] = result[at:end]
        elif action == "insert":
            result[at:at] = draw(st.binary(min_size=1, max_size=9))
        else:
            del result[at:]
    return bytes(result)


@st.composite
def changed_json(draw: st.DrawFn, text: bytes) -> bytes:
    """Replaces, removes, renames or repeats a part of a JSON document, or writes no JSON there."""
    document = {"": json.loads(text)}
    raw: list[str] = []
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(document))
        owner, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["value", "value", "raw", "remove", "rename", "other"]))
        if action == "value":
            owner[key] = copy.deepcopy(draw(VALUES))
        elif action == "raw":
            owner[key] = f"{_MARK}{len(raw)}{_MARK}"
            raw.append(draw(st.sampled_from(RAW)))
        elif action == "other":
            other, there = draw(st.sampled_from(places))
            owner[key] = copy.deepcopy(other[there])
        elif owner is not document:
            value = owner.pop(key)
            if action == "rename" and isinstance(owner, dict):
                owner[draw(st.sampled_from(TEXTS))] = value
        if not document[""]:
            break
    written = json.dumps(document[""], separators=(",", ":"))
    return re.sub(f'"{_MARK}(\\d+){_MARK}"', lambda x: raw[int(x[1])], written).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (owner, key or index) of each value in a document."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _places(node[key])


@st.composite
def changed_safetensors(draw: st.DrawFn, data: bytes) -> bytes:
    """Changes the table of a safetensors file, or any of its bytes."""
    if draw(st.booleans()):
        return draw(changed_bytes(data))
    end = 8 + int.from_bytes(data[:8], "little")
    table = draw(changed_json(data[8:end]))
    return len(table).to_bytes(8, "little") + table + data[end:]


@st.composite
def changed_kind(draw: st.DrawFn) -> Callable[[Path], None]:
    """Puts something else in place of a file."""
    return draw(st.sampled_from([_missing, _empty, _directory, _pipe, _device, _sparse, _link]))


def _missing(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    os.truncate(path, 3 * 10**9)


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)  # to itself


def change(data: st.DataObject, path: Path, text: bool = False) -> None:
    """Changes one file: its bytes or its table, mostly, or its kind.

    text: whether it is JSON; otherwise it is a safetensors file.
    """
    if data.draw(st.integers(0, 9), label="kind") == 0:
        data.draw(changed_kind(), label="change")(path)
        return
    old = path.read_bytes()
    kinds = [changed_json(old), changed_bytes(old)] if text else [changed_safetensors(old)]
    path.write_bytes(data.draw(st.one_of(kinds), label="bytes"))


def clear(target: Path) -> None:
    """Removes a directory and what a run has left beside it."""
    for path in [target, *target.parent.glob(f".{target.name}.*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def fresh(base: Path, target: Path) -> Path:
    """Copies a directory to a new place."""
    clear(target)
    return Path(shutil.copytree(base, target, symlinks=True))


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TimeoutError after SECONDS, and MemoryError where BYTES more are asked for."""

    def stop(_number: int, _frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    # what is written to; a file that is mapped to be read takes no memory of its own
    size = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (size + BYTES, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
