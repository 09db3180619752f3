# SPDX-License-Identifier: MIT
"""NumPy's side of the checks, the NumPy Backend of neighbors.py, and calls of the native module.

The twin of torch_args.py. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lap_ext.ops import check
from lap_ext.ops.neighbors import needs_check, norm_of, side_of

try:
    from lap_ext import _np
except ImportError as error:
    raise ImportError(
        "lap_ext.numpy: expected the native module lap_ext._np (there is no fallback for NumPy), "
        f"got: {error}. Build it with a C++ compiler at hand: "
        "LAP_EXT_BUILD=require pip install --no-build-isolation --force-reinstall lap_ext."
    ) from error

kernels: Any = _np  # compiled: no types

Array: TypeAlias = npt.NDArray[Any]
Mask: TypeAlias = npt.NDArray[np.bool_]


class NumpyBackend:
    """neighbors.Backend for NumPy arrays."""

    def __init__(self, function: str, check_finite: bool) -> None:
        self.function = function
        self.check_finite = check_finite

    def check_weight(self, name: str, x: Any) -> None:
        """Raises unless x is a floating array."""
        floating(self.function, name, x)

    def row_energy(self, x: Array, name: str) -> Array:
        """Sum of squares of each row of x [R, ...], float64 [R]."""
        return call(self.function, kernels.row_energy, x, self.check_finite, name)

    def col_energy(self, x: Array, groups: int, name: str) -> Array:
        """Sum of squares of each column of x [G * N, C, *K], float64 [G * C]."""
        return call(self.function, kernels.col_energy, x, groups, self.check_finite, name)

    def ones(self, n: int) -> Array:
        """Float64 ones [n]."""
        return np.ones(n)

    def as_float64(self, x: Any, name: str) -> Array:
        """A finite scale as float64, contiguous."""
        scale = np.ascontiguousarray(floating(self.function, name, x), dtype=np.float64)
        finite = np.isfinite(scale).ravel()
        if self.check_finite and not finite.all():
            at = int(finite.argmin())
            value = float(scale.ravel()[at])
            raise ValueError(check.not_finite_scale(self.function, name, value, at))
        return scale

    def repeat(self, x: Array, times: int) -> Array:
        """Each entry of x [n] repeated, [n * times]."""
        return np.repeat(x, times)

    def norm(self, energies: list[Array]) -> Array:
        """Square root of the sum of the energies [n], added in order."""
        total = energies[0]
        for energy in energies[1:]:
            total = total + energy
        return np.sqrt(total)


def norms(
    function: str,
    w_prev: Any,
    w: Array,
    w_next: Any,
    groups: int,
    transposed: bool,
    check_finite: bool,
) -> tuple[Array, Array]:
    """Float64 (in_norm [I], out_norm [O]) from the neighbors of w."""
    backend = NumpyBackend(function, check_finite)
    found = []
    for name, neighbors in (("w_prev", w_prev), ("w_next", w_next)):
        side = side_of(function, name, w.shape, groups, transposed)
        norm = norm_of(side, neighbors, backend)
        if check_finite and needs_check(neighbors) and not np.isfinite(norm).all():
            raise ValueError(check.lost_norm(function, name))
        found.append(norm)
    return found[0], found[1]


def given_norms(
    function: str,
    w: Array,
    in_norm: Array | None,
    out_norm: Array | None,
    groups: int,
    transposed: bool,
) -> tuple[Array, Array]:
    """Float64 (in_norm [I], out_norm [O]) from the factors a user passes; None gives ones."""
    floating(function, "w", w)
    counts = check.layer_channels(function, "w", w.shape, groups, transposed)
    found = []
    for name, x, n in zip(("in_norm", "out_norm"), (in_norm, out_norm), counts, strict=True):
        per = f"{'input' if name == 'in_norm' else 'output'} channel of w"
        values = np.ones(n) if x is None else floating(function, name, x)
        check.vector(function, name, values.shape, (n,), per)
        found.append(np.ascontiguousarray(values, dtype=np.float64))
    return found[0], found[1]


def floating(function: str, name: str, x: Any) -> Array:
    """X, if it is an array of one of the floating dtypes."""
    if not isinstance(x, np.ndarray):
        raise TypeError(
            f"{function}: expected {name} to be a numpy.ndarray, got {type(x).__name__}."
        )
    check.floating(function, name, x.dtype.name)
    if not x.dtype.isnative:
        raise TypeError(
            f"{function}: expected {name} in this machine's byte order, got {x.dtype.str}. "
            f"Pass {name}.astype({name}.dtype.newbyteorder('='))."
        )
    return x


def weight(function: str, w: Any, groups: int, transposed: bool) -> None:
    """W is a floating array with channels that fit groups."""
    check.layer_channels(function, "w", floating(function, "w", w).shape, groups, transposed)


def writable(function: str, w: Array) -> None:
    """The weight can be changed in place."""
    if not w.flags.writeable:
        raise ValueError(
            f"{function}: expected a writable w (it is changed in place), got a read-only array. "
            "Pass w.copy()."
        )
    check.writable(function, "w", w.shape, w.strides)


def eligible(function: str, name: str, mask: Any, like: str, w: Array) -> Mask | None:
    """Mask as a contiguous bool array, or None."""
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray):
        raise TypeError(
            f"{function}: expected {name} to be a numpy.ndarray, got {type(mask).__name__}."
        )
    check.mask_like(function, name, mask.dtype.name, mask.shape, like, w.shape)
    return np.ascontiguousarray(mask).reshape(mask.shape)  # ascontiguousarray makes 0-d 1-d


def score_list(function: str, scores: Any) -> tuple[bool, list[Array]]:
    """(whether scores is one array, its arrays)."""
    if not isinstance(scores, (list, tuple)):
        return True, [floating(function, "scores", scores)]
    checked = [floating(function, f"scores[{t}]", x) for t, x in enumerate(scores)]
    check.one_of_a_kind(function, "dtype", [x.dtype.name for x in checked])
    return False, checked


def mask_list(mask: Any, single: bool, scores: list[Array]) -> list[Mask]:
    """One contiguous mask per array of scores, or none."""
    if mask is None:
        return []
    if single:
        found = [eligible("topk_mask", "mask", mask, "scores", scores[0])]
    else:
        check.one_mask_each("topk_mask", mask, len(scores))
        found = [
            eligible("topk_mask", f"mask[{t}]", m, f"scores[{t}]", x)
            for t, (m, x) in enumerate(zip(mask, scores, strict=True))
        ]
    return [m for m in found if m is not None]


def call(function: str, kernel: Any, *args: object) -> Any:
    """Runs a kernel; the public function's name replaces the kernel's in errors."""
    try:
        return kernel(*args)
    except (ValueError, TypeError) as error:
        clean = check.renamed(function, error)
        if clean is None:
            raise
    raise clean
