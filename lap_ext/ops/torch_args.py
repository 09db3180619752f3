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

from lap_ext.errors import LapTypeError
from lap_ext.ops import check, schema
from lap_ext.ops.neighbors import needs_check, norm_of, side_of

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def floating(name: str, x: Any) -> Tensor:
    """Checks that x is a strided tensor of one of the four floating dtypes; returns it detached."""
    _tensor(name, x)
    if x.dtype not in _FLOATS:
        check.floating(name, str(x.dtype))
    return x.detach()


def weight(w: Any, groups: int, transposed: bool) -> Tensor:
    """Checks that w is a floating-point tensor with channels divisible by groups; detaches it."""
    w = floating("w", w)
    check.layer_channels("w", tuple(w.shape), groups, transposed)
    return w


def writable(w: Tensor) -> None:
    """Checks that w can be changed in place."""
    check.writable("w", tuple(w.shape), w.stride())


def mark_changed(w: Tensor) -> None:
    """Tells autograd that w was changed in place: operators do not, gradients would be wrong."""
    if not torch.compiler.is_compiling() and not w.is_inference():
        torch.autograd.graph.increment_version(w)


def eligible(name: str, mask: Any, like: str, w: Tensor) -> Tensor | None:
    """Checks a mask of w; returns it as a contiguous bool tensor on w's device, or None."""
    if mask is None:
        return None
    _tensor(name, mask)
    if mask.dtype != torch.bool or mask.shape != w.shape:
        shapes = tuple(mask.shape), like, tuple(w.shape)
        check.mask_like(name, str(mask.dtype), *shapes)
    _same_device(name, mask, like, w)
    return mask.detach().contiguous()


def _given_norm(name: str, x: Any, n: int, per: str, w: Tensor) -> Tensor:
    """Checks a norm that the user gives; returns it as float64 [n], ones for None."""
    if x is None:
        return torch.ones(n, dtype=torch.float64, device=w.device)
    x = floating(name, x)
    check.vector(name, tuple(x.shape), (n,), per)
    _same_device(name, x, "w", w)
    return x.to(torch.float64).contiguous()


def given_norms(
    w: Tensor, in_norm: Any, out_norm: Any, groups: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Checks the norms that the user gives; returns float64 (in_norm [I], out_norm [O])."""
    into, out = check.layer_channels("w", tuple(w.shape), groups, transposed)
    return (
        _given_norm("in_norm", in_norm, into, "input channel of w", w),
        _given_norm("out_norm", out_norm, out, "output channel of w", w),
    )


def norms(
    w_prev: Any,
    w: Tensor,
    w_next: Any,
    groups: int,
    transposed: bool,
    check_finite: bool,
) -> tuple[Tensor, Tensor]:
    """Computes float64 (in_norm [I], out_norm [O]) from the neighbors of w."""
    backend = TorchBackend(w, check_finite)
    both = []
    for name, neighbors in (("w_prev", w_prev), ("w_next", w_next)):
        side = side_of(name, tuple(w.shape), groups, transposed)
        norm = norm_of(side, neighbors, backend)
        if check_finite and needs_check(neighbors) and _not_finite(norm):
            raise check.lost_norm(name)
        both.append(norm)
    return both[0], both[1]


class TorchBackend:
    """neighbors.Backend for tensors on the device of w."""

    def __init__(self, w: Tensor, check_finite: bool) -> None:
        self.w = w
        self.check_finite = check_finite

    def check_weight(self, name: str, x: Any) -> None:
        """Raises unless x is a floating tensor on the device of w."""
        _same_device(name, floating(name, x), "w", self.w)

    def row_squared_norms(self, x: Tensor, name: str) -> Tensor:
        """Sums the squares of each row of x [R, ...], float64 [R]."""
        return schema.call(schema.row_squared_norms, x.detach(), self.check_finite, name)

    def col_squared_norms(self, x: Tensor, groups: int, name: str) -> Tensor:
        """Sums the squares of each column of x [G * N, C, *K], float64 [G * C]."""
        return schema.call(schema.col_squared_norms, x.detach(), groups, self.check_finite, name)

    def ones(self, n: int) -> Tensor:
        """Makes float64 ones [n]."""
        return torch.ones(n, dtype=torch.float64, device=self.w.device)

    def as_float64(self, x: Any, name: str) -> Tensor:
        """Returns a finite scale as float64, contiguous."""
        x = floating(name, x)
        _same_device(name, x, "w", self.w)
        scale = x.to(torch.float64).contiguous()
        if self.check_finite and _not_finite(scale):
            index = int(scale.flatten().isfinite().to(torch.uint8).argmin())
            value = float(scale.flatten()[index])
            raise check.not_finite_scale(name, value, index)
        return scale

    def repeat(self, x: Tensor, times: int) -> Tensor:
        """Repeats each entry of x [n], [n * times]."""
        return x.repeat_interleave(times)

    def norm(self, squared_norms: list[Tensor]) -> Tensor:
        """Takes the square root of the sum of the squared norms [n], added in order."""
        return schema.norm(squared_norms)


def _not_finite(x: Tensor) -> bool:
    """Tells whether an entry is inf or NaN; False where values are not known (tracing, meta)."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    return not bool(x.isfinite().all())


def _tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        cure = "Use lap_ext.numpy for NumPy arrays." if type(x).__name__ == "ndarray" else ""
        raise LapTypeError("{argument} to be a torch.Tensor", type(x).__name__, cure, argument=name)
    if x.layout != torch.strided:
        raise LapTypeError(
            "a dense {argument}", f"layout {x.layout}", "Pass {argument}.to_dense().", argument=name
        )


def _same_device(name: str, x: Tensor, w_name: str, w: Tensor) -> None:
    if x.device != w.device:
        check.same_device(name, str(x.device), w_name, str(w.device))
