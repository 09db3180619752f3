# SPDX-License-Identifier: MIT
"""Loads the native kernels of the package and reports what is loaded (`info`).

The reference kernels of schema.py serve every device; a native library only adds faster ones for
CPU or CUDA. If a library is missing, the reference is used, with one warning that says why and what
to do. A library that exists but does not load is an error, because a fallback would hide a broken
installation.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lap_ext import __version__
from lap_ext.errors import LapError, LapValueError, warn
from lap_ext.ops.missing import why

_CPU, _CUDA = "_C.abi3.so", "_C_cuda.abi3.so"
_PACKAGE = Path(__file__).parents[1]  # the directory of lap_ext


@dataclass(frozen=True)
class Info:
    """The kernels, versions and settings that lap_ext uses; str() gives one line per fact."""

    version: str
    torch: str  # version
    native: bool  # the CPU library is loaded
    isa: str | None  # its SIMD level: "baseline", "v3" (AVX2) or "v4" (AVX-512)
    cuda_built: bool  # the CUDA library is installed
    cuda_usable: bool  # and it is loaded: torch sees a CUDA device
    threads: int  # of torch, which the CPU kernels use
    fallback: str | None  # why pure PyTorch is in use somewhere
    cure: str | None = None  # what would change that

    def __str__(self) -> str:
        native = f"native, {self.isa}" if self.native else "pure PyTorch"
        cuda = "usable" if self.cuda_usable else "built" if self.cuda_built else "not built"
        lines = [
            f"lap_ext {self.version}, torch {self.torch}",
            f"CPU: {native}, threads: {self.threads}",
            f"CUDA kernels: {cuda}",
        ]
        lines += [f"fallback: {self.fallback}"] if self.fallback else []
        return "\n".join(lines + ([f"cure: {self.cure}"] if self.cure else []))


@dataclass
class _State:
    cpu: bool = False
    cuda: bool = False
    fallback: str | None = None
    cure: str | None = None


_state = _State()


def load() -> None:
    """Loads the installed, usable libraries; called once, after schema.py has defined operators."""
    if os.environ.get("LAP_EXT_NATIVE") == "0":
        _state.fallback, _state.cure = "LAP_EXT_NATIVE=0", "Unset LAP_EXT_NATIVE."
        return
    _state.cpu = _load(_CPU)
    if _state.cpu:
        _isa()
    if torch.cuda.is_available():
        _state.cuda = _load(_CUDA)


def _load(file: str) -> bool:
    path = _PACKAGE / file
    if not path.exists():
        reason, cure = why(file, _PACKAGE)
        if _state.fallback is None:  # without the library for CPUs, the reason for CUDA is the same
            what = "CUDA kernels" if file == _CUDA else "native library"
            _state.fallback, _state.cure = f"no {what}. {reason}", cure
            used = "pure PyTorch is used (slower, same results)"
            warn(f"lap_ext: no {what}, {used}. {reason} {cure}")
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"lap_ext: expected {path} to load, got: {error}. Reinstall lap_ext for this "
            "machine and torch, or set LAP_EXT_NATIVE=0 to use pure PyTorch."
        ) from error
    return True


def mistake(error: Exception) -> LapValueError | None:
    """Returns the parts of a user's mistake that a native kernel found; None for other errors.

    PyTorch's stable ABI carries only the text of an error, so the library keeps the parts of the
    last error of each thread.
    """
    if isinstance(error, LapError):
        return None
    for file, loaded in ((_CPU, _state.cpu), (_CUDA, _state.cuda)):
        if loaded:
            part = ctypes.CDLL(str(_PACKAGE / file)).lap_ext_mistake
            part.argtypes, part.restype = [ctypes.c_int], ctypes.c_char_p
            expected, got, cure, option, argument = (part(n).decode() for n in range(5))
            last = LapValueError(expected, got, cure, argument=argument or None, option=option)
            if expected and last.text() in str(error):  # it is this error, not an earlier one
                return last
    return None


def info() -> Info:
    """Reports native kernels, their SIMD level, CUDA, threads, versions and fallbacks.

    Returns:
        An `Info`; print it, or read its fields.

    Example:
        >>> import lap_ext
        >>> lap_ext.info().version == lap_ext.__version__
        True
    """
    return Info(
        version=__version__,
        torch=torch.__version__,
        native=_state.cpu,
        isa=_isa() if _state.cpu else None,
        cuda_built=(_PACKAGE / _CUDA).exists(),
        cuda_usable=_state.cuda,
        threads=torch.get_num_threads(),
        fallback=_state.fallback,
        cure=_state.cure,
    )


def _isa() -> str:
    level = ctypes.CDLL(str(_PACKAGE / _CPU)).lap_ext_isa
    level.argtypes, level.restype = [], ctypes.c_char_p
    name = level()
    if name is None:
        asked = os.environ.get("LAP_EXT_ISA")
        raise ImportError(
            f"lap_ext: expected LAP_EXT_ISA to be baseline, v3 or v4 and supported by this CPU, "
            f"got {asked!r}. Unset it to use the best level."
        )
    return name.decode()
