# SPDX-License-Identifier: MIT
"""Tells which tensors lie over the same memory: parameters may be tied by it, not by identity."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def is_plain(x: Tensor) -> bool:
    """Tells whether x is plain strided memory, not sparse, quantized or a subclass like DTensor."""
    ordinary = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return ordinary and x.layout == torch.strided and not x.is_quantized


def memory_key(x: Tensor) -> Hashable:
    """Returns a key that tensors share if their elements are the same memory in the same order.

    A tensor without memory that can be compared (on the meta device, sparse, empty) has its own.

    Example:
        >>> x = torch.ones(2, 3)
        >>> memory_key(x) == memory_key(x.view(2, 3)), memory_key(x) == memory_key(x.clone())
        (True, False)
    """
    if not _has_address(x):
        return id(x)
    strides = tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    return x.device, x.data_ptr(), x.dtype, tuple(x.shape), strides


def overlapping(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Lists the pairs (index, index) of tensors that share a part of their memory.

    Or all of it in another order: tensors with the same `memory_key` are no such pair.

    Example:
        >>> x = torch.ones(4, 4)
        >>> overlapping([x[:3], x[2:], x[:3], torch.ones(4), x[:2, :2], x[:2, 2:]])
        [(0, 1), (0, 4), (0, 5), (1, 2), (2, 4), (2, 5)]
    """
    spans = sorted(
        (str(x.device), x.data_ptr(), x.data_ptr() + _extent(x) * x.element_size(), index, x)
        for index, x in enumerate(tensors)
        if _has_address(x)
    )
    pairs = []
    for at, (device, _, end, index, x) in enumerate(spans):
        for other_device, begin, _, other, y in spans[at + 1 :]:
            if other_device != device or begin >= end:
                break
            if memory_key(x) != memory_key(y) and _share(x, y):
                pairs.append((min(index, other), max(index, other)))
    return sorted(pairs)


def _has_address(x: Tensor) -> bool:
    if is_lazy(x) or not is_plain(x) or x.is_meta or not x.numel():
        return False
    return x.data_ptr() != 0  # memory that was given back for a while


def _extent(x: Tensor) -> int:
    """Counts the elements from the first to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _share(x: Tensor, y: Tensor) -> bool:
    """Tells whether two tensors whose spans of memory overlap, x first, have an element in common.

    Marks x's elements in a map of its span and looks there for those of y.
    """
    step = y.data_ptr() - x.data_ptr()
    if x.element_size() != y.element_size() or step % x.element_size():
        return True
    offset = step // x.element_size()
    marks = torch.zeros(max(_extent(x), offset + _extent(y)), dtype=torch.bool)
    marks.as_strided(x.shape, x.stride()).fill_(True)
    return bool(marks.as_strided(y.shape, y.stride(), offset).any())
