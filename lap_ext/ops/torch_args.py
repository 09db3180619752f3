# SPDX-License-Identifier: MIT
"""PyTorch's side of the checks, and the torch Backend of neighbors.py.

Everything here can be traced: dtypes and devices become text only once an error is certain.
Results never require grad: every tensor is detached on its way to an operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lap_ext.ops import check, schema
from lap_ext.ops.neighbors import needs_check, norm_of, side_of

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def floating(function: str, name: str, x: Any) -> Tensor:
    """X as a detached tensor, strided, of one of the four floating dtypes."""
    _tensor(function, name, x)
    if x.dtype not in _FLOATS:
        check.floating(function, name, str(x.dtype))
    return x.detach()


def weight(function: str, w: Any, groups: int, transposed: bool) -> Tensor:
    """W as floating() gives it, with channels that fit groups."""
    w = floating(function, "w", w)
    check.layer_channels(function, "w", tuple(w.shape), groups, transposed)
    return w


def writable(function: str, w: Tensor) -> None:
    """The weight can be changed in place."""
    check.writable(function, "w", tuple(w.shape), w.stride())


def mark_changed(w: Tensor) -> None:
    """Tells autograd that w was changed in place: operators do not, and gradients would go wrong."""
    if not torch.compiler.is_compiling() and not w.is_inference():
        torch.autograd.graph.increment_version(w)


def eligible(function: str, name: str, mask: Any, like: str, w: Tensor) -> Tensor | None:
    """Mask as a contiguous bool tensor beside w, or None."""
    if mask is None:
        return None
    _tensor(function, name, mask)
    if mask.dtype != torch.bool or mask.shape != w.shape:
        shapes = tuple(mask.shape), like, tuple(w.shape)
        check.mask_like(function, name, str(mask.dtype), *shapes)
    _beside(function, name, mask, like, w)
    return mask.detach().contiguous()


def factor(function: str, name: str, x: Any, n: int, per: str, w: Tensor) -> Tensor:
    """A user's factor as float64 [n]; None gives ones."""
    if x is None:
        return torch.ones(n, dtype=torch.float64, device=w.device)
    x = floating(function, name, x)
    check.vector(function, name, tuple(x.shape), (n,), per)
    _beside(function, name, x, "w", w)
    return x.to(torch.float64).contiguous()


def given_norms(
    function: str, w: Tensor, in_norm: Any, out_norm: Any, groups: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Float64 (in_norm [I], out_norm [O]) from the factors a user passes."""
    into, out = check.layer_channels(function, "w", tuple(w.shape), groups, transposed)
    return (
        factor(function, "in_norm", in_norm, into, "input channel of w", w),
        factor(function, "out_norm", out_norm, out, "output channel of w", w),
    )


def norms(
    function: str,
    w_prev: Any,
    w: Tensor,
    w_next: Any,
    groups: int,
    transposed: bool,
    check_finite: bool,
) -> tuple[Tensor, Tensor]:
    """Float64 (in_norm [I], out_norm [O]) from the neighbors of w."""
    backend = TorchBackend(function, w, check_finite)
    found = []
    for name, neighbors in (("w_prev", w_prev), ("w_next", w_next)):
        side = side_of(function, name, tuple(w.shape), groups, transposed)
        norm = norm_of(side, neighbors, backend)
        if check_finite and needs_check(neighbors) and _not_finite(norm):
            raise ValueError(check.lost_norm(function, name))
        found.append(norm)
    return found[0], found[1]


class TorchBackend:
    """neighbors.Backend for tensors on the device of w."""

    def __init__(self, function: str, w: Tensor, check_finite: bool) -> None:
        self.function = function
        self.w = w
        self.check_finite = check_finite

    def check_weight(self, name: str, x: Any) -> None:
        """Raises unless x is a floating tensor on the device of w."""
        _beside(self.function, name, floating(self.function, name, x), "w", self.w)

    def row_energy(self, x: Tensor, name: str) -> Tensor:
        """Sum of squares of each row of x [R, ...], float64 [R]."""
        return schema.call(self.function, schema.row_energy, x.detach(), self.check_finite, name)

    def col_energy(self, x: Tensor, groups: int, name: str) -> Tensor:
        """Sum of squares of each column of x [G * N, C, *K], float64 [G * C]."""
        return schema.call(
            self.function, schema.col_energy, x.detach(), groups, self.check_finite, name
        )

    def ones(self, n: int) -> Tensor:
        """Float64 ones [n]."""
        return torch.ones(n, dtype=torch.float64, device=self.w.device)

    def as_float64(self, x: Any, name: str) -> Tensor:
        """A finite scale as float64, contiguous."""
        x = floating(self.function, name, x)
        _beside(self.function, name, x, "w", self.w)
        scale = x.to(torch.float64).contiguous()
        if self.check_finite and _not_finite(scale):
            at = int(scale.flatten().isfinite().to(torch.uint8).argmin())
            value = float(scale.flatten()[at])
            raise ValueError(check.not_finite_scale(self.function, name, value, at))
        return scale

    def repeat(self, x: Tensor, times: int) -> Tensor:
        """Each entry of x [n] repeated, [n * times]."""
        return x.repeat_interleave(times)

    def norm(self, energies: list[Tensor]) -> Tensor:
        """Square root of the sum of the energies [n], added in order."""
        return schema.norm(energies)


def _not_finite(x: Tensor) -> bool:
    """Whether an entry is inf or NaN, where that can be seen: not while tracing, not on meta."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    return not bool(x.isfinite().all())


def _tensor(function: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        hint = " Use lap_ext.numpy for NumPy arrays." if type(x).__name__ == "ndarray" else ""
        raise TypeError(
            f"{function}: expected {name} to be a torch.Tensor, got {type(x).__name__}.{hint}"
        )
    if x.layout != torch.strided:
        raise TypeError(
            f"{function}: expected a dense {name}, got layout {x.layout}. Pass {name}.to_dense()."
        )


def _beside(function: str, name: str, x: Tensor, w_name: str, w: Tensor) -> None:
    if x.device != w.device:
        check.same_device(function, name, str(x.device), w_name, str(w.device))
