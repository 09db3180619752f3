# SPDX-License-Identifier: MIT
"""What may happen while a model is built from a config that nobody has read.

    questions, network    refused to the thread that builds; an audit hook of Python sees both
    size                  a build stops once it has far more parts or elements than the files, and
                          a trace once it calls far more modules
    messages              what transformers logs meanwhile is not shown

Other threads of the process are left alone.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules import module as modules

from lap_ext.checkpoint.files import Checkpoint
from lap_ext.errors import LapOSError, LapValueError

_REFUSED = {
    "builtins.input": "no answer from standard input",
    "socket.connect": "no network",
    "socket.getaddrinfo": "no network",
}
# a model has fewer than 5 modules and parameters per stored tensor, and each element once or twice
_PARTS, _MORE_PARTS = 20, 2_000
_ELEMENTS, _MORE_ELEMENTS = 4, 1_000_000

_here = threading.local()


@contextmanager
def guarded(checkpoint: Checkpoint) -> Iterator[None]:
    """Guards the building of a model in this thread; other threads are left alone."""
    _install()
    count = _counter(checkpoint)
    handles = [
        modules.register_module_parameter_registration_hook(count),
        modules.register_module_module_registration_hook(count),
    ]
    handlers, quiet = logging.getLogger("transformers").handlers, _Quiet()
    for handler in handlers:
        handler.addFilter(quiet)
    _here.guarded = True
    try:
        yield
    finally:
        _here.guarded = False
        for handler in handlers:
            handler.removeFilter(quiet)
        for handle in handles:
            handle.remove()


@contextmanager
def counted_calls(checkpoint: Checkpoint) -> Iterator[None]:
    """Stops a trace in this thread that calls far more modules than the files have tensors.

    A layer may be stored once and called any number of times.
    """
    most, calls = _PARTS * len(checkpoint.entries) + _MORE_PARTS, 0
    thread = threading.get_ident()

    def count(_module: Any, _inputs: Any) -> None:
        nonlocal calls
        calls += threading.get_ident() == thread
        if calls > most:
            raise LapValueError(
                "a config.json of these weights",
                f"one of a model that calls more than {most:,} modules",
                "Is config.json that of these weights?",
            )

    handle = modules.register_module_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


class _Quiet(logging.Filter):
    """Drops the records of the thread that made it."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread


@functools.cache
def _install() -> None:
    """Adds the audit hook, which stays until the process ends."""

    def refuse(event: str, _: Any) -> None:
        if event in _REFUSED and getattr(_here, "guarded", False):
            raise LapOSError(f"a config.json that needs {_REFUSED[event]}")

    sys.addaudithook(refuse)


def _counter(checkpoint: Checkpoint) -> Any:
    """Makes the hook that counts what this thread adds to modules."""
    entries = checkpoint.entries.values()
    most_parts = _PARTS * len(entries) + _MORE_PARTS
    most_elements = _ELEMENTS * sum(entry.numel for entry in entries) + _MORE_ELEMENTS
    thread, parts, elements = threading.get_ident(), 0, 0

    def count(_module: Any, _name: str, part: Any) -> None:
        nonlocal parts, elements
        if part is None or threading.get_ident() != thread:
            return
        parts += 1
        elements += part.numel() if isinstance(part, Tensor) else 0
        if parts > most_parts or elements > most_elements:
            raise LapValueError(
                "a config.json of these weights",
                f"one of a model with more than {most_parts:,} parts or {most_elements:,} elements",
                "Is config.json that of these weights?",
            )

    return count
