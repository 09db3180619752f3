# SPDX-License-Identifier: MIT
"""Shared cases: hand-worked layers, shape lists, memory layouts and hostile data.

The expected scores keep their arithmetic: |weight| * norm of its producer * norm of its consumer,
as in 2 * 5 * 1. Neighbors are written as the keyword arguments of lap_ext.Neighbor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IDENTITY = "identity"  # stands for lap_ext.IDENTITY


class N(NamedTuple):
    """The arguments of a Neighbor, with nested lists for tensors."""

    weight: Any
    groups: int = 1
    transposed: bool = False
    scale: Any = None


class Several(tuple[Any, ...]):
    """A sequence of neighbors, told apart from the nested lists of one tensor."""


class Worked(NamedTuple):
    """A layer small enough to be worked by hand."""

    name: str
    w_prev: Any
    w: Any
    w_next: Any
    expected: Any
    groups: int = 1
    transposed: bool = False


WORKED = [
    Worked("docstring", [[3, 4]], [[-2]], [[1]], [[2 * 5 * 1]]),
    Worked("first_layer", None, [[2, -3]], [[3], [4]], [[2 * 1 * 5, 3 * 1 * 5]]),
    Worked("last_layer", [[3, 4], [0, 2]], [[7, -1]], None, [[7 * 5 * 1, 1 * 2 * 1]]),
    Worked("alone", None, [[-0.0, 0.5]], None, [[0 * 1 * 1, 0.5 * 1 * 1]]),
    Worked(
        "linear",
        [[3, 4], [0, 0], [5, 12]],  # 5, 0, 13
        [[2, -1, 1], [-0.5, 7, 0]],
        [[1, 0], [0, 8], [0, 6]],  # 1, 10
        [[2 * 5 * 1, 1 * 0 * 1, 1 * 13 * 1], [0.5 * 5 * 10, 7 * 0 * 10, 0 * 13 * 10]],
    ),
    Worked(
        "conv1d",
        [[[3, 4]], [[6, 8]]],  # [2, 1, 2]: 5, 10
        [[[1, -2], [3, 0.5]]],  # [1, 2, 2]
        [[[2, 2, 2, 2]]],  # [1, 1, 4]: 4
        [[[1 * 5 * 4, 2 * 5 * 4], [3 * 10 * 4, 0.5 * 10 * 4]]],
    ),
    Worked(
        "conv2d",
        [[[[1, 1], [1, 1]]], [[[2, 0], [0, 0]]]],  # [2, 1, 2, 2]: 2, 2
        [[[[3]], [[4]]], [[[-5]], [[6]]]],  # [2, 2, 1, 1]
        [[[[3, 4]], [[0, 1]]]],  # [1, 2, 1, 2]: 5, 1
        [[[[3 * 2 * 5]], [[4 * 2 * 5]]], [[[5 * 2 * 1]], [[6 * 2 * 1]]]],
    ),
    Worked(
        "conv3d",
        [[[[[2, 2]], [[2, 2]]]]],  # [1, 1, 2, 1, 2]: 4
        [[[[[1, -1]], [[2, 3]]]]],  # [1, 1, 2, 1, 2]
        [[[[[5]]]]],  # 5
        [[[[[1 * 4 * 5, 1 * 4 * 5]], [[2 * 4 * 5, 3 * 4 * 5]]]]],
    ),
    Worked(
        "grouped",  # 2 groups: row 0 reads channels 0, 1; row 1 reads channels 2, 3
        [[1], [2], [3], [4]],
        [[10, 20], [30, 40]],
        [[1, 2]],
        [[10 * 1 * 1, 20 * 2 * 1], [30 * 3 * 2, 40 * 4 * 2]],
        groups=2,
    ),
    Worked(
        "depthwise_multiplier_2",  # rows 0, 1 read channel 0; rows 2, 3 read channel 1
        [[[3, 4]], [[1, 0]]],  # 5, 1
        [[[1]], [[2]], [[3]], [[4]]],  # [4, 1, 1]
        [[[1], [2], [3], [4]]],  # [1, 4, 1]
        [[[1 * 5 * 1]], [[2 * 5 * 2]], [[3 * 1 * 3]], [[4 * 1 * 4]]],
        groups=2,
    ),
    Worked(
        "transposed",  # w [I, O, *K]: the row is the input
        [[[3, 4]], [[0, 2]]],  # 5, 2
        [[[1, 2], [3, 4]], [[5, 6], [7, 8]]],  # [2, 2, 2]
        [[[1], [10]]],  # [1, 2, 1]: 1, 10
        [
            [[1 * 5 * 1, 2 * 5 * 1], [3 * 5 * 10, 4 * 5 * 10]],
            [[5 * 2 * 1, 6 * 2 * 1], [7 * 2 * 10, 8 * 2 * 10]],
        ],
        transposed=True,
    ),
    Worked(
        "transposed_grouped",  # w [4, 1, 1], 2 groups: inputs 0, 1 -> output 0; 2, 3 -> output 1
        [[1], [2], [3], [4]],
        [[[1]], [[1]], [[1]], [[-2]]],
        [[[10], [100]]],
        [[[1 * 1 * 10]], [[1 * 2 * 10]], [[1 * 3 * 100]], [[2 * 4 * 100]]],
        groups=2,
        transposed=True,
    ),
    Worked(
        "neighbors_grouped",  # producer rows as ever; consumer [4, 1]: 2 groups of 2 rows
        N([[[3], [4]], [[6], [8]]], groups=2),  # [2, 2, 1]: 5, 10
        [[[1], [1]], [[1], [-1]]],  # [2, 2, 1]
        N([[[3]], [[4]], [[5]], [[12]]], groups=2),  # output 0: 3, 4 -> 5; output 1: 5, 12 -> 13
        [[[1 * 5 * 5], [1 * 10 * 5]], [[1 * 5 * 13], [1 * 10 * 13]]],
    ),
    Worked(
        "neighbors_transposed",  # producer [P, C, K]: its columns; consumer [C, N, K]: its rows
        N([[[3], [6]], [[4], [8]]], transposed=True),  # columns: 5, 10
        [[[1], [1]], [[1], [-1]]],
        N([[[3], [4]], [[5], [12]]], transposed=True),  # rows: 5, 13
        [[[1 * 5 * 5], [1 * 10 * 5]], [[1 * 5 * 13], [1 * 10 * 13]]],
    ),
    Worked(
        "neighbors_transposed_grouped",  # producer [4, 1, 1], 2 groups: rows 0, 1 -> 0; 2, 3 -> 1
        N([[[3]], [[4]], [[6]], [[8]]], groups=2, transposed=True),  # 5, 10
        [[[1], [1]], [[1], [-1]]],
        N([[[3]], [[13]]], groups=2, transposed=True),  # [2, 1, 1]: rows 3, 13
        [[[1 * 5 * 3], [1 * 10 * 3]], [[1 * 5 * 13], [1 * 10 * 13]]],
    ),
    Worked(
        "flatten_before",  # conv -> flatten -> w: 2 channels of 2 positions, channel-major
        [[[3, 4]], [[6, 8]]],  # 5, 10
        [[1, 2, 3, 4]],
        None,
        [[1 * 5, 2 * 5, 3 * 10, 4 * 10]],
    ),
    Worked(
        "flatten_after",  # w conv -> flatten -> linear [1, 4]: columns 0, 1 read channel 0
        None,
        [[[1]], [[2]]],
        [[3, 4, 5, 12]],  # 5, 13
        [[[1 * 5]], [[2 * 13]]],
    ),
    Worked(
        "unflatten_before",  # linear [4, 1] -> unflatten to 2 channels of 2 -> w conv
        [[3], [4], [5], [12]],  # 5, 13
        [[[1], [2]]],
        None,
        [[[1 * 5], [2 * 13]]],
    ),
    Worked(
        "unflatten_after",  # w linear [4, 1] -> unflatten to 2 channels of 2 -> conv
        None,
        [[1], [2], [3], [4]],
        [[[3, 4], [5, 12]]],  # [1, 2, 2]: 5, 13
        [[1 * 5], [2 * 5], [3 * 13], [4 * 13]],
    ),
    Worked(
        "batch_norm",
        N([[3, 4], [5, 12]], scale=[2, -1]),  # 2 * 5, 1 * 13
        [[1, 1]],
        N([[3], [4]], scale=[0.5]),  # 0.5 * 5
        [[1 * 10 * 2.5, 1 * 13 * 2.5]],
    ),
    Worked(
        "batch_norm_before_flatten",  # one scale a channel, repeated over its 2 positions
        N([[[3, 4]], [[6, 8]]], scale=[2, 0.5]),  # 2 * 5, 0.5 * 10
        [[1, 2, 3, 4]],
        None,
        [[1 * 10, 2 * 10, 3 * 5, 4 * 5]],
    ),
    Worked(
        "batch_norm_and_flatten_after",  # w -> batch norm of 2 channels -> flatten -> linear
        None,
        [[[1]], [[2]]],
        N([[3, 4, 5, 12]], scale=[2, -3]),  # 2 * 5, 3 * 13
        [[[1 * 10]], [[2 * 39]]],
    ),
    Worked(
        "two_producers_two_consumers",
        Several(([[3]], [[4]])),  # sqrt(9 + 16) = 5
        [[2]],
        Several(([[6]], [[8]])),  # sqrt(36 + 64) = 10
        [[2 * 5 * 10]],
    ),
    Worked(
        "skips",
        Several(([[2, 2]], IDENTITY)),  # sqrt(8 + 1) = 3
        [[5]],
        Several((IDENTITY, [[2], [2], [4]])),  # sqrt(1 + 4 + 4 + 16) = 5
        [[5 * 3 * 5]],
    ),
    Worked("identity_alone", IDENTITY, [[5, 6]], IDENTITY, [[5 * 1 * 1, 6 * 1 * 1]]),
    Worked(
        "mixed_sequence",  # squares: 3 * 3 * (1 + 1) + (4 + 16) + 1 + (9 + 1) = 49
        Several((N([[[1, 1]]], scale=[3]), N([[[2, 4]]], transposed=True), IDENTITY, [[[3, 1]]])),
        [[[-2]]],
        None,
        [[[2 * 7 * 1]]],
    ),
]


def built(case: Worked, dtype: torch.dtype, device: str) -> tuple[Any, Tensor, Any]:
    """(w_prev, w, w_next) as lap_ext takes them."""
    import lap_ext

    def tensor(x: Any) -> Tensor:
        return torch.tensor(x, dtype=dtype, device=device)

    def neighbor(x: Any) -> Any:
        if x is None or isinstance(x, Several):
            return x if x is None else [neighbor(part) for part in x]
        if isinstance(x, N):
            scale = None if x.scale is None else tensor(x.scale)
            return lap_ext.Neighbor(tensor(x.weight), x.groups, x.transposed, scale)
        return lap_ext.IDENTITY if x == IDENTITY else tensor(x)

    return neighbor(case.w_prev), tensor(case.w), neighbor(case.w_next)


# ---- shapes of the middle layer ---------------------------------------------------------------
class Shape(NamedTuple):
    """A middle layer: w is [O, I/groups, *K], transposed [I, O/groups, *K]."""

    name: str
    w: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def channels(self) -> tuple[int, int]:
        """(I, O) of the layer."""
        rows, across = self.w[0], self.w[1] * self.groups
        return (rows, across) if self.transposed else (across, rows)


SHAPES = [
    Shape("linear_1x1", (1, 1)),
    Shape("linear_7x33", (7, 33)),
    Shape("linear_65x129", (65, 129)),
    Shape("conv1d", (5, 6, 3)),
    Shape("conv2d_3x3", (8, 17, 3, 3)),
    Shape("conv2d_1x1", (33, 16, 1, 1)),
    Shape("conv3d", (4, 3, 3, 1, 2)),
    Shape("grouped", (6, 5, 3), groups=3),
    Shape("depthwise", (12, 1, 3, 3), groups=6),
    Shape("transposed", (9, 4, 2, 2), transposed=True),
    Shape("transposed_grouped", (6, 5, 3), groups=2, transposed=True),
    Shape("conv2d_blocks", (40, 32, 3, 3)),
]

# Sizes around lanes (32), blocks and segments (1024, 4096), and above.
SIZES = [1, 2, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097, 65537, 300000]

EMPTY_SHAPES = [(0, 4), (4, 0), (3, 0, 3), (3, 2, 0, 3), (0, 0)]


# ---- memory layouts: the same values, other strides -------------------------------------------
def _sliced(x: Tensor) -> Tensor:
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    wide[..., 1::2] = 77  # never to be read
    wide[..., ::2] = x
    return wide[..., ::2]


def _offset(x: Tensor) -> Tensor:
    buffer = torch.full((x.numel() + 3,), 77, dtype=x.dtype, device=x.device)
    buffer[3:] = x.reshape(-1)
    return buffer[3:].view(x.shape)


def _reversed_strides(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _rows_of_more(x: Tensor) -> Tensor:
    wide = torch.full((2 * x.shape[0], *x.shape[1:]), 77, dtype=x.dtype, device=x.device)
    wide[1::2] = x
    return wide[1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed_strides": _reversed_strides,
    "sliced": _sliced,
    "offset": _offset,
    "every_second_row": _rows_of_more,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
}
LAYOUT_DIMS = {"channels_last": (4,), "channels_last_3d": (5,)}  # the others take any shape


def layouts_of(dims: int) -> list[str]:
    """The layouts that a tensor of this many dimensions can have."""
    return [name for name in LAYOUTS if dims in LAYOUT_DIMS.get(name, (dims,))]


# ---- data that selection finds hard -----------------------------------------------------------
def _bits(pattern: Tensor) -> Tensor:
    return pattern.to(torch.int32).view(torch.float32)


def _crowd(n: int) -> Tensor:
    """Nearly constant: the few thousand distinct values all lie next to each other."""
    x = torch.full((n,), 0.5)
    start, count = n // 3, min(4096, n - n // 3)
    x[start : start + count] = torch.randperm(count) / 8192 + 0.25
    return x


def _zeros60(n: int) -> Tensor:
    x = torch.randn(n)
    gone = torch.rand(n) < 0.6
    return torch.where(gone, torch.where(torch.rand(n) < 0.5, 0.0, -0.0), x)


HOSTILE: dict[str, Callable[[int], Tensor]] = {
    "random": torch.randn,
    "all_equal": lambda n: torch.full((n,), -0.375),
    "all_zero": torch.zeros,
    "minus_zero": lambda n: torch.where(torch.arange(n) % 2 == 0, -0.0, 0.0),
    "leading_bits": lambda n: _bits(0x3F800000 | torch.randint(0, 256, (n,))),
    "leading_bits_wide": lambda n: _bits(0x3F800000 | torch.randint(0, 1 << 20, (n,))),
    "three_values": lambda n: torch.randint(0, 3, (n,)).float() - 1,
    "zeros_60": _zeros60,
    "denormal": lambda n: torch.randint(-1000, 1000, (n,)).float() * 2.0**-149,
    "half_denormal": lambda n: torch.randint(-1000, 1000, (n,)).float() * 2.0**-24,
    "huge": lambda n: torch.randn(n) * 1e30,
    "tiny": lambda n: torch.randn(n) * 1e-30,
    "wide": lambda n: torch.randn(n) * torch.pow(10.0, torch.randint(-30, 30, (n,)).float()),
    "sorted": lambda n: torch.linspace(0, 1, n),
    "descending": lambda n: torch.linspace(1, 0, n),
    "crowd": _crowd,
    "period_64": lambda n: (torch.arange(n) % 64 + 1).float(),
    "period_1024": lambda n: (torch.arange(n) % 1024 + 1).float(),
    "period_4096_bumps": lambda n: (torch.arange(n) % 4096 != 0) * torch.rand(n) + 0.5,
    "outlier": lambda n: torch.full((n,), 1e-3).index_fill_(0, torch.tensor([n // 2]), 9.0),
}


def hostile(name: str, n: int, dtype: torch.dtype) -> Tensor:
    """n hard numbers in the dtype; what overflows there is clamped to its range."""
    top = torch.finfo(dtype).max
    return HOSTILE[name](n).double().clamp(-top, top).to(dtype)


def random_layer(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(w, in_norm [I], out_norm [O]) with a few zeros among weights and norms."""
    w = torch.randn(shape.w, dtype=torch.float64).to(dtype)
    w = torch.where(torch.rand(shape.w) < 0.1, torch.zeros((), dtype=dtype), w)
    ins, outs = shape.channels
    in_norm, out_norm = torch.rand(ins, dtype=torch.float64), torch.rand(outs, dtype=torch.float64)
    if ins > 4:
        in_norm[2] = 0
    return w, in_norm * 3, out_norm + 0.25
