# SPDX-License-Identifier: MIT
"""NumPy's side of the checks, the NumPy Backend of neighbors.py, and the native module.

The counterpart of torch_args.py. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lap_ext.errors import LapImportError, LapTypeError, LapValueError, calling
from lap_ext.ops import check
from lap_ext.ops.missing import REINSTALL, why
from lap_ext.ops.neighbors import needs_check, norm_of, side_of

_NATIVE = "lap_ext._np"


@calling("lap_ext.numpy")
def _loaded() -> Any:
    """Imports the native module, which is compiled and has no types."""
    try:
        return importlib.import_module(_NATIVE)
    except ImportError as error:
        there = error.name != _NATIVE  # and does not load
        reason, cure = (error, REINSTALL) if there else why("_np", Path(__file__).parents[1])
        raise LapImportError(
            f"the native module {_NATIVE} (there is no fallback for NumPy)",
            reason,
            cure,
            name=_NATIVE,
        ) from error


kernels = _loaded()

Array: TypeAlias = npt.NDArray[Any]
Mask: TypeAlias = npt.NDArray[np.bool_]


class NumpyBackend:
    """neighbors.Backend for NumPy arrays."""

    def __init__(self, check_finite: bool) -> None:
        self.check_finite = check_finite

    def check_weight(self, name: str, x: Any) -> None:
        """Raises unless x is a floating array."""
        floating(name, x)

    def row_squared_norms(self, x: Array, name: str) -> Array:
        """Sums the squares of each row of x [R, ...], float64 [R]."""
        return kernels.row_squared_norms(x, self.check_finite, name)

    def col_squared_norms(self, x: Array, groups: int, name: str) -> Array:
        """Sums the squares of each column of x [G * N, C, *K], float64 [G * C]."""
        return kernels.col_squared_norms(x, groups, self.check_finite, name)

    def ones(self, n: int) -> Array:
        """Makes float64 ones [n]."""
        return np.ones(n)

    def as_float64(self, x: Any, name: str) -> Array:
        """Returns a finite scale as float64, contiguous."""
        scale = np.ascontiguousarray(floating(name, x), dtype=np.float64)
        finite = np.isfinite(scale).ravel()
        if self.check_finite and not finite.all():
            index = int(finite.argmin())
            raise check.not_finite_scale(name, float(scale.ravel()[index]), index)
        return scale

    def repeat(self, x: Array, times: int) -> Array:
        """Repeats each entry of x [n], [n * times]."""
        return np.repeat(x, times)

    def norm(self, squared_norms: list[Array]) -> Array:
        """Takes the square root of the sum of the squared norms [n], added in order."""
        total = squared_norms[0]
        for squared_norm in squared_norms[1:]:
            total = total + squared_norm
        return np.sqrt(total)


def norms(
    w_prev: Any,
    w: Array,
    w_next: Any,
    groups: int,
    transposed: bool,
    check_finite: bool,
) -> tuple[Array, Array]:
    """Computes float64 (in_norm [I], out_norm [O]) from the neighbors of w."""
    backend = NumpyBackend(check_finite)
    both = []
    for name, neighbors in (("w_prev", w_prev), ("w_next", w_next)):
        side = side_of(name, w.shape, groups, transposed)
        norm = norm_of(side, neighbors, backend)
        if check_finite and needs_check(neighbors) and not np.isfinite(norm).all():
            raise check.lost_norm(name)
        both.append(norm)
    return both[0], both[1]


def given_norms(
    w: Array,
    in_norm: Array | None,
    out_norm: Array | None,
    groups: int,
    transposed: bool,
) -> tuple[Array, Array]:
    """Checks the norms that the user gives; returns float64 (in_norm [I], out_norm [O])."""
    floating("w", w)
    counts = check.layer_channels("w", w.shape, groups, transposed)
    both = []
    for name, x, n in zip(("in_norm", "out_norm"), (in_norm, out_norm), counts, strict=True):
        per = f"{'input' if name == 'in_norm' else 'output'} channel of w"
        values = np.ones(n) if x is None else floating(name, x)
        check.vector(name, values.shape, (n,), per)
        both.append(np.ascontiguousarray(values, dtype=np.float64))
    return both[0], both[1]


def floating(name: str, x: Any) -> Array:
    """Checks that x is an array of one of the floating dtypes; returns it."""
    if not isinstance(x, np.ndarray):
        raise LapTypeError("{argument} to be a numpy.ndarray", type(x).__name__, argument=name)
    check.floating(name, x.dtype.name)
    if not x.dtype.isnative:
        raise LapTypeError(
            "{argument} in this machine's byte order",
            x.dtype.str,
            "Pass {argument}.astype({argument}.dtype.newbyteorder('=')).",
            argument=name,
        )
    return x


def weight(w: Any, groups: int, transposed: bool) -> None:
    """Checks that w is a floating array whose channels fit groups."""
    check.layer_channels("w", floating("w", w).shape, groups, transposed)


def writable(w: Array) -> None:
    """Checks that w can be changed in place."""
    if not w.flags.writeable:
        raise LapValueError(
            "a writable {argument} (it is changed in place)",
            "a read-only array",
            "Pass {argument}.copy().",
            argument="w",
        )
    check.writable("w", w.shape, w.strides)


def eligible(name: str, mask: Any, like: str, w: Array) -> Mask | None:
    """Checks a mask of w; returns it as a contiguous bool array, or None if there is no mask."""
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray):
        raise LapTypeError("{argument} to be a numpy.ndarray", type(mask).__name__, argument=name)
    check.mask_like(name, mask.dtype.name, mask.shape, like, w.shape)
    return np.ascontiguousarray(mask).reshape(mask.shape)  # ascontiguousarray makes 0-d 1-d


def score_list(scores: Any) -> tuple[bool, list[Array]]:
    """Checks scores; returns (whether scores is a single array, the list of arrays)."""
    if not isinstance(scores, (list, tuple)):
        return True, [floating("scores", scores)]
    checked = [floating(f"scores[{t}]", x) for t, x in enumerate(scores)]
    check.one_of_a_kind("dtype", [x.dtype.name for x in checked])
    return False, checked


def mask_list(mask: Any, single: bool, scores: list[Array]) -> list[Mask]:
    """Checks masks of scores; returns one contiguous mask per array of scores, or none."""
    if mask is None:
        return []
    if single:
        masks = [eligible("mask", mask, "scores", scores[0])]
    else:
        check.one_mask_each(mask, len(scores))
        masks = [
            eligible(f"mask[{t}]", m, f"scores[{t}]", x)
            for t, (m, x) in enumerate(zip(mask, scores, strict=True))
        ]
    return [m for m in masks if m is not None]
